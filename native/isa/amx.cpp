// AVX512-VNNI, and products of many rows on the matrix unit.
//
// Few rows meet float32, as at avx512vnni: on the processors that have the unit, Sapphire Rapids to Granite Rapids,
// vdpbf16ps does a third of the products of vfmadd (seen on Emerald Rapids).
#define BG_ISA amx
#define BITGRAIN_AVX512_BF16 1
#include "simd/avx512.h"
//
#include "inl/loads.h"
#include "inl/exp.h"
//
#include "floats.h"
#include "kernels.h"
//
#include "inl/activations.inl.h"
//
#include "inl/int_codes.inl.h"
//
#include "inl/matrix.inl.h"
//
#include "inl/int_matrix.inl.h"
//
#include "inl/code_pairs.inl.h"
#include "inl/float_grid.inl.h"
//
#include "inl/code_groups.inl.h"
#include "inl/code_inputs.inl.h"
//
#include "inl/code_matrix.inl.h"
#include "inl/prefill_matrix.inl.h"
//
#include "inl/matrix_probes.inl.h"

namespace bitgrain {

namespace avx512vnni {
extern const Kernels kKernels;
}

namespace amx {

const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels one = avx512vnni::kKernels;
    one.name = "amx";
    one.int_matrix_rows = kIntMatrixRows, one.code_matrix_rows = kCodeMatrixRows;
    one.quantize_matrix = quantize_matrix, one.int_matrix = int_matrix;
    one.arrange_matrix = arrange_matrix, one.code_matrix = code_matrix;
    one.int8_loop = int8_matrix_loop, one.bf16_loop = bf16_matrix_loop;
    one.query_rows = kQueryRows, one.pack_matrix = pack_matrix, one.attend_matrix = attend_matrix;
    return one;
  }();
  return all;
}

}  // namespace amx
}  // namespace bitgrain
