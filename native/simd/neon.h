// The vector language of the kernels in NEON with dot products (Armv8.2): 16 lanes of 32 bits are four registers.
#include <arm_neon.h>

#include "common.h"

#define BG_HAS_BF16_DOT 0

namespace bitgrain {
namespace BG_ISA {

struct I32 {
  int32x4_t v[4];
};
struct F32 {
  float32x4_t v[4];
};
struct F64 {  // sums of 16 lanes
  float64x2_t v[8];
};
struct Bytes {
  uint8x16_t v[4];
};

// 32 registers hold the sums of 4 rows of 16 columns, beside the codes of two steps.
constexpr int kGroupedRows = 4, kGroupedVectors = 1;
constexpr int kSingleRows = 4, kSingleVectors = 1;
constexpr int kDotSteps = 1;
constexpr int kFloatRows = 4, kFloatVectors = 1;  // of products of floats

#define BG_QUARTERS BG_UNROLL for (int i = 0; i < 4; ++i)

BG_INLINE I32 set_i(int32_t x) {
  const int32x4_t one = vdupq_n_s32(x);
  return {{one, one, one, one}};
}
BG_INLINE I32 zero_i() { return set_i(0); }
BG_INLINE I32 load_i(const void* p) {
  I32 r;
  BG_QUARTERS r.v[i] = vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + 16 * i));
  return r;
}
BG_INLINE void store_i(void* p, I32 x) {
  BG_QUARTERS vst1q_u8((uint8_t*)p + 16 * i, vreinterpretq_u8_s32(x.v[i]));
}
BG_INLINE I32 add_i(I32 a, I32 b) {
  BG_QUARTERS a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE I32 mul_i(I32 a, I32 b) {
  BG_QUARTERS a.v[i] = vmulq_s32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE I32 min_i(I32 a, I32 b) {
  BG_QUARTERS a.v[i] = vminq_s32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE I32 max_i(I32 a, I32 b) {
  BG_QUARTERS a.v[i] = vmaxq_s32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE int32_t sum_i(I32 x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
BG_INLINE I32 load_u8_i(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
BG_INLINE I32 load_s8_i(const void* p) {
  const int8x16_t bytes = vld1q_s8((const int8_t*)p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
BG_INLINE void store_low_bytes(void* p, I32 x) {
  const int16x8_t low = vmovn_high_s32(vmovn_s32(x.v[0]), x.v[1]), high = vmovn_high_s32(vmovn_s32(x.v[2]), x.v[3]);
  vst1q_s8((int8_t*)p, vmovn_high_s16(vmovn_s16(low), high));
}

BG_INLINE F32 set_f(float x) {
  const float32x4_t one = vdupq_n_f32(x);
  return {{one, one, one, one}};
}
BG_INLINE F32 zero_f() { return set_f(0); }
BG_INLINE F32 load_f(const float* p) {
  F32 r;
  BG_QUARTERS r.v[i] = vld1q_f32(p + 4 * i);
  return r;
}
BG_INLINE void store_f(float* p, F32 x) { BG_QUARTERS vst1q_f32(p + 4 * i, x.v[i]); }
BG_INLINE F32 add_f(F32 a, F32 b) {
  BG_QUARTERS a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE F32 sub_f(F32 a, F32 b) {
  BG_QUARTERS a.v[i] = vsubq_f32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE F32 mul_f(F32 a, F32 b) {
  BG_QUARTERS a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE F32 div_f(F32 a, F32 b) {
  BG_QUARTERS a.v[i] = vdivq_f32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE F32 min_f(F32 a, F32 b) {  // not vminq: that gives NaN where a is NaN
  BG_QUARTERS a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
  return a;
}
BG_INLINE F32 max_f(F32 a, F32 b) {
  BG_QUARTERS a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
  return a;
}
BG_INLINE F32 abs_f(F32 x) {
  BG_QUARTERS x.v[i] = vabsq_f32(x.v[i]);
  return x;
}
BG_INLINE F32 fma_f(F32 a, F32 b, F32 c) {
  BG_QUARTERS c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
BG_INLINE F32 fnma_f(F32 a, F32 b, F32 c) {
  BG_QUARTERS c.v[i] = vfmsq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
BG_INLINE float max_of_f(F32 x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
BG_INLINE float sum_f(F32 x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
BG_INLINE F32 to_float(I32 x) {
  F32 r;
  BG_QUARTERS r.v[i] = vcvtq_f32_s32(x.v[i]);
  return r;
}
BG_INLINE I32 round_to_int(F32 x) {  // Arm would saturate, and make NaN 0
  I32 r;
  BG_QUARTERS {
    const uint32x4_t fits = vcltq_f32(x.v[i], vdupq_n_f32(2147483648.f));
    r.v[i] = vbslq_s32(fits, vcvtnq_s32_f32(x.v[i]), vdupq_n_s32(INT32_MIN));
  }
  return r;
}
BG_INLINE F32 round_f(F32 x) {
  BG_QUARTERS x.v[i] = vrndnq_f32(x.v[i]);
  return x;
}
BG_INLINE F32 exponent_f(F32 x) {
  BG_QUARTERS x.v[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x.v[i]), vdupq_n_u32(0x7f800000)));
  return x;
}
BG_INLINE F32 select_greater(F32 x, F32 y, F32 a, F32 b) {
  BG_QUARTERS b.v[i] = vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), a.v[i], b.v[i]);
  return b;
}
BG_INLINE bool any_greater(F32 x, F32 y) {
  uint32x4_t found = vcgtq_f32(x.v[0], y.v[0]);
  for (int i = 1; i < 4; ++i) found = vorrq_u32(found, vcgtq_f32(x.v[i], y.v[i]));
  return vmaxvq_u32(found) != 0;
}
BG_INLINE F32 scale_f(F32 x, F32 n) {  // by two powers of two, neither of which overflows
  BG_QUARTERS {
    const int32x4_t whole = vcvtnq_s32_f32(n.v[i]), first = vshrq_n_s32(whole, 1), second = vsubq_s32(whole, first);
    const int32x4_t bias = vdupq_n_s32(127);
    x.v[i] = vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(first, bias), 23)));
    x.v[i] = vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(second, bias), 23)));
  }
  return x;
}
BG_INLINE F32 sums_f(const F32* x) {
  F32 r;
  float32x4_t whole[16];
  BG_UNROLL for (int i = 0; i < 16; ++i) {
    whole[i] = vaddq_f32(vaddq_f32(x[i].v[0], x[i].v[1]), vaddq_f32(x[i].v[2], x[i].v[3]));
  }
  BG_QUARTERS r.v[i] = vpaddq_f32(vpaddq_f32(whole[4 * i], whole[4 * i + 1]), vpaddq_f32(whole[4 * i + 2], whole[4 * i + 3]));
  return r;
}
BG_INLINE F32 load_f16(const void* p) {
  F32 r;
  BG_QUARTERS r.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t*)p + 8 * i)));
  return r;
}
BG_INLINE F32 load_bf16(const void* p) {
  F32 r;
  BG_QUARTERS {
    const uint16x4_t half = vreinterpret_u16_u8(vld1_u8((const uint8_t*)p + 8 * i));
    r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
  return r;
}
BG_INLINE void store_f16(void* p, F32 x) {
  BG_QUARTERS vst1_u8((uint8_t*)p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.v[i])));
}
BG_INLINE void store_bf16(void* p, F32 x) {  // to nearest, ties to even; NaN stays NaN
  BG_QUARTERS {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
    const uint32x4_t same = vceqq_f32(x.v[i], x.v[i]);
    const uint16x4_t rounded = vmovn_u32(vbslq_u32(same, vshrq_n_u32(sum, 16), vdupq_n_u32(0x7fc0)));
    vst1_u8((uint8_t*)p + 8 * i, vreinterpret_u8_u16(rounded));
  }
}

BG_INLINE F64 zero_d() {
  F64 r;
  BG_UNROLL for (int i = 0; i < 8; ++i) r.v[i] = vdupq_n_f64(0);
  return r;
}
BG_INLINE F64 add_d(F64 a, F32 b) {
  BG_QUARTERS {
    a.v[2 * i] = vaddq_f64(a.v[2 * i], vcvt_f64_f32(vget_low_f32(b.v[i])));
    a.v[2 * i + 1] = vaddq_f64(a.v[2 * i + 1], vcvt_high_f64_f32(b.v[i]));
  }
  return a;
}
BG_INLINE double sum_d(F64 x) {  // halves onto each other, at every level
  BG_QUARTERS x.v[i] = vaddq_f64(x.v[i], x.v[i + 4]);
  return vaddvq_f64(vaddq_f64(vaddq_f64(x.v[0], x.v[2]), vaddq_f64(x.v[1], x.v[3])));
}

BG_INLINE Bytes load_b(const uint8_t* p) {
  Bytes r;
  BG_QUARTERS r.v[i] = vld1q_u8(p + 16 * i);
  return r;
}
BG_INLINE Bytes repeat4(const uint8_t* p) {
  const uint8x16_t one = vreinterpretq_u8_u32(vld1q_dup_u32((const uint32_t*)p));
  return {{one, one, one, one}};
}
BG_INLINE Bytes and_b(Bytes x, uint8_t mask) {
  BG_QUARTERS x.v[i] = vandq_u8(x.v[i], vdupq_n_u8(mask));
  return x;
}
BG_INLINE Bytes or_b(Bytes a, Bytes b) {
  BG_QUARTERS a.v[i] = vorrq_u8(a.v[i], b.v[i]);
  return a;
}
template <int COUNT>
BG_INLINE Bytes shift_right_b(Bytes x) {
  BG_QUARTERS x.v[i] = vshrq_n_u8(x.v[i], COUNT);
  return x;
}
template <int COUNT>
BG_INLINE Bytes shift_left_b(Bytes x) {
  BG_QUARTERS x.v[i] = vshlq_n_u8(x.v[i], COUNT);
  return x;
}
// There is no product of unsigned and signed bytes: u is taken as 128 + (u - 128).
constexpr int kDotShift = 128;
BG_INLINE void dot4_shifted(I32& sum, Bytes u, Bytes s) {
  BG_QUARTERS {
    const int8x16_t x = vreinterpretq_s8_u8(veorq_u8(u.v[i], vdupq_n_u8(128)));
    sum.v[i] = vdotq_s32(sum.v[i], x, vreinterpretq_s8_u8(s.v[i]));
  }
}
BG_INLINE void sum4(I32& sum, Bytes s) {
  BG_QUARTERS sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(s.v[i]), vdupq_n_s8(1));
}
BG_INLINE void dot4(I32& sum, Bytes u, Bytes s) {
  I32 all = zero_i();
  sum4(all, s), dot4_shifted(sum, u, s);
  BG_QUARTERS sum.v[i] = vaddq_s32(sum.v[i], vshlq_n_s32(all.v[i], 7));
}
template <int STEPS>
BG_INLINE void dot4_small(I32& sum, const Bytes* u, const Bytes* s) {
  BG_UNROLL for (int j = 0; j < STEPS; ++j) BG_QUARTERS
      sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(u[j].v[i]), vreinterpretq_s8_u8(s[j].v[i]));
}

BG_INLINE I32 and_i(I32 a, I32 b) {
  BG_QUARTERS a.v[i] = vandq_s32(a.v[i], b.v[i]);
  return a;
}
BG_INLINE I32 or_i(I32 a, I32 b) {
  BG_QUARTERS a.v[i] = vorrq_s32(a.v[i], b.v[i]);
  return a;
}
template <int COUNT>
BG_INLINE I32 shift_left_i(I32 x) {
  BG_QUARTERS x.v[i] = vshlq_s32(x.v[i], vdupq_n_s32(COUNT));
  return x;
}
template <int COUNT>
BG_INLINE I32 shift_right_i(I32 x) {
  BG_QUARTERS x.v[i] = vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.v[i]), vdupq_n_s32(-COUNT)));
  return x;
}
template <int COUNT>
BG_INLINE I32 shift_right_signed_i(I32 x) {
  BG_QUARTERS x.v[i] = vshlq_s32(x.v[i], vdupq_n_s32(-COUNT));
  return x;
}
BG_INLINE I32 as_lanes(Bytes x) {
  I32 r;
  BG_QUARTERS r.v[i] = vreinterpretq_s32_u8(x.v[i]);
  return r;
}
BG_INLINE F32 as_float(I32 bits) {
  F32 r;
  BG_QUARTERS r.v[i] = vreinterpretq_f32_s32(bits.v[i]);
  return r;
}
BG_INLINE I32 as_int(F32 x) {
  I32 r;
  BG_QUARTERS r.v[i] = vreinterpretq_s32_f32(x.v[i]);
  return r;
}

struct Table {  // 16 floats as 64 bytes
  uint8x16x4_t v;
};
BG_INLINE Table load_table(const float* p) {
  Table r;
  BG_QUARTERS r.v.val[i] = vld1q_u8((const uint8_t*)p + 16 * i);
  return r;
}
BG_INLINE F32 look_up(const Table& table, I32 code) {
  F32 r;
  BG_QUARTERS {  // bytes 4 c .. 4 c + 3
    const uint32x4_t low = vandq_u32(vreinterpretq_u32_s32(code.v[i]), vdupq_n_u32(15));
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), low, vdupq_n_u32(0x04040404));
    r.v[i] = vreinterpretq_f32_u8(vqtbl4q_u8(table.v, vreinterpretq_u8_u32(at)));
  }
  return r;
}

BG_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef BG_QUARTERS

}  // namespace BG_ISA
}  // namespace bitgrain
