#include "decoder/dense_rows.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Rows that stay in a core's own cache beside a few columns of a weight.
constexpr int64_t kRowBytes = 512 << 10;

}  // namespace

void dense_rows(const DenseRowsCall& call, int threads) {
  static thread_local Scratch memory;
  const Kernels& kernel = kernels();
  const int64_t k = call.weights[0]->k;
  const bool rounded = call.m > kExactRows && kernel.input_bytes == 2 && call.weights[0]->type == DType::bf16;
  const DType type = rounded ? DType::bf16 : DType::f32;
  const int64_t row_bytes = k * (int64_t)size_of(type), fitting = kRowBytes / (row_bytes + 1) / 4 * 4;
  const int64_t most = fitting < 16 ? 16 : fitting;
  uint8_t* rows = memory.get<uint8_t>((call.m < most ? call.m : most) * row_bytes);
  for (int64_t start = 0; start < call.m; start += most) {
    const int64_t m = call.m - start < most ? call.m - start : most;
    parallel_for(m < 8 ? 1 : threads, m, 4, [&](int64_t first, int64_t last) {
      static thread_local Scratch made_memory;
      float* made = call.source ? made_memory.get<float>(k) : nullptr;
      for (int64_t row = first; row < last; ++row) {
        if (made) call.source->make(call.source->context, start + row, made);
        const int64_t at = (start + row) * call.x_stride;
        kernel.add_row(made ? made : call.x, made ? DType::f32 : call.x_type, made ? 0 : at, nullptr, k, rows, type,
                       row * k);
      }
    });
    for (int64_t i = 0; i < call.count; ++i) {
      const DenseWeights& w = *call.weights[i];
      uint8_t* y = static_cast<uint8_t*>(call.y[i]) + start * call.y_stride[i] * (int64_t)size_of(call.y_type);
      const DenseRowsJob job{&w, rows, type, m, y, call.y_type, call.y_stride[i]};
      parallel_for(threads, w.n, round_up(ceil_div(w.n, 16 * threads), 4),
                   [&](int64_t first, int64_t last) { kernel.dense_rows(job, first, last); });
    }
  }
}

}  // namespace bitgrain
