// Weights [n, k] = table[code] * scale, packed for the kernels whose inputs have 16 or 32 bits; one layout for all
// instruction sets.
//
// Columns (output features) lie in panels of 32. k is divided into groups of neighbouring input features that share a
// scale; the last group may be shorter. A panel is its groups, one behind the other; a group is a header and chunks:
//
//   scales   32 x f32, bf16, f16, E8M0 or E4M3
//   zeros    nothing | 32 x u8 codes, padded to 64 bytes | 32 x f32, or minima, as scales of f32, bf16 or f16
//   chunks   for each chunk, for each half panel of 16 columns, kVectors x 64 bytes; the 4 bytes of a lane belong to
//            one column, the low half word to even features, the high one to odd features
//
// | bits | features of a chunk | vectors | bits of the low half word (the same of the high one: the next feature)      |
// |    4 |                   8 |       1 | 4i .. 4i+3: feature 2i                                                      |
// |    2 |                  16 |       1 | 2i, 2i+1: feature 2i                                                        |
// |    3 |                  32 |       3 | of vector v: 3i .. 3i+2: feature 10v + 2i, for i < 5; bit 15: bit v of      |
// |      |                     |         | feature 30                                                                  |
// |    8 |                   4 |       1 | bytes: features 0 and 2, signed or OCP FP8; no table                        |
//
// The last chunk of a group is padded with codes 0, and meets inputs 0.
#pragma once
#include "common.h"
#include "linear/int_weights.h"
#include "linear/words.h"

namespace bitgrain {

// What codes of 8 bits mean; those of fewer are looked up.
enum class CodeKind : int32_t { table = 0, integers = 1, e4m3 = 2, e5m2 = 3 };

// How inputs are rounded to a float format of a few bits before they meet the weights: v = round(x / scale). What
// multiplies the products with v is the scale.
enum class InputScale : int32_t {
  none = 0,   // inputs are not rounded
  fixed = 1,  // `scale`
  plain = 2,  // of each run: its largest magnitude / the format's largest number
  e8m0 = 3,   // the smallest power of two under which none rounds past the format's largest number
  e4m3 = 4    // the plain one as a number of E4M3 times `scale`
};
struct InputRounding {
  InputScale kind = InputScale::none;
  int32_t mantissa_bits = 0;
  float least = 0;     // the format's smallest normal number
  float largest = 0;   // its largest number
  float overflow = 0;  // halfway from it to what would be the next
  float scale = 1;
  bool groups = false;  // runs are the weights' groups, else whole rows
};

struct CodeWeights {
  int64_t n, k, group;
  int32_t bits;
  CodeKind kind;
  DType scale_type;
  Zeros zeros;         // w = (table[code] - zero) * scale; a constant one is part of the table, but for minima
  float zero;          // of Zeros::minima: w = (table[code] - zero) * scale - minimum
  float outer;         // what all scales are multiplied with
  float table[16];     // entries repeat where codes have fewer than 4 bits: bits above a code do not matter
  uint16_t words[32];  // the same in bfloat16, rounded
  uint8_t low[128], high[128];  // of FP8: the bytes of all magnitudes in bfloat16
  InputRounding inputs;
  int64_t spans;       // groups of a row
  int64_t steps;       // padded features / 2
  int64_t panel_bytes;
  const uint8_t* panels;
  const float* bias;  // [n] or null
};

// How many scales a row of rounded inputs has.
BG_INLINE int64_t scales_of_row(const CodeWeights& w) { return w.inputs.groups ? w.spans : 1; }

constexpr int64_t code_header_bytes(DType scale, Zeros zeros) {
  return scales_bytes(scale) + zeros_bytes(scale, zeros);
}

// Features of group s, and its chunks.
BG_INLINE int64_t features_of(const CodeWeights& w, int64_t s) {
  return w.k - s * w.group < w.group ? w.k - s * w.group : w.group;
}
BG_INLINE int64_t chunks_of(const CodeWeights& w, int64_t s) {
  return ceil_div(features_of(w, s), chunk_features(w.bits));
}

// Steps of the matrix unit, of 32 features, in group s.
BG_INLINE int64_t matrix_steps(const CodeWeights& w, int64_t s) { return ceil_div(features_of(w, s), 32); }
BG_INLINE int64_t matrix_row_bytes(const CodeWeights& w) {
  const int64_t whole = w.spans > 1 ? (w.spans - 1) * matrix_steps(w, 0) : 0;
  return (whole + matrix_steps(w, w.spans - 1)) * 64;
}

// Fills the sizes of `w` from n, k, group, bits, scale_type and zeros; returns the bytes of all panels.
int64_t lay_out(CodeWeights& w);

// The table of a weight: `count` numbers, 2**bits or fewer; or those of its kind.
void set_table(CodeWeights& w, const float* numbers, int64_t count);

// Rows [first, last) of panels. codes: [n, k] bytes, unsigned (8 bits: signed); scale: [n, spans] of scale_type;
// zero: [n, spans], f32, which holds codes for Zeros::codes, minima (rounded to scale_type) for Zeros::minima.
void pack_panels(const CodeWeights& w, const uint8_t* codes, const void* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last);

// The same from rows as files hold them, of w.bits or fewer; for panels of 8 bits as code + 2**(words.bits - 1).
void pack_panels(const CodeWeights& w, const WordRows& words, const void* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last);

// The inverse: codes, and scales and zeros where asked for (not null).
void unpack_panels(const CodeWeights& w, uint8_t* codes, void* scale, float* zero, int64_t first, int64_t last);

// Rows `ids` [count] of the weight, dequantized: (table[code] - zero) * (scale * outer) - minimum * outer, see
// `gather`.
int64_t gather_rows(const CodeWeights& w, const int64_t* ids, int64_t count, void* y, DType type, int threads);

}  // namespace bitgrain
