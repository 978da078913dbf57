// The vector language of the kernels in plain C++: what each name means, and what runs where no other level fits.
//
// 16 lanes of 32 bits. Bytes is the same register seen as 64 bytes: lane i holds bytes 4i .. 4i + 3. Vectors are the
// compiler's own, which it has for any machine (in as many registers as it takes), and is done with in a third of the
// time of loops over arrays. What has to be a loop is a function, or there would be a copy of it for every use.
#include <cmath>

#include "common.h"
#include "floats.h"

#define BG_HAS_BF16_DOT 0

namespace bitgrain {
namespace BG_ISA {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));  // whose sums may wrap
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint8_t Octets __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(128)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

struct I32 {
  Ints v;
};
struct F32 {
  Floats v;
};
struct F64 {  // sums of 16 lanes
  Doubles v;
};
struct Bytes {
  Octets v;
};

constexpr int kGroupedRows = 2, kGroupedVectors = 1;
constexpr int kSingleRows = 2, kSingleVectors = 1;
constexpr int kDotSteps = 1;  // that dot4_small should get at once
constexpr int kFloatRows = 2, kFloatVectors = 1;  // of products of floats

#define BG_LANES for (int i = 0; i < 16; ++i)
#define BG_LEAF static __attribute__((noinline, unused))

BG_INLINE I32 set_i(int32_t x) { return {Ints{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}}; }
BG_INLINE I32 zero_i() { return set_i(0); }
BG_INLINE I32 load_i(const void* p) {
  I32 r;
  std::memcpy(&r, p, 64);
  return r;
}
BG_INLINE void store_i(void* p, I32 x) { std::memcpy(p, &x, 64); }
BG_INLINE I32 add_i(I32 a, I32 b) { return {(Ints)((Words)a.v + (Words)b.v)}; }
BG_INLINE I32 mul_i(I32 a, I32 b) { return {(Ints)((Words)a.v * (Words)b.v)}; }  // the low 32 bits
BG_INLINE I32 min_i(I32 a, I32 b) { return {a.v < b.v ? a.v : b.v}; }
BG_INLINE I32 max_i(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }
BG_LEAF int32_t sum_i(I32 x) {
  uint32_t s = 0;
  BG_LANES s += (uint32_t)x.v[i];
  return (int32_t)s;
}
BG_LEAF I32 load_u8_i(const uint8_t* p) {  // 16 bytes, one for each lane
  I32 r;
  BG_LANES r.v[i] = p[i];
  return r;
}
BG_LEAF I32 load_s8_i(const void* p) {
  I32 r;
  BG_LANES r.v[i] = ((const int8_t*)p)[i];
  return r;
}
BG_LEAF void store_low_bytes(void* p, I32 x) {  // 16 bytes, the lowest of each lane
  BG_LANES ((uint8_t*)p)[i] = (uint8_t)x.v[i];
}

BG_INLINE F32 set_f(float x) { return {Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}}; }
BG_INLINE F32 zero_f() { return set_f(0); }
BG_INLINE F32 load_f(const float* p) {
  F32 r;
  std::memcpy(&r, p, 64);
  return r;
}
BG_INLINE void store_f(float* p, F32 x) { std::memcpy(p, &x, 64); }
BG_INLINE F32 add_f(F32 a, F32 b) { return {a.v + b.v}; }
BG_INLINE F32 sub_f(F32 a, F32 b) { return {a.v - b.v}; }
BG_INLINE F32 mul_f(F32 a, F32 b) { return {a.v * b.v}; }
BG_INLINE F32 div_f(F32 a, F32 b) { return {a.v / b.v}; }
BG_INLINE F32 min_f(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }  // b where a or b is NaN, as x86 has it
BG_INLINE F32 max_f(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
BG_INLINE F32 abs_f(F32 x) { return {(Floats)((Ints)x.v & 0x7fffffff)}; }
BG_INLINE F32 fma_f(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }   // a b + c; rounded once where the machine can
BG_INLINE F32 fnma_f(F32 a, F32 b, F32 c) { return {c.v - a.v * b.v}; }  // c - a b
BG_LEAF float max_of_f(F32 x) {
  float m = x.v[0];
  BG_LANES m = x.v[i] > m ? x.v[i] : m;
  return m;
}
BG_LEAF float sum_f(F32 x) {
  float s = 0;
  BG_LANES s += x.v[i];
  return s;
}
BG_LEAF F32 scale_f(F32 x, F32 n) {  // x 2^n, n a whole number within -252 .. 254
  BG_LANES x.v[i] = std::ldexp(x.v[i], (int)n.v[i]);
  return x;
}
BG_LEAF F32 sums_f(const F32* x) {  // lane i: the sum of the lanes of x[i]
  F32 r;
  BG_LANES r.v[i] = sum_f(x[i]);
  return r;
}
BG_INLINE F32 to_float(I32 x) { return {__builtin_convertvector(x.v, Floats)}; }
BG_LEAF I32 round_to_int(F32 x) {  // ties to even; what does not fit becomes INT32_MIN, as x86 has it
  I32 r;
  BG_LANES {
    const float y = std::nearbyint(x.v[i]);
    r.v[i] = y >= -2147483648.f && y < 2147483648.f ? (int32_t)y : INT32_MIN;
  }
  return r;
}
BG_LEAF F32 round_f(F32 x) {  // ties to even; keeps the sign of 0
  BG_LANES x.v[i] = std::nearbyint(x.v[i]);
  return x;
}
BG_INLINE F32 exponent_f(F32 x) {  // the power of two at or below |x|, 0 for subnormal numbers
  return {(Floats)((Ints)x.v & 0x7f800000)};
}
BG_INLINE F32 select_greater(F32 x, F32 y, F32 a, F32 b) { return {x.v > y.v ? a.v : b.v}; }  // a where x > y, else b
BG_INLINE bool any_greater(F32 x, F32 y) {
  const Ints greater = x.v > y.v;
  int32_t found = 0;
  BG_LANES found |= greater[i];
  return found != 0;
}
BG_LEAF F32 load_f16(const void* p) {
  F32 r;
  BG_LANES {
    uint16_t h;
    std::memcpy(&h, (const uint8_t*)p + 2 * i, 2);
    r.v[i] = from_f16(h);
  }
  return r;
}
BG_INLINE F32 load_bf16(const void* p) {
  HalfLanes half;
  std::memcpy(&half, p, 32);
  return {(Floats)(__builtin_convertvector(half, Words) << 16)};
}
BG_LEAF void store_f16(void* p, F32 x) {  // to nearest, ties to even
  BG_LANES {
    const uint16_t h = to_f16(x.v[i]);
    std::memcpy((uint8_t*)p + 2 * i, &h, 2);
  }
}
BG_LEAF void store_bf16(void* p, F32 x) {
  BG_LANES {
    const uint16_t h = to_bf16(x.v[i]);
    std::memcpy((uint8_t*)p + 2 * i, &h, 2);
  }
}

BG_INLINE F64 zero_d() { return {Doubles{}}; }
BG_INLINE F64 add_d(F64 a, F32 b) {  // a + b, lane by lane
  return {a.v + __builtin_convertvector(b.v, Doubles)};
}
BG_LEAF double sum_d(F64 x) {  // halves onto each other, at every level
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  }
  return x.v[0];
}

BG_INLINE Bytes load_b(const uint8_t* p) {
  Bytes r;
  std::memcpy(&r, p, 64);
  return r;
}
BG_INLINE Bytes repeat4(const uint8_t* p) {  // the same four bytes in each lane
  int32_t word;
  std::memcpy(&word, p, 4);
  return {(Octets)set_i(word).v};
}
BG_INLINE Bytes and_b(Bytes x, uint8_t mask) { return {x.v & mask}; }
BG_INLINE Bytes or_b(Bytes a, Bytes b) { return {a.v | b.v}; }
template <int COUNT>
BG_INLINE Bytes shift_right_b(Bytes x) {  // bits of a neighbour come in from above: mask afterwards
  return {(Octets)((Words)x.v >> COUNT)};
}
template <int COUNT>
BG_INLINE Bytes shift_left_b(Bytes x) {
  return {(Octets)((Words)x.v << COUNT)};
}
// sum[i] += u[4i] s[4i] + .. + u[4i+3] s[4i+3], u unsigned and s signed bytes, exact
BG_INLINE void dot4(I32& sum, Bytes u, Bytes s) {  // a product fits 16 bits
  const Shorts even = ((Shorts)u.v & 255) * ((Shorts)((Words)s.v << 8) >> 8);
  const Shorts odd = (Shorts)((Halves)u.v >> 8) * ((Shorts)s.v >> 8);
  sum.v += ((Ints)((Words)even << 16) >> 16) + ((Ints)even >> 16) + ((Ints)((Words)odd << 16) >> 16) +
      ((Ints)odd >> 16);
}
// The same with u - kDotShift for u, where that is cheaper: kDotShift times what sum4 finds is missing.
constexpr int kDotShift = 0;
BG_INLINE void dot4_shifted(I32& sum, Bytes u, Bytes s) { dot4(sum, u, s); }
BG_INLINE void sum4(I32& sum, Bytes s) {  // sum[i] += s[4i] + .. + s[4i+3]
  dot4(sum, {(Octets)set_i(0x01010101).v}, s);
}
// STEPS times dot4, with u of less than 16
template <int STEPS>
BG_INLINE void dot4_small(I32& sum, const Bytes* u, const Bytes* s) {
  for (int i = 0; i < STEPS; ++i) dot4(sum, u[i], s[i]);
}

BG_INLINE I32 and_i(I32 a, I32 b) { return {a.v & b.v}; }
BG_INLINE I32 or_i(I32 a, I32 b) { return {a.v | b.v}; }
template <int COUNT>
BG_INLINE I32 shift_left_i(I32 x) {
  return {(Ints)((Words)x.v << COUNT)};
}
template <int COUNT>
BG_INLINE I32 shift_right_i(I32 x) {  // zeros come in from above
  return {(Ints)((Words)x.v >> COUNT)};
}
template <int COUNT>
BG_INLINE I32 shift_right_signed_i(I32 x) {  // copies of the sign come in from above
  return {x.v >> COUNT};
}
BG_INLINE I32 as_lanes(Bytes x) { return {(Ints)x.v}; }  // the same bits
BG_INLINE F32 as_float(I32 bits) { return {(Floats)bits.v}; }
BG_INLINE I32 as_int(F32 x) { return {(Ints)x.v}; }

struct Table {  // 16 floats
  float v[16];
};
BG_INLINE Table load_table(const float* p) {
  Table r;
  std::memcpy(r.v, p, 64);
  return r;
}
BG_LEAF F32 look_up(const Table& table, I32 code) {  // the entries that the low 4 bits of each lane name
  F32 r;
  BG_LANES r.v[i] = table.v[code.v[i] & 15];
  return r;
}

// Only where BG_HAS_BF16_DOT; registers seen as 32 words of 16 bits:
//   look_up_words(table, code)  the word of the table that the low 5 bits of each word name
//   look_up_bytes(a, b, code)   the byte of a table of 128 (a, then b) that the low 7 bits of each byte name
//   shift_right_w<COUNT>(x)     of each word, zeros come in from above; shift_left_w<COUNT>(x): from below
//   dot2(sum, a, b)             sum[i] += a[2i+1] b[2i+1], then += a[2i] b[2i], words are bfloat16; subnormals count as 0
//   and_or(x, mask, other)      (x & mask) | other

BG_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef BG_LANES
#undef BG_LEAF

}  // namespace BG_ISA
}  // namespace bitgrain
