// Every kernel, compiled for the instruction set whose simd header came before; BG_ISA is its name.
#include "inl/loads.h"
#include "kernels.h"
//
#include "inl/activations.inl.h"
#include "inl/int_linear.inl.h"
//
#include "inl/code_pairs.inl.h"
//
#include "inl/code_inputs.inl.h"
#include "inl/code_linear.inl.h"

#define BG_STRING2(x) #x
#define BG_STRING(x) BG_STRING2(x)

namespace bitgrain {
namespace BG_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    BG_STRING(BG_ISA), kGroupedRows, kSingleRows, quantize_tiles, int_panels,
    kInputBytes, kPackedRows, arrange_inputs, code_panels,
};

}  // namespace BG_ISA
}  // namespace bitgrain
