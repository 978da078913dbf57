// Rows of codes as floats: an embedding's look-up, whatever holds the codes.
#pragma once
#include "floats.h"
#include "pool.h"

namespace bitgrain {

// What numbers become elements by: (number - zero) * scale - minimum.
struct Step {
  float scale, zero, minimum;
};

template <DType T>
void dequantize_run(const uint8_t* codes, const float* numbers, const Step& by, int64_t first, int64_t count, void* y) {
  for (int64_t i = first; i < first + count; ++i) {
    store_number(y, T, i, (numbers[codes[i]] - by.zero) * by.scale - by.minimum);
  }
}

// y [count, k] in f32, bf16 or f16, row by row: (numbers[code] - zero) * scale - minimum, each step rounded to float32,
// then to `type`. unpack(row, codes, f) fills codes [k], and calls f(first, count, step) for every run of elements with
// one scale. Returns where the first of `ids` is that is no row; -1: none, and only then y is written whole.
template <typename Unpack>
int64_t gather(int64_t n, int64_t k, const float* numbers, const int64_t* ids, int64_t count, void* y, DType type,
               int threads, const Unpack& unpack) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= n) return i;
  }
  parallel_for(count < 8 ? 1 : threads, count, 4, [&](int64_t first, int64_t last) {
    static thread_local Scratch memory;
    uint8_t* codes = memory.get<uint8_t>(k);
    for (int64_t i = first; i < last; ++i) {
      void* to = static_cast<uint8_t*>(y) + i * k * static_cast<int64_t>(size_of(type));
      unpack(ids[i], codes, [&](int64_t at, int64_t some, const Step& by) {
        if (type == DType::f32) dequantize_run<DType::f32>(codes, numbers, by, at, some, to);
        else if (type == DType::bf16) dequantize_run<DType::bf16>(codes, numbers, by, at, some, to);
        else dequantize_run<DType::f16>(codes, numbers, by, at, some, to);
      });
    }
  });
  return -1;
}

}  // namespace bitgrain
