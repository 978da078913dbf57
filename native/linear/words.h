// Rows of densely packed codes, as files hold them: one little-endian stream of bits a row, element i in the bits
// [i * bits, (i + 1) * bits). int32 and uint8 words are the same bytes; only the padding of a row differs.
#pragma once
#include "common.h"

namespace bitgrain {

struct WordRows {
  const uint8_t* rows;
  int64_t stride;  // bytes
  int32_t bits;    // 1 to 8
};

// The first `count` codes of one row, one a byte, less `offset`.
void unpack_row(const WordRows& words, int64_t row, int64_t count, uint8_t offset, uint8_t* codes);

// The inverse: `count` codes in [0, 2**bits) of one row into ceil(count * bits / 8) bytes.
void pack_row(const uint8_t* codes, int64_t count, int32_t bits, uint8_t* to);

}  // namespace bitgrain
