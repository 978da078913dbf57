// Keys and values of the past in few bits: one layout for all instruction sets.
//
// Tokens lie in tiles of kBlock = 64, tile after tile; a tile holds all pairs (batch row, head), [tiles][pairs][bytes].
// The bytes of one pair are 64-byte vectors of 16 lanes of 4 bytes, each with its codes as the weights of
// linear/int_weights.h have them (8 bits: unsigned here):
//
//   keys    [4 runs of 16 tokens][chunks of channels], a lane is a token, its bytes hold the chunk's channels
//   values  [runs of 16 channels][chunks of tokens], a lane is a channel, its bytes hold the chunk's tokens
//
// x = scale (code - zero), both float16, [tiles][pairs][64]: each token of each pair has its own. Those of tokens that were
// never written are 0: the weights of a tile's tokens are rounded in steps of its largest scale.
#pragma once
#include "attention/attention.h"

namespace bitgrain {

constexpr int64_t kMostChannels = 256;  // of a head

struct PackedSide {
  int64_t size;  // channels, a multiple of 16, at most kMostChannels
  int32_t bits;  // 8, 4, 2
  bool values;
  int64_t pairs;
  uint8_t* codes;
  uint16_t *scales, *zeros;
};

static inline constexpr int64_t tile_bytes(const PackedSide& side) { return kBlock * side.size * side.bits / 8; }

// Tokens [first, first + tokens) of keys and values.
struct PackedTokens {
  int64_t first, tokens;
  PackedSide k, v;
};

// Tokens as they come: x [batch, heads, tokens, size] with strides in elements, the last axis contiguous.
struct StatesJob {
  const PackedSide* side;
  void* x;
  DType type;
  int64_t heads;
  int64_t stride[3];
  int64_t first, tokens;  // where they go or come from
};

// The queries of one batch row and group as sums of whole numbers: q = step sum_p 256^(planes - 1 - p) byte_p.
// Products with codes are exact integers then. Two planes: an error of 1.6e-5 of the row's largest magnitude, which is
// small beside the rounding of 16-bit floats; three: 6e-8 of it.
constexpr int64_t kMostPlanes = 3;

static inline constexpr int32_t planes_of(DType type) { return type == DType::f32 ? 3 : 2; }

}  // namespace bitgrain
