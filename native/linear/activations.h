// Activations quantized to 8 bits or fewer, as the int8 kernels read them.
//
// Rows (tokens) lie in tiles of up to `rows` tokens; a tile of R rows is [steps][R][4] bytes: four neighbouring features
// of each row. Spans are padded as those of the weights are, with the byte that means 0.
//
// For the matrix unit tiles have 16 rows and are [steps][16][64] bytes: 64 neighbouring features of each row. Spans are
// padded to whole steps with bytes 0.
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
  int64_t row_bytes;    // of a row's codes: 4 * steps, or matrix_row_bytes
  uint8_t* bytes;       // [tiles][rows * row_bytes]
  int32_t* sums;        // [tiles][rows * spans]: of stored - a_zero, times sum_factor; in a tile [spans][R]
  int32_t sum_factor;   // minus the weights' zero point, if they have one for all; else 1
  float* scales;        // [m]; NaN for a row with a NaN or Inf: its outputs are NaN
  const RowSource* source = nullptr;  // makes the rows, in place of x
  float* row = nullptr;               // [k], of the thread: for a source
};

constexpr int64_t kMatrixTile = 16, kMatrixBytes = 64;  // rows, and bytes of a row, that the matrix unit takes at once

// Steps of a span of so many padded features.
constexpr int64_t matrix_steps(int64_t features) { return ceil_div(features, kMatrixBytes); }

BG_INLINE int64_t matrix_row_bytes(const IntWeights& w) {
  int64_t steps = 0;
  for (int32_t s = 0; s < w.spans; ++s) steps += matrix_steps(w.span[s].chunks * chunk_features(w.bits));
  return steps * kMatrixBytes;
}

constexpr int64_t rows_of_tile(int64_t m, int64_t rows, int64_t tile) {
  return m - tile * rows < rows ? m - tile * rows : rows;
}

}  // namespace bitgrain
