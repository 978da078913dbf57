// Errors of tiles under a scale and zero point, see solver/tile_search.h.
namespace bitgrain {
namespace BG_ISA {

struct TileSums {
  F64 error, wv, wvv, wxv;
};

// 16 numbers and their weights.
template <bool PRODUCTS>
BG_INLINE void add_tile_terms(const Grid& grid, F32 x, F32 w, F32 divisor, F32 scale, F32 zero, TileSums& sums) {
  const F32 v = round_to_grid(grid, add_f(div_f(x, divisor), zero));
  if constexpr (PRODUCTS) {
    const F32 wv = mul_f(w, v);
    sums.wv = add_d(sums.wv, wv);
    sums.wvv = add_d(sums.wvv, mul_f(wv, v));
    sums.wxv = add_d(sums.wxv, mul_f(wv, x));
  }
  const F32 e = sub_f(mul_f(sub_f(v, zero), scale), x);
  sums.error = add_d(sums.error, mul_f(mul_f(e, e), w));
}

template <bool PRODUCTS>
BG_INLINE void sum_tile(const TileJob& job, int64_t tile, int64_t candidate, TileSums& sums) {
  const int64_t at = candidate * job.tiles + tile;
  const F32 scale = set_f(job.scale[at]), divisor = set_f(job.scale[at] == 0 ? 1.f : job.scale[at]);
  const F32 zero = set_f(job.zero ? job.zero[at] : 0.f), one = set_f(1.f);
  const Grid& grid = job.grid;
  sums.error = sums.wv = sums.wvv = sums.wxv = zero_d();
  const float *x = job.x + tile * job.n, *w = job.weights ? job.weights + tile * job.n : nullptr;
  int64_t i = 0;
  for (; i + 16 <= job.n; i += 16) {
    add_tile_terms<PRODUCTS>(grid, load_f(x + i), w ? load_f(w + i) : one, divisor, scale, zero, sums);
  }
  if (i < job.n) {  // what lies behind the tile has no weight
    const int64_t count = job.n - i;
    alignas(64) float weights[16] = {};
    for (int64_t j = 0; j < count; ++j) weights[j] = w ? w[i + j] : 1.f;
    add_tile_terms<PRODUCTS>(grid, load_elements<DType::f32>(x, i, count), load_f(weights), divisor, scale, zero, sums);
  }
}

static void tile_sums(const TileJob& job, int64_t first, int64_t last) {
  TileSums sums;
  for (int64_t tile = first; tile < last; ++tile) {
    if (job.wvv) {
      sum_tile<true>(job, tile, 0, sums);
      job.wv[tile] = sum_d(sums.wv), job.wvv[tile] = sum_d(sums.wvv), job.wxv[tile] = sum_d(sums.wxv);
    } else {
      sum_tile<false>(job, tile, 0, sums);
    }
    job.error[tile] = sum_d(sums.error);
  }
}

static void best_candidates(const TileJob& job, int64_t first, int64_t last) {
  TileSums sums;
  for (int64_t tile = first; tile < last; ++tile) {
    job.best[tile] = -1;
    for (int64_t c = 0; c < job.candidates; ++c) {
      sum_tile<false>(job, tile, c, sums);
      const double error = sum_d(sums.error);
      if (error < job.error[tile]) job.error[tile] = error, job.best[tile] = (int32_t)c;
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
