// Rows of floats to tiles of pairs, see linear/code_linear.h.
namespace bitgrain {
namespace BG_ISA {

template <DType T>
static void arrange_row(const InputJob& job, const void* x, uint8_t* tile, float* sums, int64_t r, int64_t rows) {
  const CodeWeights& w = *job.w;
  constexpr size_t kPair = 2 * kInputBytes;
  for (int64_t s = 0; s < w.spans; ++s) {
    const int64_t count = features_of(w, s), pairs = chunks_of(w, s) * chunk_features(w.bits) / 2;
    F32 sum = zero_f();
    for (int64_t p = 0; p < pairs; p += 8) {
      const int64_t left = count - 2 * p;
      F32 v = left > 0 ? load_elements<T>(x, s * w.group + 2 * p, left < 16 ? left : 16) : zero_f();
      alignas(64) uint8_t some[8 * kPair];
      if constexpr (kInputBytes == 2) {
        store_bf16(some, v);
        v = load_bf16(some);
      } else {
        store_f((float*)some, v);
      }
      sum = add_f(sum, v);
      const int64_t now = pairs - p < 8 ? pairs - p : 8;
      uint8_t* to = tile + (p * rows + r) * (int64_t)kPair;
      if (rows == 1 && now == 8) {
        std::memcpy(to, some, 8 * kPair);
      } else {
        for (int64_t i = 0; i < now; ++i) std::memcpy(to + i * rows * (int64_t)kPair, some + i * kPair, kPair);
      }
    }
    tile += pairs * rows * (int64_t)kPair;
    if (sums) sums[s * rows + r] = sum_f(sum);
  }
}

static void arrange_inputs(const InputJob& job, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const int64_t rows = rows_of_tile(job.m, job.rows, t);
    uint8_t* tile = job.tiles + t * job.rows * job.w->steps * 2 * kInputBytes;
    float* sums = job.sums ? job.sums + t * job.rows * job.w->spans : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const void* x = (const uint8_t*)job.x + (t * job.rows + r) * job.stride * (int64_t)size_of(job.type);
      if (job.source) {
        job.source->make(job.source->context, t * job.rows + r, job.row);
        arrange_row<DType::f32>(job, job.row, tile, sums, r, rows);
      } else if (job.type == DType::f32) arrange_row<DType::f32>(job, x, tile, sums, r, rows);
      else if (job.type == DType::bf16) arrange_row<DType::bf16>(job, x, tile, sums, r, rows);
      else arrange_row<DType::f16>(job, x, tile, sums, r, rows);
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
