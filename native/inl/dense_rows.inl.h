// Rows against a dense weight as it lies in memory, see decoder/dense_rows.h.
namespace bitgrain {
namespace BG_ISA {

constexpr int kDenseTile = kFloatRows / 2;  // rows and columns whose sums fit registers

template <DType T, int R, int C>
static void dense_tile(const DenseRowsJob& job, int64_t column, int64_t row) {
  constexpr int kChains = R * C >= 8 ? 1 : 2;  // sums apart, so that few of them do not wait for the last product
  const DenseWeights& w = *job.w;
  const int64_t k = w.k, at = column * w.stride;
  const float* x = job.x + row * k;
  F32 sum[R][C][kChains];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int c = 0; c < C; ++c) BG_UNROLL for (int h = 0; h < kChains; ++h)
      sum[r][c][h] = zero_f();
  int64_t i = 0;
  for (; i + 16 * kChains <= k; i += 16 * kChains) {
    BG_UNROLL for (int h = 0; h < kChains; ++h) {
      F32 a[C];
      BG_UNROLL for (int c = 0; c < C; ++c) {
        const int64_t from = at + c * w.stride + i + 16 * h;
        if (h == 0) prefetch((const uint8_t*)w.w + from * (int64_t)size_of(T) + 4096);
        a[c] = load_elements<T>(w.w, from, 16);
      }
      BG_UNROLL for (int r = 0; r < R; ++r) {
        const F32 v = load_f(x + r * k + i + 16 * h);
        BG_UNROLL for (int c = 0; c < C; ++c) sum[r][c][h] = fma_f(a[c], v, sum[r][c][h]);
      }
    }
  }
  for (; i < k; i += 16) {
    const int64_t count = k - i < 16 ? k - i : 16;
    BG_UNROLL for (int c = 0; c < C; ++c) {
      const F32 a = load_elements<T>(w.w, at + c * w.stride + i, count);
      BG_UNROLL for (int r = 0; r < R; ++r) {
        sum[r][c][0] = fma_f(a, load_elements<DType::f32>(x, r * k + i, count), sum[r][c][0]);
      }
    }
  }
  BG_UNROLL for (int r = 0; r < R; ++r) {
    alignas(64) float y[16] = {};
    BG_UNROLL for (int c = 0; c < C; ++c) {
      const F32 all = kChains == 2 ? add_f(sum[r][c][0], sum[r][c][kChains - 1]) : sum[r][c][0];
      y[c] = sum_f(all) + (w.bias ? w.bias[column + c] : 0.f);
    }
    store_elements(job.y, job.type, (row + r) * job.stride + column, C, load_f(y));
  }
}

template <DType T, int C>
BG_INLINE void dense_columns(const DenseRowsJob& job, int64_t column) {
  int64_t row = 0;
  for (; row + kDenseTile <= job.m; row += kDenseTile) dense_tile<T, kDenseTile, C>(job, column, row);
  for (; row < job.m; ++row) dense_tile<T, 1, C>(job, column, row);
}

template <DType T>
static void dense_rows_of(const DenseRowsJob& job, int64_t first, int64_t last) {
  int64_t column = first;
  // a single row reads one column after the other, as memory has them
  if (job.m >= kDenseTile) {
    for (; column + kDenseTile <= last; column += kDenseTile) dense_columns<T, kDenseTile>(job, column);
  }
  for (; column < last; ++column) dense_columns<T, 1>(job, column);
}

static void dense_rows(const DenseRowsJob& job, int64_t first, int64_t last) {
  if (job.w->type == DType::f32) dense_rows_of<DType::f32>(job, first, last);
  else if (job.w->type == DType::bf16) dense_rows_of<DType::bf16>(job, first, last);
  else dense_rows_of<DType::f16>(job, first, last);
}

}  // namespace BG_ISA
}  // namespace bitgrain
