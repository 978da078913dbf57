// Conversions between float and its 16-bit kin, without hardware: to nearest, ties to even, as IEEE 754 has it.
#pragma once
#include "common.h"

namespace bitgrain {

BG_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
BG_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

BG_INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
BG_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

BG_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  if (magnitude < 0x400) {  // subnormal: the number of steps of 2**-24
    const float x = (float)magnitude * (1.f / 16777216.f);
    return float_of(sign | bits_of(x));
  }
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}
BG_INLINE uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds past 65504: Inf
  if (magnitude < 0x38800000) {                       // subnormal: the sum's last bit is worth 2**-24
    return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  return sign | (uint16_t)((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// OCP microscaling's E8M0: an exponent; and OCP FP8's E4M3 (fn): no Inf, one NaN.
BG_INLINE float from_e8m0(uint8_t e) {
  return float_of(e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : (uint32_t)e << 23);
}
BG_INLINE float from_e4m3(uint8_t x) {
  const uint32_t sign = (uint32_t)(x & 0x80) << 24, magnitude = x & 0x7f;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000u);
  if (magnitude < 8) return float_of(sign | bits_of((float)magnitude * (1.f / 512.f)));
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}
// OCP FP8's E5M2: the upper half of a float16.
BG_INLINE float from_e5m2(uint8_t x) { return from_f16((uint16_t)(x << 8)); }

// One number of float32, bfloat16 or float16 memory.
BG_INLINE float load_number(const void* p, DType type, int64_t at) {
  if (type == DType::f32) {
    float x;
    std::memcpy(&x, (const uint8_t*)p + 4 * at, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, (const uint8_t*)p + 2 * at, 2);
  return type == DType::bf16 ? from_bf16(half) : from_f16(half);
}
// The same of any type that numbers are stored in.
BG_INLINE float load_any(const void* p, DType type, int64_t at) {
  const uint8_t byte = size_of(type) == 1 ? ((const uint8_t*)p)[at] : 0;
  switch (type) {
    case DType::u8: return (float)byte;
    case DType::s8: return (float)(int8_t)byte;
    case DType::e8m0: return from_e8m0(byte);
    case DType::e4m3: return from_e4m3(byte);
    default: return load_number(p, type, at);
  }
}
BG_INLINE void store_number(void* p, DType type, int64_t at, float x) {
  if (type == DType::f32) {
    std::memcpy((uint8_t*)p + 4 * at, &x, 4);
    return;
  }
  const uint16_t half = type == DType::bf16 ? to_bf16(x) : to_f16(x);
  std::memcpy((uint8_t*)p + 2 * at, &half, 2);
}

}  // namespace bitgrain
