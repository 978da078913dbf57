#include "linear/words.h"

namespace bitgrain {
namespace {

// `width` ones at the start of every `stride` bits.
constexpr uint64_t fields(int width, int stride) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += stride) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// Eight fields of BITS bits <-> eight bytes: the upper half moves by itself, then each half's upper half, and so on.
template <int BITS>
uint64_t spread(uint64_t v) {
  if (BITS == 8) return v;
  v = (v & fields(4 * BITS, 64)) | (v >> 4 * BITS & fields(4 * BITS, 64)) << 32;
  v = (v & fields(2 * BITS, 32)) | (v >> 2 * BITS & fields(2 * BITS, 32)) << 16;
  return (v & fields(BITS, 16)) | (v >> BITS & fields(BITS, 16)) << 8;
}
template <int BITS>
uint64_t squeeze(uint64_t v) {
  if (BITS == 8) return v;
  v = (v & fields(BITS, 16)) | (v >> 8 & fields(BITS, 16)) << BITS;
  v = (v & fields(2 * BITS, 32)) | (v >> 16 & fields(2 * BITS, 32)) << 2 * BITS;
  return (v & fields(4 * BITS, 64)) | (v >> 32) << 4 * BITS;
}

template <int BITS>
void unpack_bits(const uint8_t* from, int64_t count, uint8_t offset, uint8_t* codes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f, kTop = ~kLow;
  const uint64_t minus = offset * 0x0101010101010101u;
  const int64_t bytes = ceil_div(count * BITS, 8);
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t at = i / 8 * BITS;
    uint64_t v = 0;
    if (at + 8 <= bytes) std::memcpy(&v, from + at, 8);
    else std::memcpy(&v, from + at, (size_t)(bytes - at < BITS ? bytes - at : BITS));
    v = spread<BITS>(v);
    v = ((v | kTop) - (minus & kLow)) ^ ((v ^ ~minus) & kTop);  // eight differences without borrows between them
    std::memcpy(codes + i, &v, (size_t)(count - i < 8 ? count - i : 8));
  }
}

template <int BITS>
void pack_bits(const uint8_t* codes, int64_t count, uint8_t* to) {
  const int64_t bytes = ceil_div(count * BITS, 8);
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t v = 0;
    std::memcpy(&v, codes + i, (size_t)(count - i < 8 ? count - i : 8));
    v = squeeze<BITS>(v);
    const int64_t at = i / 8 * BITS;
    std::memcpy(to + at, &v, (size_t)(bytes - at < BITS ? bytes - at : BITS));
  }
}

// Calls one of eight instances.
#define BG_FOR_BITS(BITS_NOW, CALL) \
  switch (BITS_NOW) {               \
    case 1: return CALL(1);         \
    case 2: return CALL(2);         \
    case 3: return CALL(3);         \
    case 4: return CALL(4);         \
    case 5: return CALL(5);         \
    case 6: return CALL(6);         \
    case 7: return CALL(7);         \
    default: return CALL(8);        \
  }

}  // namespace

void unpack_row(const WordRows& words, int64_t row, int64_t count, uint8_t offset, uint8_t* codes) {
  const uint8_t* from = words.rows + row * words.stride;
#define BG_CALL(BITS) unpack_bits<BITS>(from, count, offset, codes)
  BG_FOR_BITS(words.bits, BG_CALL)
#undef BG_CALL
}

void pack_row(const uint8_t* codes, int64_t count, int32_t bits, uint8_t* to) {
#define BG_CALL(BITS) pack_bits<BITS>(codes, count, to)
  BG_FOR_BITS(bits, BG_CALL)
#undef BG_CALL
}

}  // namespace bitgrain
