// Every kernel, compiled for the instruction set whose simd header came before; BG_ISA is its name.
#include "inl/loads.h"
#include "inl/exp.h"
#include "floats.h"
#include "kernels.h"
//
#include "inl/activations.inl.h"
//
#include "inl/int_codes.inl.h"
#include "inl/int_linear.inl.h"
#include "inl/attention_prefill.inl.h"
//
#include "inl/code_pairs.inl.h"
#include "inl/float_grid.inl.h"
//
#include "inl/code_groups.inl.h"
#include "inl/code_inputs.inl.h"
//
#include "inl/code_linear.inl.h"
#include "inl/attention.inl.h"
#include "inl/attention_dense.inl.h"
#include "inl/attention_packed.inl.h"
#include "inl/kv_pack.inl.h"
#include "inl/gram.inl.h"
#include "inl/grid.inl.h"
//
#include "inl/descend.inl.h"
#include "inl/tile_search.inl.h"
#include "inl/probes.inl.h"
#include "inl/rows.inl.h"
#include "inl/dense_rows.inl.h"

#define BG_STRING2(x) #x
#define BG_STRING(x) BG_STRING2(x)

namespace bitgrain {
namespace BG_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    BG_STRING(BG_ISA),
    // int8 products
    kGroupedRows, kSingleRows, quantize_tiles, int_panels,
    // prefill attention
    prefill_steps, pack_past, attend_tiles,
    // products with codes that are looked up
    kInputBytes, kPackedRows, arrange_inputs, code_panels,
    // decode attention
    load_queries, attend_dense, attend_packed, pack_states, read_states, exp_floats,
    // second moments
    BG_HAS_BF16_DOT, gram_pack, gram_blocks,
    // GPTQ
    update_columns, round_columns,
    // range searches
    tile_sums, best_candidates,
    // probes
    read_bytes, int8_loop, bf16_loop,
    // rows between products
    norm_row, gated_row, add_row, rotate_rows, dense_rows,
    // no matrix unit
    INT64_MAX, INT64_MAX, nullptr, nullptr, nullptr, nullptr, 0, nullptr, nullptr,
};

}  // namespace BG_ISA
}  // namespace bitgrain
