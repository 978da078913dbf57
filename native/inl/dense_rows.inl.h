// Rows against a dense weight as it lies in memory, see decoder/dense_rows.h.
namespace bitgrain {
namespace BG_ISA {

constexpr int kDenseTile = kFloatRows / 2;  // rows and columns whose sums fit registers

// How products are made: kStep features of a column and of a row.
template <DType T>
struct FloatProducts {
  using Vector = F32;
  static constexpr int kStep = 16;
  BG_INLINE F32 weights(const void* w, int64_t at, int64_t count) { return load_elements<T>(w, at, count); }
  BG_INLINE F32 inputs(const void* x, int64_t at, int64_t count) { return load_elements<DType::f32>(x, at, count); }
  BG_INLINE void add(F32& sum, F32 w, F32 x) { sum = fma_f(w, x, sum); }
};

#if BG_HAS_BF16_DOT
struct PairProducts {
  using Vector = Bytes;
  static constexpr int kStep = 32;
  BG_INLINE Bytes weights(const void* w, int64_t at, int64_t count) {
    const uint8_t* p = (const uint8_t*)w + 2 * at;
    if (count == kStep) return load_b(p);
    alignas(64) uint8_t part[64];
    std::memset(part, 0, 64);
    std::memcpy(part, p, 2 * (size_t)count);
    return load_b(part);
  }
  BG_INLINE Bytes inputs(const void* x, int64_t at, int64_t count) { return weights(x, at, count); }
  BG_INLINE void add(F32& sum, Bytes w, Bytes x) { dot2(sum, w, x); }
};
#endif

template <typename P, int R, int C>
static void dense_tile(const DenseRowsJob& job, int64_t column, int64_t row) {
  constexpr int kStep = P::kStep;
  constexpr int kChains = R * C >= 8 ? 1 : 2;  // sums apart, so that few of them do not wait for the last product
  const DenseWeights& w = *job.w;
  const int64_t k = w.k, at = column * w.stride, x_at = row * k;
  F32 sum[R][C][kChains];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int c = 0; c < C; ++c) BG_UNROLL for (int h = 0; h < kChains; ++h)
      sum[r][c][h] = zero_f();
  int64_t i = 0;
  for (; i + kStep * kChains <= k; i += kStep * kChains) {
    BG_UNROLL for (int h = 0; h < kChains; ++h) {
      typename P::Vector a[C];
      BG_UNROLL for (int c = 0; c < C; ++c) {
        const int64_t from = at + c * w.stride + i + kStep * h;
        if (h == 0) prefetch((const uint8_t*)w.w + from * (int64_t)size_of(w.type) + 4096);
        a[c] = P::weights(w.w, from, kStep);
      }
      BG_UNROLL for (int r = 0; r < R; ++r) {
        const typename P::Vector v = P::inputs(job.x, x_at + r * k + i + kStep * h, kStep);
        BG_UNROLL for (int c = 0; c < C; ++c) P::add(sum[r][c][h], a[c], v);
      }
    }
  }
  for (; i < k; i += kStep) {
    const int64_t count = k - i < kStep ? k - i : kStep;
    BG_UNROLL for (int c = 0; c < C; ++c) {
      const typename P::Vector a = P::weights(w.w, at + c * w.stride + i, count);
      BG_UNROLL for (int r = 0; r < R; ++r) P::add(sum[r][c][0], a, P::inputs(job.x, x_at + r * k + i, count));
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

template <typename P, int C>
BG_INLINE void dense_columns(const DenseRowsJob& job, int64_t column) {
  int64_t row = 0;
  for (; row + kDenseTile <= job.m; row += kDenseTile) dense_tile<P, kDenseTile, C>(job, column, row);
  for (; row < job.m; ++row) dense_tile<P, 1, C>(job, column, row);
}

template <typename P>
static void dense_rows_of(const DenseRowsJob& job, int64_t first, int64_t last) {
  int64_t column = first;
  // a single row reads one column after the other, as memory has them
  if (job.m >= kDenseTile) {
    for (; column + kDenseTile <= last; column += kDenseTile) dense_columns<P, kDenseTile>(job, column);
  }
  for (; column < last; ++column) dense_columns<P, 1>(job, column);
}

static void dense_rows(const DenseRowsJob& job, int64_t first, int64_t last) {
#if BG_HAS_BF16_DOT
  if (job.x_type == DType::bf16) return dense_rows_of<PairProducts>(job, first, last);
#endif
  if (job.w->type == DType::f32) dense_rows_of<FloatProducts<DType::f32>>(job, first, last);
  else if (job.w->type == DType::bf16) dense_rows_of<FloatProducts<DType::bf16>>(job, first, last);
  else dense_rows_of<FloatProducts<DType::f16>>(job, first, last);
}

}  // namespace BG_ISA
}  // namespace bitgrain
