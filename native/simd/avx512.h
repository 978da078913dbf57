// The vector language of the kernels in AVX-512: 16 lanes of 32 bits.
//
// Every instruction set defines the same names (simd/portable.h is the reference and says what each means), so that a
// kernel is written once. Included by one translation unit for each level, inside its namespace.
#include <immintrin.h>

#include "common.h"

#define BG_HAS_BF16_DOT BITGRAIN_AVX512_BF16

namespace bitgrain {
namespace BG_ISA {

using I32 = __m512i;
using F32 = __m512;
using Bytes = __m512i;
struct F64 {
  __m512d low, high;
};

// Rows of a register tile. 32 registers hold 2 columns of 6 rows twice (integer and float sums), or of 12 rows once.
constexpr int kGroupedRows = 6, kGroupedVectors = 2;
constexpr int kSingleRows = 12, kSingleVectors = 2;
constexpr int kDotSteps = 1;
constexpr int kFloatRows = 8, kFloatVectors = 3;  // of products of floats

BG_INLINE I32 zero_i() { return _mm512_setzero_si512(); }
BG_INLINE I32 set_i(int32_t x) { return _mm512_set1_epi32(x); }
BG_INLINE I32 load_i(const void* p) { return _mm512_loadu_si512(p); }
BG_INLINE void store_i(void* p, I32 x) { _mm512_storeu_si512(p, x); }
BG_INLINE I32 add_i(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
BG_INLINE I32 mul_i(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
BG_INLINE I32 min_i(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
BG_INLINE I32 max_i(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
BG_INLINE int32_t sum_i(I32 x) { return _mm512_reduce_add_epi32(x); }
BG_INLINE I32 load_u8_i(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
BG_INLINE I32 load_s8_i(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
BG_INLINE void store_low_bytes(void* p, I32 x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }

BG_INLINE F32 zero_f() { return _mm512_setzero_ps(); }
BG_INLINE F32 set_f(float x) { return _mm512_set1_ps(x); }
BG_INLINE F32 load_f(const float* p) { return _mm512_loadu_ps(p); }
BG_INLINE void store_f(float* p, F32 x) { _mm512_storeu_ps(p, x); }
BG_INLINE F32 add_f(F32 a, F32 b) { return _mm512_add_ps(a, b); }
BG_INLINE F32 sub_f(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
BG_INLINE F32 mul_f(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
BG_INLINE F32 div_f(F32 a, F32 b) { return _mm512_div_ps(a, b); }
BG_INLINE F32 min_f(F32 a, F32 b) { return _mm512_min_ps(a, b); }
BG_INLINE F32 max_f(F32 a, F32 b) { return _mm512_max_ps(a, b); }
BG_INLINE F32 abs_f(F32 x) { return _mm512_abs_ps(x); }
BG_INLINE F32 fma_f(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
BG_INLINE F32 fnma_f(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }
BG_INLINE float max_of_f(F32 x) { return _mm512_reduce_max_ps(x); }
BG_INLINE float sum_f(F32 x) { return _mm512_reduce_add_ps(x); }
BG_INLINE F32 scale_f(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
BG_INLINE F32 sums_f(const F32* x) {  // lane i: the sum of the lanes of x[i]
  F32 pairs[8], fours[4], eights[2];
  BG_UNROLL for (int i = 0; i < 8; ++i) {
    pairs[i] = add_f(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  BG_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = add_f(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  BG_UNROLL for (int i = 0; i < 2; ++i) {
    const F32 a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = add_f(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return add_f(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}
BG_INLINE F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
BG_INLINE I32 round_to_int(F32 x) { return _mm512_cvtps_epi32(x); }
BG_INLINE F32 round_f(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BG_INLINE F32 exponent_f(F32 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000)));
}
BG_INLINE F32 select_greater(F32 x, F32 y, F32 a, F32 b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), a);
}
BG_INLINE bool any_greater(F32 x, F32 y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ) != 0; }
BG_INLINE F32 load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
BG_INLINE F32 load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
BG_INLINE void store_f16(void* p, F32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
BG_INLINE void store_bf16(void* p, F32 x) {  // to nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
}

BG_INLINE F64 zero_d() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
BG_INLINE F64 add_d(F64 a, F32 b) {
  return {_mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(b))),
          _mm512_add_pd(a.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)))};
}
BG_INLINE double sum_d(F64 x) {
  const __m512d eight = _mm512_add_pd(x.low, x.high);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

BG_INLINE Bytes load_b(const uint8_t* p) {
  Bytes x = _mm512_loadu_si512(p);
  asm("" : "+v"(x));  // gcc 12 would load the line again for each use of it
  return x;
}
BG_INLINE Bytes repeat4(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
BG_INLINE Bytes and_b(Bytes x, uint8_t mask) { return _mm512_and_si512(x, _mm512_set1_epi8((char)mask)); }
BG_INLINE Bytes sub_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
BG_INLINE Bytes or_b(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
template <int COUNT>
BG_INLINE Bytes shift_right_b(Bytes x) {  // bits of a neighbour come in from above: mask afterwards
  return _mm512_srli_epi16(x, COUNT);
}
template <int COUNT>
BG_INLINE Bytes shift_left_b(Bytes x) {
  return _mm512_slli_epi16(x, COUNT);
}
// asm: gcc 12 copies unrolled accumulators around the intrinsic, which halves the speed
BG_INLINE void dot4(I32& sum, Bytes u, Bytes s) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s)); }
constexpr int kDotShift = 0;
BG_INLINE void dot4_shifted(I32& sum, Bytes u, Bytes s) { dot4(sum, u, s); }
BG_INLINE void sum4(I32& sum, Bytes s) { dot4(sum, _mm512_set1_epi8(1), s); }
template <int STEPS>
BG_INLINE void dot4_small(I32& sum, const Bytes* u, const Bytes* s) {
  BG_UNROLL for (int i = 0; i < STEPS; ++i) dot4(sum, u[i], s[i]);
}

BG_INLINE I32 and_i(I32 a, I32 b) { return _mm512_and_si512(a, b); }
BG_INLINE I32 or_i(I32 a, I32 b) { return _mm512_or_si512(a, b); }
template <int COUNT>
BG_INLINE I32 shift_left_i(I32 x) {
  return _mm512_slli_epi32(x, COUNT);
}
template <int COUNT>
BG_INLINE I32 shift_right_i(I32 x) {
  return _mm512_srli_epi32(x, COUNT);
}
template <int COUNT>
BG_INLINE I32 shift_right_signed_i(I32 x) {
  return _mm512_srai_epi32(x, COUNT);
}
BG_INLINE I32 as_lanes(Bytes x) { return x; }
BG_INLINE F32 as_float(I32 bits) { return _mm512_castsi512_ps(bits); }
BG_INLINE I32 as_int(F32 x) { return _mm512_castps_si512(x); }

using Table = __m512;
BG_INLINE Table load_table(const float* p) { return _mm512_loadu_ps(p); }
BG_INLINE F32 look_up(Table table, I32 code) { return _mm512_permutexvar_ps(code, table); }

#if BG_HAS_BF16_DOT
BG_INLINE Bytes look_up_words(Bytes table, Bytes code) { return _mm512_permutexvar_epi16(code, table); }
template <int COUNT>
BG_INLINE Bytes shift_right_w(Bytes x) {
  return _mm512_srli_epi16(x, COUNT);
}
template <int COUNT>
BG_INLINE Bytes shift_left_w(Bytes x) {
  return _mm512_slli_epi16(x, COUNT);
}
BG_INLINE Bytes look_up_bytes(Bytes a, Bytes b, Bytes code) { return _mm512_permutex2var_epi8(a, code, b); }
BG_INLINE Bytes and_or(Bytes x, Bytes mask, Bytes other) { return _mm512_ternarylogic_epi32(x, mask, other, 0xea); }
BG_INLINE void dot2(F32& sum, Bytes a, Bytes b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#endif


BG_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace BG_ISA
}  // namespace bitgrain
