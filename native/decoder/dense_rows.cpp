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
  const int64_t k = call.weights[0]->k, fitting = kRowBytes / (4 * k + 1) / 4 * 4, most = fitting < 16 ? 16 : fitting;
  float* rows = memory.get<float>((call.m < most ? call.m : most) * k);
  for (int64_t start = 0; start < call.m; start += most) {
    const int64_t m = call.m - start < most ? call.m - start : most;
    parallel_for(m < 8 ? 1 : threads, m, 4, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float* to = rows + row * k;
        if (call.source) call.source->make(call.source->context, start + row, to);
        else kernel.add_row(call.x, call.x_type, (start + row) * call.x_stride, nullptr, k, to, DType::f32, 0);
      }
    });
    for (int64_t i = 0; i < call.count; ++i) {
      const DenseWeights& w = *call.weights[i];
      uint8_t* y = static_cast<uint8_t*>(call.y[i]) + start * call.y_stride[i] * (int64_t)size_of(call.y_type);
      const DenseRowsJob job{&w, rows, m, y, call.y_type, call.y_stride[i]};
      parallel_for(threads, w.n, round_up(ceil_div(w.n, 16 * threads), 4),
                   [&](int64_t first, int64_t last) { kernel.dense_rows(job, first, last); });
    }
  }
}

}  // namespace bitgrain
