// Every kernel, compiled for the instruction set whose simd header came before; BG_ISA is its name.
#include "inl/loads.h"
#include "inl/exp.h"
#include "kernels.h"
//
#include "inl/activations.inl.h"
#include "inl/int_linear.inl.h"
#include "inl/attention.inl.h"
#include "inl/attention_dense.inl.h"
#include "inl/attention_packed.inl.h"
#include "inl/kv_pack.inl.h"
#include "inl/rows.inl.h"
#include "inl/dense_rows.inl.h"

#define BG_STRING2(x) #x
#define BG_STRING(x) BG_STRING2(x)

namespace bitgrain {
namespace BG_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    BG_STRING(BG_ISA), kGroupedRows, kSingleRows, quantize_tiles, int_panels, load_queries, attend_dense,
    attend_packed, pack_states, read_states, exp_floats,
    norm_row, gated_row, add_row, rotate_rows, dense_rows,
};

}  // namespace BG_ISA
}  // namespace bitgrain
