// y = x W^T + b with weights that are looked up in a table and inputs in bfloat16 or float32.
#pragma once
#include "common.h"
#include "decoder/rows.h"
#include "linear/code_weights.h"

namespace bitgrain {

// Inputs as the kernels read them: tiles of up to `rows` rows; a tile of R rows is [steps][R][2], two neighbouring
// features of each row, in bfloat16 or float32 (Kernels::input_bytes). Groups are padded as those of the weights are,
// with 0. For the matrix unit tiles have 16 rows and are [steps][16][32] of bfloat16, groups are padded to whole steps.
struct InputJob {
  const void* x;  // [m, k], rows `stride` elements apart
  DType type;     // f32, bf16, f16
  int64_t m, stride;
  const CodeWeights* w;  // its groups
  int64_t rows;          // of a tile
  int64_t row_bytes;     // of a row in a tile
  uint8_t* tiles;        // [tiles][rows * row_bytes]
  float* sums;           // null, or [tiles][rows * spans], in a tile [spans][R]: of the features of a group, as rounded
  float* scales = nullptr;  // null, or of rounded inputs: [tiles][rows * scales_of_row], in a tile [spans][R] or [R]
  const RowSource* source = nullptr;  // makes the rows, in place of x
  float* row = nullptr;               // [k], of the thread: for a source
};

// Panels of one weight against all tiles [first_tile, last_tile) of inputs.
struct CodePanelJob {
  const CodeWeights* w;
  const uint8_t* tiles;
  const float *sums, *scales;
  int64_t m, rows, row_bytes, first_tile, last_tile;
  float* totals;  // [rows of those tiles, 32], this thread's; null: sums stay in registers, each tile reads the panel
  void* y;        // [m, n], rows `stride` elements apart
  DType type;
  int64_t stride;
};

// Several weights that read the same inputs (q, k and v of attention; gate and up of an MLP).
struct CodeLinearCall {
  const void* x;
  DType x_type;
  int64_t m, x_stride;
  int64_t count;
  const CodeWeights* const* weights;  // of the same k, group, bits and rounding of inputs
  void* const* y;
  const int64_t* y_stride;
  DType y_type;
  const RowSource* source = nullptr;  // makes the rows of x, each one once
};

void code_linear(const CodeLinearCall& call, int threads);

}  // namespace bitgrain
