// Activations quantized to 8 bits or fewer, as the int8 kernels read them.
//
// Rows (tokens) lie in tiles of up to `rows` tokens; a tile of R rows is [steps][R][4] bytes: four neighbouring features
// of each row. Spans are padded as those of the weights are, with the byte that means 0.
#pragma once
#include "common.h"
#include "decoder/rows.h"
#include "linear/int_weights.h"

namespace bitgrain {

struct ActivationSpec {
  int32_t fixed;      // 0: each row has a scale, its largest magnitude / divisor; 1: spans have a_scale
  float divisor;
  int32_t low, high;  // of the codes
  int32_t shift;      // a code is stored as code + shift, in a byte; a zero point is a_zero - shift
};

struct ActivationJob {
  const void* x;  // [m, k], rows `stride` elements apart
  DType type;     // f32, bf16, f16
  int64_t m, stride;
  ActivationSpec spec;
  const IntWeights* w;  // its spans
  int64_t rows;         // of a tile
  uint8_t* bytes;       // [tiles][rows * 4 * steps]
  int32_t* sums;        // [tiles][rows * spans]: of stored - a_zero, times sum_factor; in a tile [spans][R]
  int32_t sum_factor;   // minus the weights' zero point, if they have one for all; else 1
  float* scales;        // [m]; NaN for a row with a NaN or Inf: its outputs are NaN
  const RowSource* source = nullptr;  // makes the rows, in place of x
  float* row = nullptr;               // [k], of the thread: for a source
};

constexpr int64_t rows_of_tile(int64_t m, int64_t rows, int64_t tile) {
  return m - tile * rows < rows ? m - tile * rows : rows;
}

}  // namespace bitgrain
