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

// Rows of a register tile. 32 registers hold 2 columns of 6 rows twice (integer and float sums), or of 12 rows once.
constexpr int kGroupedRows = 6, kGroupedVectors = 2;
constexpr int kSingleRows = 12, kSingleVectors = 2;

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
BG_INLINE F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
BG_INLINE I32 round_to_int(F32 x) { return _mm512_cvtps_epi32(x); }
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
BG_INLINE Bytes and_or(Bytes x, Bytes mask, Bytes other) { return _mm512_ternarylogic_epi32(x, mask, other, 0xea); }
BG_INLINE void dot2(F32& sum, Bytes a, Bytes b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#endif

BG_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace BG_ISA
}  // namespace bitgrain
