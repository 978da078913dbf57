// Rows of floats to tiles of pairs, see linear/code_linear.h.
namespace bitgrain {
namespace BG_ISA {

// The scale of elements [at, at + count) of a row; NaN, or what is not finite, makes it NaN.
template <DType T>
BG_INLINE float find_scale(const InputRounding& to, const void* x, int64_t at, int64_t count, float* step) {
  F32 most = zero_f(), bad = zero_f();
  for (int64_t i = 0; i < count; i += 16) {
    const F32 v = load_elements<T>(x, at + i, count - i < 16 ? count - i : 16);
    most = max_f(abs_f(v), most);
    bad = add_f(bad, sub_f(v, v));
  }
  *step = input_scale(to, max_of_f(most));
  return *step + sum_f(bad);
}

// MATRIX: for the matrix unit, where `rows` is 16 in each tile.
template <DType T, bool MATRIX>
static void arrange_row(const InputJob& job, const void* x, uint8_t* tile, float* sums, float* scales, int64_t r,
                        int64_t rows) {
  const CodeWeights& w = *job.w;
  constexpr size_t kPair = 2 * kInputBytes;
  float step = 1.f;  // of rounded inputs
  if (scales && !w.inputs.groups) scales[r] = find_scale<T>(w.inputs, x, 0, w.k, &step);
  for (int64_t s = 0; s < w.spans; ++s) {
    const int64_t count = features_of(w, s);
    const int64_t pairs = MATRIX ? matrix_steps(w, s) * 16 : chunks_of(w, s) * chunk_features(w.bits) / 2;
    F32 sum = zero_f();
    if (w.inputs.groups) scales[s * rows + r] = find_scale<T>(w.inputs, x, s * w.group, count, &step);
    for (int64_t p = 0; p < pairs; p += 8) {
      const int64_t left = count - 2 * p;
      F32 v = left > 0 ? load_elements<T>(x, s * w.group + 2 * p, left < 16 ? left : 16) : zero_f();
      if (scales) v = round_to_format(w.inputs, div_f(v, set_f(step)));
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
      if constexpr (MATRIX) {
        std::memcpy(tile + (p / 16 * kMatrixTile + r) * kMatrixBytes + p % 16 * (int64_t)kPair, some, 8 * kPair);
      } else if (rows == 1 && now == 8) {
        std::memcpy(to, some, 8 * kPair);
      } else {
        for (int64_t i = 0; i < now; ++i) std::memcpy(to + i * rows * (int64_t)kPair, some + i * kPair, kPair);
      }
    }
    tile += pairs * rows * (int64_t)kPair;
    if (sums) sums[s * rows + r] = sum_f(sum) * (w.inputs.groups ? step : 1.f);
  }
}

template <bool MATRIX>
static void arrange_rows(const InputJob& job, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; ++t) {
    const int64_t rows = rows_of_tile(job.m, job.rows, t), apart = MATRIX ? kMatrixTile : rows;
    uint8_t* tile = job.tiles + t * job.rows * job.row_bytes;
    float* sums = job.sums ? job.sums + t * job.rows * job.w->spans : nullptr;
    float* scales = job.scales ? job.scales + t * job.rows * scales_of_row(*job.w) : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const void* x = (const uint8_t*)job.x + (t * job.rows + r) * job.stride * (int64_t)size_of(job.type);
      if (job.source) {
        job.source->make(job.source->context, t * job.rows + r, job.row);
        arrange_row<DType::f32, MATRIX>(job, job.row, tile, sums, scales, r, apart);
      } else if (job.type == DType::f32) arrange_row<DType::f32, MATRIX>(job, x, tile, sums, scales, r, apart);
      else if (job.type == DType::bf16) arrange_row<DType::bf16, MATRIX>(job, x, tile, sums, scales, r, apart);
      else arrange_row<DType::f16, MATRIX>(job, x, tile, sums, scales, r, apart);
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
