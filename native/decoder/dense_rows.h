// y = x W^T + b for a few rows and a dense weight that lies in memory as torch has it: the head of a model.
#pragma once
#include "common.h"

namespace bitgrain {

struct DenseRowsJob {
  const void* w;  // [n, k], rows `stride` elements apart
  DType type;
  int64_t n, k, stride;
  const float* x;     // [m, k]
  int64_t m;
  const float* bias;  // [n] or null
  void* y;            // [m, n]
  DType y_type;
};

// x [m, k] of type x_type, rows x_stride elements apart; products and sums in float32.
void run_dense_rows(DenseRowsJob job, const void* x, DType x_type, int64_t x_stride, int threads);

}  // namespace bitgrain
