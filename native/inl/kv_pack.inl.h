// Tokens into and out of packed tiles, see attention/packed.h.
#include "floats.h"

namespace bitgrain {
namespace BG_ISA {

// Codes of one token in bytes; false for NaN, Inf, or a scale beyond float16. The arithmetic is that of
// numerics.quantize: limits with 0 among them, a real zero point in steps of the scale as it is stored.
template <DType T>
static bool quantize_token(const void* x, int64_t size, int32_t bits, uint8_t* codes, uint16_t* scale, uint16_t* zero) {
  F32 low = zero_f(), high = zero_f(), bad = zero_f();
  for (int64_t c = 0; c < size; c += 16) {
    const F32 v = load_elements<T>(x, c, 16);
    low = max_f(sub_f(zero_f(), v), low);
    high = max_f(v, high);
    bad = add_f(bad, sub_f(v, v));
  }
  const float most = (float)((1 << bits) - 1), least = max_of_f(low), largest = max_of_f(high);
  const float ideal = (largest + least) / most;
  if (!(sum_f(bad) == 0.f) || ideal > 65504.f) return false;
  float step = ideal == 0.f ? 1.f : from_f16(to_f16(ideal));
  if (step == 0.f) step = from_f16(1);
  const float offset = from_f16(to_f16(least / (ideal > 0.f ? ideal : 1.f) * (ideal > 0.f ? ideal / step : 1.f)));
  *scale = to_f16(step), *zero = to_f16(offset);
  for (int64_t c = 0; c < size; c += 16) {
    const F32 v = add_f(div_f(load_elements<T>(x, c, 16), set_f(step)), set_f(offset));
    store_low_bytes(codes + c, round_to_int(min_f(max_f(v, zero_f()), set_f(most))));
  }
  return true;
}

// Where code f of a chunk is in its lane: byte, shift.
BG_INLINE int64_t byte_of(int64_t f) { return f % 4; }
BG_INLINE int64_t shift_of(int64_t f, int32_t bits) { return f / 4 * bits; }

static void put_codes(const PackedSide& side, uint8_t* tile, int64_t token, const uint8_t* codes) {
  const int64_t in_chunk = 32 / side.bits, size = side.size;
  if (!side.values) {
    uint8_t* lane = tile + token / 16 * (size / in_chunk) * 64 + token % 16 * 4;
    for (int64_t c = 0; c < size; c += in_chunk, lane += 64) {
      uint8_t word[4] = {0, 0, 0, 0};
      for (int64_t f = 0; f < in_chunk; ++f) word[byte_of(f)] |= (uint8_t)(codes[c + f] << shift_of(f, side.bits));
      std::memcpy(lane, word, 4);
    }
    return;
  }
  const int64_t f = token % in_chunk, shift = shift_of(f, side.bits), run = kBlock / in_chunk * 64;
  const uint8_t kept = (uint8_t)~(((1 << side.bits) - 1) << shift);
  uint8_t* byte = tile + token / in_chunk * 64 + byte_of(f);
  for (int64_t c = 0; c < size; ++c) {
    uint8_t* to = byte + c / 16 * run + c % 16 * 4;
    *to = (uint8_t)((*to & kept) | codes[c] << shift);
  }
}

static void get_codes(const PackedSide& side, const uint8_t* tile, int64_t token, uint8_t* codes) {
  const int64_t in_chunk = 32 / side.bits, size = side.size;
  const uint8_t mask = (uint8_t)((1 << side.bits) - 1);
  if (!side.values) {
    const uint8_t* lane = tile + token / 16 * (size / in_chunk) * 64 + token % 16 * 4;
    for (int64_t c = 0; c < size; c += in_chunk, lane += 64) {
      for (int64_t f = 0; f < in_chunk; ++f) codes[c + f] = lane[byte_of(f)] >> shift_of(f, side.bits) & mask;
    }
    return;
  }
  const int64_t f = token % in_chunk, shift = shift_of(f, side.bits), run = kBlock / in_chunk * 64;
  const uint8_t* byte = tile + token / in_chunk * 64 + byte_of(f);
  for (int64_t c = 0; c < size; ++c) codes[c] = byte[c / 16 * run + c % 16 * 4] >> shift & mask;
}

template <DType T>
static bool pack_states_of(const StatesJob& job, int64_t pair) {
  const PackedSide& side = *job.side;
  const uint8_t* x = (const uint8_t*)job.x +
                     (pair / job.heads * job.stride[0] + pair % job.heads * job.stride[1]) * (int64_t)size_of(T);
  for (int64_t t = 0; t < job.tokens; ++t) {
    const int64_t token = (job.first + t) % kBlock, at = (job.first + t) / kBlock * side.pairs + pair;
    uint8_t codes[kMostChannels];
    if (!quantize_token<T>(x + t * job.stride[2] * (int64_t)size_of(T), side.size, side.bits, codes,
                           side.scales + at * kBlock + token, side.zeros + at * kBlock + token)) {
      return false;
    }
    put_codes(side, side.codes + at * tile_bytes(side), token, codes);
  }
  return true;
}

// Tokens of one pair (batch row, head); false where they cannot be rounded.
static bool pack_states(const StatesJob& job, int64_t pair) {
  if (job.type == DType::f32) return pack_states_of<DType::f32>(job, pair);
  return job.type == DType::bf16 ? pack_states_of<DType::bf16>(job, pair) : pack_states_of<DType::f16>(job, pair);
}

static void read_states(const StatesJob& job, int64_t pair) {
  const PackedSide& side = *job.side;
  for (int64_t t = 0; t < job.tokens; ++t) {
    const int64_t token = (job.first + t) % kBlock, at = (job.first + t) / kBlock * side.pairs + pair;
    uint8_t codes[kMostChannels];
    get_codes(side, side.codes + at * tile_bytes(side), token, codes);
    const F32 step = set_f(from_f16(side.scales[at * kBlock + token]));
    const F32 zero = set_f(from_f16(side.zeros[at * kBlock + token]));
    const int64_t to = pair / job.heads * job.stride[0] + pair % job.heads * job.stride[1] + t * job.stride[2];
    for (int64_t c = 0; c < side.size; c += 16) {
      const F32 code = to_float(load_u8_i(codes + c));
      store_elements(job.x, job.type, to + c, 16, mul_f(sub_f(code, zero), step));
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
