// The upper triangle of X^T X, see solver/gram.h.
namespace bitgrain {
namespace BG_ISA {

template <DType T>
static void gram_pack_panel(const GramJob& job, int64_t panel) {
  const int64_t column = panel * kGramPanel, steps = gram_steps(job);
  float* to = job.panels + panel * steps * kGramPanel;
  for (int64_t t = 0; t < job.tokens; ++t) {
    const uint8_t* row = (const uint8_t*)job.x + t * job.stride * (int64_t)size_of(T);
    for (int v = 0; v < 3; ++v) {
      const int64_t left = job.k - column - 16 * v, count = left < 0 ? 0 : left < 16 ? left : 16;
      if (!job.pairs) {
        store_f(to + t * kGramPanel + 16 * v, count ? load_elements<T>(row, column + 16 * v, count) : zero_f());
        continue;
      }
      for (int64_t i = 0; i < 16; ++i) {  // the even token in the low half
        uint32_t word = 0;
        uint16_t x = 0;
        if (i < count) std::memcpy(&x, row + 2 * (column + 16 * v + i), 2);
        float* at = to + t / 2 * kGramPanel + 16 * v + i;
        if (t % 2) std::memcpy(&word, at, 4);
        word |= (uint32_t)x << 16 * (t % 2);
        std::memcpy(at, &word, 4);
      }
    }
  }
}

static void gram_pack(const GramJob& job, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    if (job.type == DType::f32) gram_pack_panel<DType::f32>(job, panel);
    else if (job.type == DType::bf16) gram_pack_panel<DType::bf16>(job, panel);
    else gram_pack_panel<DType::f16>(job, panel);
  }
}

// R features at a against 16 V features at b, over all steps; added to h, of whose last vector `count` columns exist.
template <bool PAIRS, int R, int V>
BG_INLINE void gram_tile(const float* a, const float* b, int64_t steps, float* h, int64_t k, int64_t count) {
  alignas(64) float total[R * V * 16];
  BG_UNROLL for (int i = 0; i < R * V; ++i) store_f(total + 16 * i, zero_f());
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) prefetch(h + r * k + 16 * v);
  constexpr int64_t kChunk = PAIRS ? kGramPairChunk : kGramChunk;
  for (int64_t start = 0; start < steps; start += kChunk) {
    const int64_t stop = start + kChunk < steps ? start + kChunk : steps;
    F32 sum[R][V];
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = zero_f();
    const float *p = a + start * kGramPanel, *q = b + start * kGramPanel;
    for (int64_t t = start; t < stop; ++t, p += kGramPanel, q += kGramPanel) {
      if constexpr (PAIRS) {
        Bytes y[V];
        BG_UNROLL for (int v = 0; v < V; ++v) y[v] = load_b((const uint8_t*)(q + 16 * v));
        BG_UNROLL for (int r = 0; r < R; ++r) {
          const Bytes x = repeat4((const uint8_t*)(p + r));
          BG_UNROLL for (int v = 0; v < V; ++v) dot2(sum[r][v], x, y[v]);
        }
      } else {
        F32 y[V];
        BG_UNROLL for (int v = 0; v < V; ++v) y[v] = load_f(q + 16 * v);
        BG_UNROLL for (int r = 0; r < R; ++r) {
          const F32 x = set_f(p[r]);
          BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = fma_f(x, y[v], sum[r][v]);
        }
      }
    }
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) {
      float* to = total + 16 * (r * V + v);
      store_f(to, add_f(load_f(to), sum[r][v]));
    }
  }
  for (int r = 0; r < R; ++r) {
    BG_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t n = v + 1 < V ? 16 : count;
      const F32 sum = load_f(total + 16 * (r * V + v));
      store_elements(h + r * k, DType::f32, 16 * v, n, add_f(load_elements<DType::f32>(h + r * k, 16 * v, n), sum));
    }
  }
}

template <bool PAIRS, int V, int R = kFloatRows>
static void gram_rows(int64_t rows, const float* a, const float* b, int64_t steps, float* h, int64_t k, int64_t count) {
  if (rows == R) return gram_tile<PAIRS, R, V>(a, b, steps, h, k, count);
  if constexpr (R > 1) gram_rows<PAIRS, V, R - 1>(rows, a, b, steps, h, k, count);
}

// Rows of panel i against columns of panel j, kFloatVectors vectors at a time; of a block on the diagonal, vectors that
// end before a tile's first row are left out.
template <bool PAIRS>
static void gram_block(const GramJob& job, int64_t i, int64_t j) {
  const int64_t steps = gram_steps(job), size = steps * kGramPanel;
  const float *a = job.panels + i * size, *b = job.panels + j * size;
  const int64_t top = i * kGramPanel, left = j * kGramPanel;
  const int64_t height = job.k - top < kGramPanel ? job.k - top : kGramPanel;
  const int64_t width = job.k - left < kGramPanel ? job.k - left : kGramPanel;
  for (int64_t r = 0; r < height; r += kFloatRows) {
    const int64_t rows = height - r < kFloatRows ? height - r : kFloatRows;
    for (int64_t c = i == j ? r / 16 * 16 : 0; c < width;) {
      const int64_t vectors = ceil_div(width - c, 16) < kFloatVectors ? ceil_div(width - c, 16) : kFloatVectors;
      const int64_t end = c + 16 * vectors, count = width < end ? width - end + 16 : 16;
      float* h = job.h + (top + r) * job.k + left + c;
      if (vectors == 1) gram_rows<PAIRS, 1>(rows, a + r, b + c, steps, h, job.k, count);
      if constexpr (kFloatVectors > 1) {
        if (vectors == 2) gram_rows<PAIRS, 2>(rows, a + r, b + c, steps, h, job.k, count);
        if (vectors == 3) gram_rows<PAIRS, 3>(rows, a + r, b + c, steps, h, job.k, count);
      }
      c = end;
    }
  }
}

// Blocks [first, last) of the triangle, row after row.
static void gram_blocks(const GramJob& job, int64_t first, int64_t last) {
  int64_t i = 0, j = first;  // j counts from the diagonal on until it lies within row i
  for (int64_t length = ceil_div(job.k, kGramPanel); j >= length; --length, ++i) j -= length;
  const int64_t panels = ceil_div(job.k, kGramPanel);
  for (j += i; first < last; ++first) {
#if BG_HAS_BF16_DOT
    if (job.pairs) gram_block<true>(job, i, j);
    else
#endif
      gram_block<false>(job, i, j);
    if (++j == panels) j = ++i;
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
