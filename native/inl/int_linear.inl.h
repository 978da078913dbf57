// Panels of packed integer weights against tiles of quantized activations; layout in linear/int_weights.h.
namespace bitgrain {
namespace BG_ISA {

template <int BITS, int STEPS>
BG_INLINE void product(I32& sum, const Bytes* w, const Bytes* x) {
  if constexpr (BITS == 8) dot4_shifted(sum, *x, *w);
  else dot4_small<STEPS>(sum, w, x);
}

// Of sums [rows][16 * halves] of the columns from `first` on. Apart from the loop that made them, so that gcc 12 leaves
// them in registers there.
static __attribute__((noinline)) void finish_tile(const IntPanelJob& job, int64_t first, int64_t row, int rows,
                                                  int halves, const float* sums) {
  for (int v = 0; v < halves; ++v) {
    for (int r = 0; r < rows; ++r) finish_sums(job, first + 16 * v, row + r, load_f(sums + (r * halves + v) * 16));
  }
}

// R rows against V half panels, from half panel `half` on. SINGLE: the weights have one span (8 bits). CONSTANT: they have one zero
// point, or none. `ahead`: how far to prefetch weights.
template <int BITS, int R, int V, bool SINGLE, bool CONSTANT>
BG_INLINE void int_tile(const IntPanelJob& job, int64_t panel, int half, const uint8_t* a, const int32_t* sums,
                        int64_t row, int64_t ahead) {
  const IntWeights& w = *job.w;
  constexpr int kSteps = Codes<BITS>::kSteps, kHalf = Codes<BITS>::kVectors * 64, kChunk = 2 * kHalf;
  constexpr int kAtOnce = kSteps < kDotSteps ? kSteps : kDotSteps;
  constexpr int kChains = R * V <= 2 ? 2 : 1;  // sums apart, so that few rows do not wait for the last product
  const uint8_t* at = w.panels + panel * w.panel_bytes;
  const int64_t zeros_at = scales_bytes(w.scale_type), sums_at = zeros_at + zeros_bytes(w.scale_type, w.zeros);
  const int64_t header = sums_at + (w.sums ? kPanel * 4 : 0);
  F32 total[R][V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) total[r][v] = zero_f();

  const int32_t spans = SINGLE ? 1 : w.spans;
  for (const Span* span = w.span; span != w.span + spans; ++span) {
    I32 sum[R][V][kChains];
    BG_UNROLL for (int r = 0; r < R; ++r) {
      const I32 start = CONSTANT ? set_i(sums[r]) : zero_i();
      BG_UNROLL for (int v = 0; v < V; ++v) BG_UNROLL for (int c = 0; c < kChains; ++c) sum[r][v][c] = c ? zero_i() : start;
    }
    if (w.sums) {
      BG_UNROLL for (int v = 0; v < V; ++v) {
        const I32 shifted = mul_i(load_i(at + sums_at + 64 * (half + v)), set_i(-span->a_zero));
        BG_UNROLL for (int r = 0; r < R; ++r) sum[r][v][0] = add_i(sum[r][v][0], shifted);
      }
    }

    constexpr bool kShifted = BITS == 8 && kDotShift != 0;
    I32 shifted[V];
    BG_UNROLL for (int v = 0; v < V; ++v) shifted[v] = zero_i();

    const uint8_t *p = at + header + half * kHalf, *end = p + (int64_t)span->chunks * kChunk;
    for (; p != end; p += kChunk) {
      BG_UNROLL for (int i = 0; i < V * kHalf / 64; ++i) prefetch(p + ahead + 64 * i);
      BG_UNROLL for (int i = 0; i < kSteps; i += kAtOnce) {
        Bytes code[V][kAtOnce];
        BG_UNROLL for (int v = 0; v < V; ++v) BG_UNROLL for (int j = 0; j < kAtOnce; ++j)
            code[v][j] = Codes<BITS>::step(p + v * kHalf, i + j);
        if constexpr (kShifted) BG_UNROLL for (int v = 0; v < V; ++v) sum4(shifted[v], code[v][0]);
        BG_UNROLL for (int r = 0; r < R; ++r) {
          Bytes x[kAtOnce];
          BG_UNROLL for (int j = 0; j < kAtOnce; ++j) x[j] = repeat4(a + 4 * (j * R + r));
          BG_UNROLL for (int v = 0; v < V; ++v)
              product<BITS, kAtOnce>(sum[r][v][i / kAtOnce % kChains], code[v], x);
        }
        a += 4 * R * kAtOnce;
      }
    }

    BG_UNROLL for (int v = 0; v < V; ++v) {
      const F32 scale = mul_f(load_scales(at, w.scale_type, 16 * (half + v)), set_f(span->a_scale));
      BG_UNROLL for (int r = 0; r < R; ++r) {
        I32 whole = sum[r][v][0];
        if (kChains == 2) whole = add_i(whole, sum[r][v][kChains - 1]);
        if constexpr (kShifted) whole = add_i(whole, mul_i(shifted[v], set_i(kDotShift)));
        total[r][v] = SINGLE ? mul_f(to_float(whole), scale) : fma_f(to_float(whole), scale, total[r][v]);
      }
      if (!CONSTANT) {
        const uint8_t* zeros = at + zeros_at;
        F32 shift;
        if (w.zeros == Zeros::minima) {
          const F32 minimum = load_scales(zeros, w.scale_type, 16 * (half + v));
          shift = fma_f(set_f((float)w.zero), scale, mul_f(minimum, set_f(span->a_scale)));
        } else {
          const F32 zero = w.zeros == Zeros::codes ? to_float(load_u8_i(zeros + 16 * (half + v)))
                                                   : load_f((const float*)zeros + 16 * (half + v));
          shift = mul_f(zero, scale);
        }
        BG_UNROLL for (int r = 0; r < R; ++r) total[r][v] = fnma_f(shift, to_float(set_i(sums[r])), total[r][v]);
      }
    }
    at = end - half * kHalf;
    sums += R;
  }

  alignas(64) float sums_of_rows[R][16 * V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) store_f(sums_of_rows[r] + 16 * v, total[r][v]);
  finish_tile(job, panel * kPanel + 16 * half, row, R, V, sums_of_rows[0]);
}

template <int BITS, int R, bool SINGLE>
static void int_tile_halves(const IntPanelJob& job, int64_t panel, const uint8_t* a, const int32_t* sums, int64_t row,
                            int64_t ahead) {
  constexpr int V = SINGLE ? kSingleVectors : kGroupedVectors;
  for (int half = 0; half < 2; half += V) {
    if (job.w->zeros == Zeros::constant) int_tile<BITS, R, V, SINGLE, true>(job, panel, half, a, sums, row, ahead);
    else int_tile<BITS, R, V, SINGLE, false>(job, panel, half, a, sums, row, ahead);
  }
}

template <int BITS, bool SINGLE, int R = SINGLE ? kSingleRows : kGroupedRows>
BG_INLINE void int_tile_rows(int64_t rows, const IntPanelJob& job, int64_t panel, const uint8_t* a, const int32_t* sums,
                             int64_t row, int64_t ahead) {
  if (rows == R) return int_tile_halves<BITS, R, SINGLE>(job, panel, a, sums, row, ahead);
  if constexpr (R > 1) int_tile_rows<BITS, SINGLE, R - 1>(rows, job, panel, a, sums, row, ahead);
}

template <int BITS, bool SINGLE>
static void int_panels_of(const IntPanelJob& job, int64_t first, int64_t last) {
  const int64_t tile_bytes = job.rows * job.row_bytes, tile_sums = job.rows * job.w->spans;
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t tile = job.first_tile; tile < job.last_tile; ++tile) {
      int_tile_rows<BITS, SINGLE>(rows_of_tile(job.m, job.rows, tile), job, panel, job.bytes + tile * tile_bytes,
                                  job.sums + tile * tile_sums, tile * job.rows, tile == job.first_tile ? kAhead : 0);
    }
  }
}

static void quantize_tiles(const ActivationJob& job, int64_t first, int64_t last) {
  quantize_rows<false>(job, first, last);
}

static void int_panels(const IntPanelJob& job, int64_t first, int64_t last) {
  switch (job.w->bits) {
    case 8:
      return has_one_span(*job.w) ? int_panels_of<8, true>(job, first, last) : int_panels_of<8, false>(job, first, last);
    case 4: return int_panels_of<4, false>(job, first, last);
    case 3: return int_panels_of<3, false>(job, first, last);
    default: return int_panels_of<2, false>(job, first, last);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
