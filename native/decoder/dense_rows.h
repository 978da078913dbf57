// y = x W^T + b for dense weights that lie in memory as torch has them: the head of a model, and layers of a decoder
// block that were not quantized. Sums are float32. So are products, whatever the types; but more than kExactRows rows
// are rounded to bfloat16 where the weights are bfloat16 and the level multiplies such numbers (Kernels::input_bytes).
#pragma once
#include "common.h"
#include "decoder/rows.h"

namespace bitgrain {

constexpr int64_t kExactRows = 16;

struct DenseWeights {
  const void* w;  // [n, k], rows `stride` elements apart
  DType type;     // f32, bf16, f16
  int64_t n, k, stride;
  const float* bias;  // [n] or null
};

struct DenseRowsJob {
  const DenseWeights* w;
  const void* x;  // [m, k]
  DType x_type;   // f32, or bf16 as said above
  int64_t m;
  void* y;  // [m, n], rows `stride` elements apart
  DType type;
  int64_t stride;
};

// Several weights that read the same rows.
struct DenseRowsCall {
  const void* x;
  DType x_type;
  int64_t m, x_stride;
  int64_t count;
  const DenseWeights* const* weights;  // of the same k and type
  void* const* y;
  const int64_t* y_stride;
  DType y_type;
  const RowSource* source = nullptr;  // makes the rows of x, each one once
};

void dense_rows(const DenseRowsCall& call, int threads);

}  // namespace bitgrain
