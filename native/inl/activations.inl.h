// Rows of floats to tiles of bytes, see linear/activations.h.
namespace bitgrain {
namespace BG_ISA {

// MATRIX: for the matrix unit, where `rows` is 16 in each tile.
template <DType T, bool MATRIX>
static void quantize_row(const ActivationJob& job, const void* x, uint8_t* bytes, int32_t* sums, int64_t r, int64_t rows,
                         float* scale) {
  const IntWeights& w = *job.w;
  F32 largest = zero_f(), bad = zero_f();
  for (int64_t k = 0; k < w.k; k += 16) {
    const F32 v = load_elements<T>(x, k, w.k - k < 16 ? w.k - k : 16);
    largest = max_f(abs_f(v), largest);
    bad = add_f(bad, sub_f(v, v));  // NaN as soon as one is NaN or Inf
  }
  float step = 1.f;
  if (!job.spec.fixed) {
    const float most = max_of_f(largest);
    step = most > 0.f ? most / job.spec.divisor : 1.f;
  }
  *scale = (job.spec.fixed ? 1.f : step) + sum_f(bad);

  const F32 low = set_f((float)job.spec.low), high = set_f((float)job.spec.high);
  for (int32_t s = 0; s < w.spans; ++s) {
    const Span& span = w.span[s];
    const int32_t zero = span.a_zero - job.spec.shift;
    const float divisor = job.spec.fixed ? span.a_scale : step;
    const F32 by = set_f(divisor), offset = set_f((float)zero);
    const I32 minus_zero = set_i(-zero), shift = set_i(job.spec.shift);
    // a product with the inverse, which is sooner there, rounds to the same code unless it is next to a tie: it is off
    // by at most 2**-22 of itself, and numbers past 511 are clipped either way
    const bool inverts = divisor > 1e-30f && divisor < 1e30f;
    const F32 inverse = set_f(inverts ? 1.f / divisor : 0.f), tie = set_f(inverts ? 0.4998f : -1.f);
    const int64_t features = span.chunks * chunk_features(w.bits);
    uint8_t* to = bytes + (MATRIX ? r * kMatrixBytes : ((int64_t)span.step * rows + r) * 4);
    I32 sum = zero_i();
    int64_t f = 0;
    for (; f < span.count; f += 16) {
      const int64_t count = span.count - f < 16 ? span.count - f : 16;
      const F32 element = load_elements<T>(x, span.first + f, count);
      F32 v = add_f(mul_f(element, inverse), offset);
      if (any_greater(abs_f(sub_f(v, round_f(v))), tie)) v = add_f(div_f(element, by), offset);
      const I32 code = round_to_int(min_f(max_f(v, low), high));
      sum = add_i(sum, add_i(code, minus_zero));
      alignas(16) uint8_t four[16];
      store_low_bytes(four, add_i(code, shift));
      const int64_t words = count < 16 ? ceil_div(count, 4) : 4;
      if constexpr (MATRIX) {
        if (count < 16) std::memset(four + count, 0, 16 - count);
        std::memcpy(to + f / kMatrixBytes * kMatrixTile * kMatrixBytes + f % kMatrixBytes, four, 16);
      } else if (rows == 1 && words == 4) {
        std::memcpy(to + f, four, 16);
      } else {
        for (int64_t i = 0; i < words; ++i) std::memcpy(to + (f / 4 + i) * rows * 4, four + 4 * i, 4);
      }
    }
    if constexpr (MATRIX) {
      const int64_t padded = matrix_steps(features) * kMatrixBytes;
      for (; f < padded; f += 16) {
        std::memset(to + f / kMatrixBytes * kMatrixTile * kMatrixBytes + f % kMatrixBytes, 0, 16);
      }
      bytes += kMatrixTile * padded;
    } else {
      const uint32_t padding = (uint32_t)(uint8_t)span.a_zero * 0x01010101u;
      for (int64_t i = ceil_div(span.count, 4); i < features / 4; ++i) std::memcpy(to + i * rows * 4, &padding, 4);
    }
    sums[s * rows + r] = sum_i(sum) * job.sum_factor;
  }
}

template <bool MATRIX>
static void quantize_rows(const ActivationJob& job, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t rows = rows_of_tile(job.m, job.rows, tile), apart = MATRIX ? kMatrixTile : rows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = tile * job.rows + r;
      uint8_t* bytes = job.bytes + tile * job.rows * job.row_bytes;
      int32_t* sums = job.sums + tile * job.rows * job.w->spans;
      float* scale = job.scales + row;
      if (job.source) {
        job.source->make(job.source->context, row, job.row);
        quantize_row<DType::f32, MATRIX>(job, job.row, bytes, sums, r, apart, scale);
        continue;
      }
      const void* x = (const uint8_t*)job.x + row * job.stride * (int64_t)size_of(job.type);
      if (job.type == DType::f32) quantize_row<DType::f32, MATRIX>(job, x, bytes, sums, r, apart, scale);
      else if (job.type == DType::bf16) quantize_row<DType::bf16, MATRIX>(job, x, bytes, sums, r, apart, scale);
      else quantize_row<DType::f16, MATRIX>(job, x, bytes, sums, r, apart, scale);
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
