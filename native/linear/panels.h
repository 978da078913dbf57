// What drivers and packers of panels share, whatever a panel holds. W: IntWeights or CodeWeights.
#pragma once
#include <type_traits>

#include "common.h"
#include "linear/code_weights.h"
#include "linear/int_weights.h"
#include "linear/words.h"
#include "pool.h"

namespace bitgrain {

inline int64_t panels_of(int64_t n) { return ceil_div(n, kPanel); }

// Rows up to which products wait for memory, and long runs of panels are worth more than an even end.
constexpr int64_t kRowsFromMemory = 16;

// All panels of `count` weights that read the same m rows against block after block of those rows: f(index of a weight,
// block, first panel, last panel). For few rows a thread takes an eighth of its share at a time: up to 10 % faster from
// memory than runs of 48 KB.
template <typename W, typename F>
void for_panels(const W* const* weights, int64_t count, int64_t m, int64_t blocks, int threads, const F& f) {
  int64_t panels = 0;
  for (int64_t i = 0; i < count; ++i) panels += panels_of(weights[i]->n);
  const int64_t grain = m <= kRowsFromMemory ? ceil_div(panels, 8 * threads) : 1;
  const int64_t runs = ceil_div(panels, grain);
  parallel_for(threads, blocks * runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      int64_t from = (item % runs) * grain, to = from + grain < panels ? from + grain : panels;
      for (int64_t i = 0; i < count && from < to; ++i) {
        const int64_t own = panels_of(weights[i]->n), stop = to < own ? to : own;
        if (from < stop) f(i, item / runs, from, stop);
        from = from > own ? from - own : 0, to -= own;
      }
    }
  });
}

// f(bits as a constant of the compiler).
template <typename F>
void with_bits(int bits, const F& f) {
  switch (bits) {
    case 8: return f(std::integral_constant<int, 8>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 2>{});
  }
}

// What to take off codes as files hold them.
inline uint8_t code_offset(const IntWeights& w, int bits) { return w.bits == 8 ? (uint8_t)(1u << (bits - 1)) : 0; }
inline uint8_t code_offset(const CodeWeights& w, int bits) {
  return w.kind == CodeKind::integers ? (uint8_t)(1u << (bits - 1)) : 0;
}

// Panels [first, last) of densely packed rows: pack(codes of the panel's columns, w.k bytes each, panel). Integers in
// 8-bit panels are signed.
template <typename W, typename F>
void unpack_words(const W& w, const WordRows& words, int64_t first, int64_t last, const F& pack) {
  static thread_local Scratch memory;
  uint8_t* codes = memory.get<uint8_t>(kPanel * w.k);
  const uint8_t offset = code_offset(w, words.bits);
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = 0; c < kPanel && p * kPanel + c < w.n; ++c) {
      unpack_row(words, p * kPanel + c, w.k, offset, codes + c * w.k);
    }
    pack(codes, p);
  }
}

}  // namespace bitgrain
