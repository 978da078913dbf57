// Guarded tensors of any element type, and how far a result may be from what it should be.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "floats.h"
#include "guarded.h"

// `count` elements of f32, bf16 or f16.
class Numbers {
 public:
  Numbers(int64_t count, bitgrain::DType type, Edge edge, uint8_t fill = 0x5b)
      : count_(count), type_(type), memory_(count * static_cast<int64_t>(bitgrain::size_of(type)), edge, fill) {}

  float operator[](int64_t i) { return bitgrain::load_number(memory_.data(), type_, i); }
  void set(int64_t i, float x) { bitgrain::store_number(memory_.data(), type_, i, x); }
  void fill(Random& random, float size = 1.f) {
    for (int64_t i = 0; i < count_; ++i) set(i, random.real() * size);
  }
  void* data() { return memory_.data(); }
  uint8_t* bytes() { return memory_.bytes(); }
  size_t size() const { return memory_.size(); }
  int64_t count() const { return count_; }
  bitgrain::DType type() const { return type_; }

 private:
  int64_t count_;
  bitgrain::DType type_;
  Guarded<uint8_t> memory_;
};

inline bitgrain::DType any_float_type(Random& random) {
  return random.one_of({bitgrain::DType::f32, bitgrain::DType::bf16, bitgrain::DType::f16});
}
inline Edge any_edge(Random& random) { return random.one_of({Edge::end, Edge::end, Edge::start}); }

// What rounding x to a type may change.
inline double rounding(double x, bitgrain::DType type) {
  const double part = type == bitgrain::DType::f32 ? 6e-8 : type == bitgrain::DType::bf16 ? 1. / 256 : 1. / 2048;
  return std::fabs(x) * part + (type == bitgrain::DType::f16 ? 6e-8 : 1e-30);
}

inline void check_near(double found, double meant, double bound, const std::string& what) {
  if (std::fabs(found - meant) <= bound || (std::isnan(found) && std::isnan(meant))) return;
  fail(what + ": " + std::to_string(found) + ", not " + std::to_string(meant) + " (" + std::to_string(bound) +
       " apart at most)");
}

// What lies between rows still has the bytes that it was filled with.
inline void check_untouched(const uint8_t* at, int64_t bytes, uint8_t fill, const std::string& what) {
  for (int64_t i = 0; i < bytes; ++i) {
    if (at[i] != fill) fail(what + ": written beside its rows");
  }
}
