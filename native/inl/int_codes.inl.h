// What all products of integer weights share: codes out of panels, sums into outputs; layout in linear/int_weights.h.
namespace bitgrain {
namespace BG_ISA {

// Chunks of a half panel at p: kSteps times four features of 16 columns. step: one of them, unpacked.
template <int BITS>
struct Codes;

// How far ahead weights are prefetched by the first tile, which reads them from memory; the others find them in a cache.
constexpr int64_t kAhead = 4096;

template <>
struct Codes<8> {
  static constexpr int kSteps = 1, kVectors = 1;
  BG_INLINE Bytes step(const uint8_t* p, int) { return load_b(p); }
};

template <>
struct Codes<4> {
  static constexpr int kSteps = 2, kVectors = 1;
  BG_INLINE Bytes step(const uint8_t* p, int i) {
    const Bytes x = load_b(p);
    return and_b(i == 0 ? x : shift_right_b<4>(x), 15);
  }
};

template <>
struct Codes<2> {
  static constexpr int kSteps = 4, kVectors = 1;
  BG_INLINE Bytes step(const uint8_t* p, int i) {
    const Bytes x = load_b(p);
    switch (i) {
      case 0: return and_b(x, 3);
      case 1: return and_b(shift_right_b<2>(x), 3);
      case 2: return and_b(shift_right_b<4>(x), 3);
      default: return and_b(shift_right_b<6>(x), 3);
    }
  }
};

template <>
struct Codes<3> {
  static constexpr int kSteps = 8, kVectors = 3;
  BG_INLINE Bytes step(const uint8_t* p, int i) {
    return or_b(Codes<2>::step(p + 64 * (i / 4), i % 4), and_b(high(load_b(p + 128), i), 4));
  }
  BG_INLINE Bytes high(Bytes x, int i) {
    switch (i) {
      case 0: return shift_left_b<2>(x);
      case 1: return shift_left_b<1>(x);
      case 2: return x;
      case 3: return shift_right_b<1>(x);
      case 4: return shift_right_b<2>(x);
      case 5: return shift_right_b<3>(x);
      case 6: return shift_right_b<4>(x);
      default: return shift_right_b<5>(x);
    }
  }
};

// Scale of a row, the bias, and the type of y: of sums of 16 columns from `column` on.
BG_INLINE void finish_sums(const IntPanelJob& job, int64_t column, int64_t row, F32 sums) {
  const IntWeights& w = *job.w;
  const int64_t left = w.n - column, count = left < 16 ? left : 16;
  if (left <= 0) return;
  const F32 bias = w.bias ? load_elements<DType::f32>(w.bias, column, count) : zero_f();
  store_elements(job.y, job.type, row * job.stride + column, count, fma_f(sums, set_f(job.scales[row]), bias));
}

}  // namespace BG_ISA
}  // namespace bitgrain
