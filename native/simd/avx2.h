// The vector language of the kernels in AVX2: 16 lanes of 32 bits are two registers. BITGRAIN_AVX_VNNI: with dot
// products of bytes.
#include <immintrin.h>

#include "common.h"

#define BG_HAS_BF16_DOT 0

namespace bitgrain {
namespace BG_ISA {

struct I32 {
  __m256i lo, hi;
};
struct F32 {
  __m256 lo, hi;
};
struct F64 {  // sums of 16 lanes
  __m256d v[4];
};
using Bytes = I32;

#if BITGRAIN_AVX_VNNI  // 16 registers: the sums of 5 rows of 16 columns, the codes of one step, inputs and a mask
constexpr int kGroupedRows = 5, kGroupedVectors = 1;
constexpr int kSingleRows = 5, kSingleVectors = 1;
constexpr int kDotSteps = 1;
#else  // the sums of 4 rows, the codes of two steps, inputs and products
constexpr int kGroupedRows = 4, kGroupedVectors = 1;
constexpr int kSingleRows = 4, kSingleVectors = 1;
constexpr int kDotSteps = 2;
#endif
constexpr int kFloatRows = 4, kFloatVectors = 1;  // of products of floats

BG_INLINE __m256i load_half(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
BG_INLINE void store_half(void* p, __m256i x) { _mm256_storeu_si256((__m256i*)p, x); }
BG_INLINE __m128i load_16(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
BG_INLINE __m128i load_8(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }

BG_INLINE I32 set_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
BG_INLINE I32 zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
BG_INLINE I32 load_i(const void* p) { return {load_half(p), load_half((const uint8_t*)p + 32)}; }
BG_INLINE void store_i(void* p, I32 x) { store_half(p, x.lo), store_half((uint8_t*)p + 32, x.hi); }
BG_INLINE I32 add_i(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
BG_INLINE I32 mul_i(I32 a, I32 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
BG_INLINE I32 min_i(I32 a, I32 b) { return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)}; }
BG_INLINE I32 max_i(I32 a, I32 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
BG_INLINE int32_t sum_i(I32 x) {
  const __m256i eight = _mm256_add_epi32(x.lo, x.hi);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
BG_INLINE I32 load_u8_i(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(load_8(p)), _mm256_cvtepu8_epi32(load_8(p + 8))};
}
BG_INLINE I32 load_s8_i(const void* p) {
  return {_mm256_cvtepi8_epi32(load_8(p)), _mm256_cvtepi8_epi32(load_8((const uint8_t*)p + 8))};
}
BG_INLINE void store_low_bytes(void* p, I32 x) {
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(x.lo, low), _mm256_and_si256(x.hi, low));
  const __m256i bytes = _mm256_packus_epi16(words, words);  // lanes 0-3, 8-11, again, then 4-7, 12-15, again
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}

BG_INLINE F32 set_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
BG_INLINE F32 zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
BG_INLINE F32 load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
BG_INLINE void store_f(float* p, F32 x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
BG_INLINE F32 add_f(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
BG_INLINE F32 sub_f(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
BG_INLINE F32 mul_f(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
BG_INLINE F32 div_f(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
BG_INLINE F32 min_f(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
BG_INLINE F32 max_f(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
BG_INLINE F32 abs_f(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}
BG_INLINE F32 fma_f(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
BG_INLINE F32 fnma_f(F32 a, F32 b, F32 c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
BG_INLINE float max_of_f(F32 x) {
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
BG_INLINE float sum_f(F32 x) {
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
BG_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
BG_INLINE I32 round_to_int(F32 x) { return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)}; }
BG_INLINE F32 round_f(F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, kNearest), _mm256_round_ps(x.hi, kNearest)};
}
BG_INLINE F32 exponent_f(F32 x) {
  const __m256 bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  return {_mm256_and_ps(x.lo, bits), _mm256_and_ps(x.hi, bits)};
}
BG_INLINE F32 select_greater(F32 x, F32 y, F32 a, F32 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_GT_OQ))};
}
BG_INLINE bool any_greater(F32 x, F32 y) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.lo, y.lo, _CMP_GT_OQ),
                                         _mm256_cmp_ps(x.hi, y.hi, _CMP_GT_OQ))) != 0;
}
BG_INLINE __m256 scale_half(__m256 x, __m256 n) {  // by two powers of two, neither of which overflows
  const __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1);
  const __m256i second = _mm256_sub_epi32(whole, first), bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, a), b);
}
BG_INLINE F32 scale_f(F32 x, F32 n) { return {scale_half(x.lo, n.lo), scale_half(x.hi, n.hi)}; }
BG_INLINE __m256 sums_half(const F32* x) {  // of eight registers
  __m256 whole[8], pairs[4];
  BG_UNROLL for (int i = 0; i < 8; ++i) whole[i] = _mm256_add_ps(x[i].lo, x[i].hi);
  BG_UNROLL for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps(whole[2 * i], whole[2 * i + 1]);
  const __m256 a = _mm256_hadd_ps(pairs[0], pairs[1]), b = _mm256_hadd_ps(pairs[2], pairs[3]);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
BG_INLINE F32 sums_f(const F32* x) { return {sums_half(x), sums_half(x + 8)}; }
BG_INLINE F32 load_f16(const void* p) {
  return {_mm256_cvtph_ps(load_16(p)), _mm256_cvtph_ps(load_16((const uint8_t*)p + 16))};
}
BG_INLINE F32 load_bf16(const void* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(load_16(p)), hi = _mm256_cvtepu16_epi32(load_16((const uint8_t*)p + 16));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
BG_INLINE void store_f16(void* p, F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.lo, kNearest));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.hi, kNearest));
}
BG_INLINE __m256i bf16_half(__m256 x) {  // in the low 16 bits of each lane
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}
BG_INLINE void store_bf16(void* p, F32 x) {  // to nearest, ties to even; NaN stays NaN
  store_half(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_half(x.lo), bf16_half(x.hi)), 0xd8));
}

BG_INLINE F64 zero_d() {
  const __m256d zero = _mm256_setzero_pd();
  return {{zero, zero, zero, zero}};
}
BG_INLINE F64 add_d(F64 a, F32 b) {
  a.v[0] = _mm256_add_pd(a.v[0], _mm256_cvtps_pd(_mm256_castps256_ps128(b.lo)));
  a.v[1] = _mm256_add_pd(a.v[1], _mm256_cvtps_pd(_mm256_extractf128_ps(b.lo, 1)));
  a.v[2] = _mm256_add_pd(a.v[2], _mm256_cvtps_pd(_mm256_castps256_ps128(b.hi)));
  a.v[3] = _mm256_add_pd(a.v[3], _mm256_cvtps_pd(_mm256_extractf128_ps(b.hi, 1)));
  return a;
}
BG_INLINE double sum_d(F64 x) {  // halves onto each other, at every level
  const __m256d four = _mm256_add_pd(_mm256_add_pd(x.v[0], x.v[2]), _mm256_add_pd(x.v[1], x.v[3]));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

BG_INLINE Bytes load_b(const uint8_t* p) { return load_i(p); }
BG_INLINE Bytes repeat4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return set_i(word);
}
BG_INLINE Bytes and_b(Bytes x, uint8_t mask) {
  const __m256i bits = _mm256_set1_epi8((char)mask);
  return {_mm256_and_si256(x.lo, bits), _mm256_and_si256(x.hi, bits)};
}
BG_INLINE Bytes or_b(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int COUNT>
BG_INLINE Bytes shift_right_b(Bytes x) {  // bits of a neighbour come in from above: mask afterwards
  return {_mm256_srli_epi16(x.lo, COUNT), _mm256_srli_epi16(x.hi, COUNT)};
}
template <int COUNT>
BG_INLINE Bytes shift_left_b(Bytes x) {
  return {_mm256_slli_epi16(x.lo, COUNT), _mm256_slli_epi16(x.hi, COUNT)};
}

#if BITGRAIN_AVX_VNNI
BG_INLINE void dot4_half(__m256i& sum, __m256i u, __m256i s) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(s));
}
template <int STEPS>
BG_INLINE void dot4_small(I32& sum, const Bytes* u, const Bytes* s) {
  BG_UNROLL for (int i = 0; i < STEPS; ++i) dot4_half(sum.lo, u[i].lo, s[i].lo), dot4_half(sum.hi, u[i].hi, s[i].hi);
}
#else
// vpmaddubsw saturates: bytes of even and odd places are widened apart
BG_INLINE void dot4_half(__m256i& sum, __m256i u, __m256i s) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
// but not where u is small, and then even sums of several steps fit 16 bits
template <int STEPS>
BG_INLINE void dot4_small(I32& sum, const Bytes* u, const Bytes* s) {
  static_assert(STEPS <= 8, "8 x 2 x 15 x 128 < 2^15");
  __m256i lo = _mm256_maddubs_epi16(u[0].lo, s[0].lo), hi = _mm256_maddubs_epi16(u[0].hi, s[0].hi);
  BG_UNROLL for (int i = 1; i < STEPS; ++i) {
    lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(u[i].lo, s[i].lo));
    hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(u[i].hi, s[i].hi));
  }
  const __m256i ones = _mm256_set1_epi16(1);
  sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(lo, ones));
  sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(hi, ones));
}
#endif
BG_INLINE void dot4(I32& sum, Bytes u, Bytes s) { dot4_half(sum.lo, u.lo, s.lo), dot4_half(sum.hi, u.hi, s.hi); }
constexpr int kDotShift = 0;
BG_INLINE void dot4_shifted(I32& sum, Bytes u, Bytes s) { dot4(sum, u, s); }
BG_INLINE void sum4(I32& sum, Bytes s) { dot4(sum, set_i(0x01010101), s); }

BG_INLINE I32 and_i(I32 a, I32 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
BG_INLINE I32 or_i(I32 a, I32 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int COUNT>
BG_INLINE I32 shift_left_i(I32 x) {
  return {_mm256_slli_epi32(x.lo, COUNT), _mm256_slli_epi32(x.hi, COUNT)};
}
template <int COUNT>
BG_INLINE I32 shift_right_i(I32 x) {
  return {_mm256_srli_epi32(x.lo, COUNT), _mm256_srli_epi32(x.hi, COUNT)};
}
template <int COUNT>
BG_INLINE I32 shift_right_signed_i(I32 x) {
  return {_mm256_srai_epi32(x.lo, COUNT), _mm256_srai_epi32(x.hi, COUNT)};
}
BG_INLINE I32 as_lanes(Bytes x) { return x; }
BG_INLINE F32 as_float(I32 bits) { return {_mm256_castsi256_ps(bits.lo), _mm256_castsi256_ps(bits.hi)}; }
BG_INLINE I32 as_int(F32 x) { return {_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi)}; }

struct Table {  // 16 floats
  __m256 low, high;
};
BG_INLINE Table load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
BG_INLINE __m256 look_up_half(const Table& table, __m256i code) {  // bit 3, moved to the sign, chooses the half
  const __m256 low = _mm256_permutevar8x32_ps(table.low, code), high = _mm256_permutevar8x32_ps(table.high, code);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
}
BG_INLINE F32 look_up(const Table& table, I32 code) {
  return {look_up_half(table, code.lo), look_up_half(table, code.hi)};
}

BG_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace BG_ISA
}  // namespace bitgrain
