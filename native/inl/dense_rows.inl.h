// A few rows against a dense weight as it lies in memory, see decoder/dense_rows.h.
namespace bitgrain {
namespace BG_ISA {

template <DType T, int R>
BG_INLINE void dense_row(const DenseRowsJob& job, int64_t column, int64_t row) {
  const int64_t k = job.k, at = column * job.stride;
  const float* x = job.x + row * k;
  F32 sum[R][2];
  BG_UNROLL for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero_f();
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    prefetch((const uint8_t*)job.w + (at + i) * (int64_t)size_of(T) + 4096);
    const F32 a = load_elements<T>(job.w, at + i, 16), b = load_elements<T>(job.w, at + i + 16, 16);
    BG_UNROLL for (int r = 0; r < R; ++r) {
      sum[r][0] = fma_f(a, load_f(x + r * k + i), sum[r][0]);
      sum[r][1] = fma_f(b, load_f(x + r * k + i + 16), sum[r][1]);
    }
  }
  for (; i < k; i += 16) {
    const int64_t count = k - i < 16 ? k - i : 16;
    const F32 a = load_elements<T>(job.w, at + i, count);
    BG_UNROLL for (int r = 0; r < R; ++r) {
      sum[r][0] = fma_f(a, load_elements<DType::f32>(x, r * k + i, count), sum[r][0]);
    }
  }
  BG_UNROLL for (int r = 0; r < R; ++r) {
    const float y = sum_f(add_f(sum[r][0], sum[r][1])) + (job.bias ? job.bias[column] : 0.f);
    store_elements(job.y, job.y_type, (row + r) * job.n + column, 1, set_f(y));
  }
}

template <DType T>
static void dense_rows_of(const DenseRowsJob& job, int64_t first, int64_t last) {
  for (int64_t column = first; column < last; ++column) {
    int64_t row = 0;
    for (; row + 4 <= job.m; row += 4) dense_row<T, 4>(job, column, row);
    for (; row < job.m; ++row) dense_row<T, 1>(job, column, row);
  }
}

static void dense_rows(const DenseRowsJob& job, int64_t first, int64_t last) {
  if (job.type == DType::f32) dense_rows_of<DType::f32>(job, first, last);
  else if (job.type == DType::bf16) dense_rows_of<DType::bf16>(job, first, last);
  else dense_rows_of<DType::f16>(job, first, last);
}

}  // namespace BG_ISA
}  // namespace bitgrain
