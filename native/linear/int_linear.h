// y = x W^T + b with quantized activations: the products are exact integers, scales are applied in float32.
#pragma once
#include "common.h"
#include "linear/activations.h"
#include "linear/int_weights.h"

namespace bitgrain {

// Panels of one weight against all tiles [first_tile, last_tile) of quantized activations.
struct IntPanelJob {
  const IntWeights* w;
  const uint8_t* bytes;
  const int32_t* sums;
  const float* scales;
  int64_t m, rows, row_bytes, first_tile, last_tile;
  void* y;  // [m, n], rows `stride` elements apart
  DType type;
  int64_t stride;
  float* totals = nullptr;     // for the matrix unit: [rows of those tiles, 32], this thread's
  int32_t* partial = nullptr;  // as many: sums of a span that goes on
};

// Several weights that read the same activations (q, k and v of attention; gate and up of an MLP).
struct IntLinearCall {
  const void* x;
  DType x_type;
  int64_t m, x_stride;
  ActivationSpec spec;
  int64_t count;
  const IntWeights* const* weights;  // of the same spans, kind of zeros and zero point
  void* const* y;
  const int64_t* y_stride;
  DType y_type;
  const RowSource* source = nullptr;  // makes the rows of x, each one once
};

void int_linear(const IntLinearCall& call, int threads);

}  // namespace bitgrain
