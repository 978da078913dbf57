// Integer weights [n, k] packed for the int8 kernels; one layout for all instruction sets.
//
// Columns (output features) lie in panels of 32. k is divided into spans: runs of input features that share a weight
// scale (a group) and an activation scale. A panel is its spans, one behind the other; a span is a header and chunks:
//
//   scales   32 x f32, bf16 or f16
//   zeros    nothing | 32 x u8 codes | 32 x f32           (each header part padded to 64 bytes), or minima, as scales
//   sums     nothing | 32 x i32: the sum of a column's stored codes in this span
//   chunks   for each chunk, for each half panel of 16 columns, kVectors x 64 bytes; the 4 bytes of a lane belong to
//            one column
//
// | bits | features of a chunk | vectors | bits of byte j of a lane                                                    |
// |    8 |                   4 |       1 | feature j, signed                                                           |
// |    4 |                   8 |       1 | low half: feature j; high half: feature 4 + j                               |
// |    2 |                  16 |       1 | bits 2i, 2i+1: feature 4i + j                                               |
// |    3 |                  32 |       3 | two vectors as for 2 bits (features 0..15, 16..31): the low bits; one       |
// |      |                     |         | vector whose bit i is the high bit of feature 4i + j                        |
//
// Codes of fewer than 8 bits are unsigned, and meet activations in signed bytes; codes of 8 bits are signed, and meet
// unsigned ones. The last chunk of a span is padded with codes 0.
#pragma once
#include "common.h"
#include "linear/words.h"

namespace bitgrain {

constexpr int64_t kPanel = 32;

// constant: one zero point for all, often 0; minima: that one too, and what is taken off each product with a scale
enum class Zeros : int32_t { constant = 0, codes = 1, real = 2, minima = 3 };

struct Span {
  int32_t first, count;  // input features
  int32_t chunks;
  int32_t step;      // where its activations start, in steps of 4 padded features
  int32_t a_zero;    // the byte that an activation 0 is stored as
  float a_scale;     // of its activations, where it is fixed; 1 where each row has its own
  int64_t offset;    // in a panel
};

struct IntWeights {
  int64_t n, k;
  int32_t bits;
  DType scale_type;
  Zeros zeros;
  int32_t zero;       // of Zeros::constant; and of minima: w = (code - zero) * scale - minimum
  bool sums;          // whether spans hold sums
  int32_t spans;
  const Span* span;
  int64_t steps;      // padded features / 4
  int64_t panel_bytes;
  const uint8_t* panels;
  const float* bias;  // [n] or null
};

// Whether they run in taller tiles, whose sums need no place beside them: 8 bits, one scale a column.
BG_INLINE bool has_one_span(const IntWeights& w) { return w.bits == 8 && w.spans == 1; }

constexpr int64_t chunk_features(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32; }
constexpr int64_t chunk_vectors(int bits) { return bits == 3 ? 3 : 1; }

constexpr int64_t scales_bytes(DType type) { return kPanel * (int64_t)size_of(type); }
constexpr int64_t zeros_bytes(DType scale, Zeros zeros) {
  if (zeros == Zeros::minima) return scales_bytes(scale);
  return zeros == Zeros::constant ? 0 : zeros == Zeros::codes ? 64 : kPanel * 4;
}
constexpr int64_t header_bytes(DType scale, Zeros zeros, bool sums) {
  return scales_bytes(scale) + zeros_bytes(scale, zeros) + (sums ? kPanel * 4 : 0);
}

// How weights [n, k] are laid out. spans: `count` pairs (first feature, features), ascending and covering k. Fills
// span[..] and the sizes of `w`; returns the bytes of all panels.
int64_t lay_out(IntWeights& w, const int32_t* lengths, int32_t count, Span* span);

// Rows [first, last) of panels. codes: [n, k] bytes, unsigned (8 bits: signed); scale, zero: [n, spans], f32; `zero`
// holds codes for Zeros::codes, minima for Zeros::minima. Scales and minima are rounded to scale_type.
void pack_panels(const IntWeights& w, const uint8_t* codes, const float* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last);

// The same from rows as files hold them, of w.bits or fewer; for panels of 8 bits as code + 2**(words.bits - 1).
void pack_panels(const IntWeights& w, const WordRows& words, const float* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last);

// The inverse: codes, and scales and zeros where asked for (not null).
void unpack_panels(const IntWeights& w, uint8_t* codes, float* scale, float* zero, int64_t first, int64_t last);

// Some input features [count] of the weight, dequantized to [count, n]; panels [first, last).
void dequantize_features(const IntWeights& w, const int64_t* features, int64_t count, float* to, int64_t first,
                         int64_t last);

// Some output features, dequantized: rows `ids` [count] of the weight, see `gather`.
int64_t gather_rows(const IntWeights& w, const int64_t* ids, int64_t count, void* y, DType type, int threads);

}  // namespace bitgrain
