#include "decoder/dense_rows.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {

void run_dense_rows(DenseRowsJob job, const void* x, DType x_type, int64_t x_stride, int threads) {
  static thread_local Scratch memory;
  const Kernels& kernel = kernels();
  float* rows = memory.get<float>(job.m * job.k);
  for (int64_t row = 0; row < job.m; ++row) {
    kernel.add_row(x, x_type, row * x_stride, nullptr, job.k, rows, DType::f32, row * job.k);
  }
  job.x = rows;
  const int64_t grain = ceil_div(job.n, 16 * threads);
  parallel_for(threads, job.n, grain, [&](int64_t first, int64_t last) { kernel.dense_rows(job, first, last); });
}

}  // namespace bitgrain
