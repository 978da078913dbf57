// What all kernels share: element types at the seam, small integer helpers, buffers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__GNUC__) || defined(__clang__)
#define BG_INLINE static inline __attribute__((always_inline))
#define BG_UNROLL _Pragma("GCC unroll 16")
#else
#error "bitgrain is built with g++ or clang"
#endif

namespace bitgrain {

// Element types at the seam; the numbers are those that Python passes.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, s8 = 4, i32 = 5, e8m0 = 6, e4m3 = 7 };

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

constexpr size_t size_of(DType type) {
  return type == DType::f32 || type == DType::i32 ? 4 : type == DType::bf16 || type == DType::f16 ? 2 : 1;
}

// Memory of one thread that only grows, aligned to a cache line; what it held is lost when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <typename T>
  T* get(int64_t count) {
    size_t bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)) + 64, 64));
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bitgrain
