// GPTQ's loop over columns, see solver/descend.h.
namespace bitgrain {
namespace BG_ISA {

constexpr int64_t kSumLanes = 16 * kFloatVectors;

// Columns [first, first + R) of kSumLanes lanes at w: minus what the errors of columns [from, to) come to. What the
// last chunk comes to goes to `sums` [R, kSumLanes], everything else is subtracted in memory. A function for each R,
// and nothing else: what is around it is compiled once.
template <int R>
static __attribute__((noinline)) void subtract_errors(const DescendJob& job, float* w, int64_t first, int64_t from,
                                                      int64_t to, float* sums) {
  constexpr int V = kFloatVectors;
  const float* factor = job.factor + first * job.columns;
  F32 sum[R][V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = zero_f();
  while (from < to) {
    const int64_t stop = from + kDescendChunk < to ? from + kDescendChunk : to;
    for (int64_t k = from; k < stop; ++k) {
      F32 e[V];
      BG_UNROLL for (int v = 0; v < V; ++v) e[v] = load_f(w + k * kLanePanel + 16 * v);
      BG_UNROLL for (int r = 0; r < R; ++r) {
        const F32 f = set_f(factor[r * job.columns + k]);
        BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = fma_f(f, e[v], sum[r][v]);
      }
    }
    from = stop;
    if (from == to) break;
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) {
      float* x = w + (first + r) * kLanePanel + 16 * v;
      store_f(x, sub_f(load_f(x), sum[r][v]));
      sum[r][v] = zero_f();
    }
  }
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) {
    store_f(sums + r * kSumLanes + 16 * v, sum[r][v]);
  }
}

template <int R = kFloatRows>
static void subtract_errors_rows(int64_t rows, const DescendJob& job, float* w, int64_t first, int64_t from, int64_t to,
                                 float* sums) {
  if (rows == R) return subtract_errors<R>(job, w, first, from, to, sums);
  if constexpr (R > 1) subtract_errors_rows<R - 1>(rows, job, w, first, from, to, sums);
}

// One column's 16 weights to numbers; gives their errors.
BG_INLINE F32 round_lanes(const DescendJob& job, int64_t column, int64_t lane, F32 x) {
  const int64_t left = job.lanes - lane, count = left < 16 ? left < 0 ? 0 : left : 16;
  const int64_t at = column * job.lanes + lane, table = job.tiles[column] * job.lanes + lane;
  if (job.exact) store_elements(job.exact, DType::f32, at, count, x);
  F32 scaled = div_f(x, load_elements<DType::f32>(job.divisor, table, count)), zero = zero_f();
  if (job.zero) {
    zero = load_elements<DType::f32>(job.zero, table, count);
    scaled = add_f(scaled, zero);
  }
  const F32 number = round_to_grid(job.grid, scaled);
  store_elements(job.numbers, DType::f32, at, count, number);
  const F32 scale = load_elements<DType::f32>(job.scale, table, count);
  const F32 value = mul_f(job.zero ? sub_f(number, zero) : number, scale);
  F32 e = div_f(sub_f(x, value), set_f(job.factor[column * job.columns + column]));
  if (job.kept) {
    alignas(16) uint8_t kept[16] = {};
    std::memcpy(kept, job.kept + at, (size_t)count);
    e = select_greater(to_float(load_u8_i(kept)), zero_f(), zero_f(), e);
  }
  alignas(64) float square[16];
  store_f(square, mul_f(e, e));
  for (int64_t i = 0; i < count; ++i) job.loss[lane + i] += (double)square[i];
  return e;
}

// Columns [first, first + rows) of one panel.
template <bool ROUND>
static void descend_rows(int64_t rows, const DescendJob& job, int64_t panel, int64_t first, int64_t from, int64_t to) {
  alignas(64) float sums[kFloatRows * kSumLanes];
  for (int64_t part = 0; part < kLanePanel; part += kSumLanes) {
    float* w = job.panels + panel * job.columns * kLanePanel + part;
    subtract_errors_rows(rows, job, w, first, from, to, sums);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < kSumLanes; v += 16) {
        float* x = w + (first + r) * kLanePanel + v;
        const int64_t lane = panel * kLanePanel + part + v;
        const F32 now = sub_f(load_f(x), load_f(sums + r * kSumLanes + v));
        if constexpr (!ROUND) {
          store_f(x, now);
          const int64_t left = job.lanes - lane, count = left < 16 ? left < 0 ? 0 : left : 16;
          store_elements(job.numbers, DType::f32, (first + r) * job.lanes + lane, count, now);
        } else {
          const F32 e = round_lanes(job, first + r, lane, now);
          store_f(x, e);
          for (int64_t later = r + 1; later < rows; ++later) {
            float* sum = sums + later * kSumLanes + v;
            store_f(sum, fma_f(set_f(job.factor[(first + later) * job.columns + first + r]), e, load_f(sum)));
          }
        }
      }
    }
  }
}

static void update_columns(const DescendJob& job, int64_t first, int64_t last, int64_t first_panel,
                           int64_t last_panel) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    for (int64_t i = first; i < last; i += kFloatRows) {
      descend_rows<false>(last - i < kFloatRows ? last - i : kFloatRows, job, panel, i, 0, first);
    }
  }
}

static void round_columns(const DescendJob& job, int64_t first, int64_t last, int64_t seen, int64_t first_panel,
                          int64_t last_panel) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    for (int64_t i = first; i < last; i += kFloatRows) {
      descend_rows<true>(last - i < kFloatRows ? last - i : kFloatRows, job, panel, i, seen, i);
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
