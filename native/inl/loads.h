// Loads and stores of a few elements of any type, for the ends of rows.
#pragma once

namespace bitgrain {
namespace BG_ISA {

// 16 floats from elements [at, at + count) of x, 0 behind them. count may be 16.
template <DType T>
BG_INLINE F32 load_elements(const void* x, int64_t at, int64_t count) {
  const uint8_t* p = (const uint8_t*)x + at * (int64_t)size_of(T);
  alignas(64) uint8_t part[64];
  if (count < 16) {
    std::memset(part, 0, 64);
    std::memcpy(part, p, (size_t)count * size_of(T));
    p = part;
  }
  if constexpr (T == DType::f32) return load_f((const float*)p);
  if constexpr (T == DType::bf16) return load_bf16(p);
  return load_f16(p);
}

// The first `count` lanes to elements [at, at + count) of y.
BG_INLINE void store_elements(void* y, DType type, int64_t at, int64_t count, F32 x) {
  uint8_t* p = (uint8_t*)y + at * (int64_t)size_of(type);
  alignas(64) uint8_t part[64];
  uint8_t* to = count < 16 ? part : p;
  if (type == DType::f32) store_f((float*)to, x);
  else if (type == DType::bf16) store_bf16(to, x);
  else store_f16(to, x);
  if (count < 16) std::memcpy(p, part, (size_t)count * size_of(type));
}

BG_INLINE F32 load_scales(const uint8_t* p, DType type, int64_t column) {
  if (type == DType::f32) return load_f((const float*)p + column);
  return type == DType::bf16 ? load_bf16(p + 2 * column) : load_f16(p + 2 * column);
}

}  // namespace BG_ISA
}  // namespace bitgrain
