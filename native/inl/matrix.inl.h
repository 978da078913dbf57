// The matrix unit (AMX): eight tiles of 16 rows of 64 bytes. A product adds [16 rows][64 bytes of features] times
// [16 steps][16 columns][4 bytes of features] to [16 rows][16 columns] of 32 bits. Tiles 0 to 3 hold sums of two tiles
// of inputs against two half panels, 4 and 5 inputs, 6 and 7 weights.
#pragma once

namespace bitgrain {
namespace BG_ISA {

constexpr int64_t kMatrixSums = 16 * kPanel;  // of a tile of inputs against a panel: [2][16][16]
constexpr int64_t kMatrixStep = 16 * 2 * 64;  // bytes of a panel's weights in a step, [16][2][64]: as chunks of 8 bits lie

alignas(64) static const float kNoSums[kMatrixSums] = {};

// Tiles are the thread's while this lives: what it leaves behind would be saved with each switch between threads.
struct MatrixUnit {
  MatrixUnit() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
    static_assert(sizeof(shape) == 64, "what ldtilecfg reads");
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  MatrixUnit(const MatrixUnit&) = delete;
  ~MatrixUnit() { asm volatile("tilerelease"); }
};

// How a product reads its operands: bytes of inputs and of weights signed or not, or pairs of bfloat16.
enum class MatrixKind { unsigned_signed, signed_signed, bf16 };

// asm: the compiler's own names say nothing of the memory that they read
template <int TILE>
BG_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
BG_INLINE void store_tile(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(int64_t{64}), "i"(TILE) : "memory");
}
template <int TILE>
BG_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <MatrixKind KIND, int SUM, int X, int W>
BG_INLINE void multiply_tiles() {
  if constexpr (KIND == MatrixKind::unsigned_signed) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
  } else if constexpr (KIND == MatrixKind::signed_signed) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
  }
}

// Sums of T tiles of inputs against a panel, to sums [T][2][16][16], after what is there if `more`. x: [steps][16][64]
// bytes, the tiles x_tile bytes apart; w: [steps][16][2][64].
template <MatrixKind KIND, int T>
BG_INLINE void multiply_matrix(const uint8_t* x, int64_t x_tile, const uint8_t* w, int64_t steps, bool more, void* sums) {
  uint8_t* to = (uint8_t*)sums;
  if (more) {
    load_tile<0>(to, 64), load_tile<1>(to + 1024, 64);
    if constexpr (T == 2) load_tile<2>(to + 2048, 64), load_tile<3>(to + 3072, 64);
  } else {
    zero_tile<0>(), zero_tile<1>();
    if constexpr (T == 2) zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t i = 0; i < steps; ++i) {
    load_tile<6>(w, 128);
    load_tile<4>(x, 64);
    if constexpr (T == 2) load_tile<5>(x + x_tile, 64);
    load_tile<7>(w + 64, 128);
    multiply_tiles<KIND, 0, 4, 6>();
    if constexpr (T == 2) multiply_tiles<KIND, 2, 5, 6>();
    multiply_tiles<KIND, 1, 4, 7>();
    if constexpr (T == 2) multiply_tiles<KIND, 3, 5, 7>();
    x += 1024, w += kMatrixStep;
  }
  store_tile<0>(to), store_tile<1>(to + 1024);
  if constexpr (T == 2) store_tile<2>(to + 2048), store_tile<3>(to + 3072);
}

// Weights that the next run will read, fetched a part at a time while the unit is at this one: by itself the processor
// would begin when the run does.
class Ahead {
 public:
  Ahead(const uint8_t* from, int64_t bytes, int64_t times) : at_(from), end_(from + bytes) {
    step_ = round_up(ceil_div(bytes, times), 64);
  }
  void fetch() {
    const uint8_t* stop = end_ - at_ < step_ ? end_ : at_ + step_;
    for (; at_ < stop; at_ += 64) _mm_prefetch((const char*)at_, _MM_HINT_T1);
  }

 private:
  const uint8_t *at_, *end_;
  int64_t step_;
};

}  // namespace BG_ISA
}  // namespace bitgrain
