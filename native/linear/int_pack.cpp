#include "floats.h"
#include "linear/gather.h"
#include "linear/int_weights.h"
#include "linear/panels.h"

namespace bitgrain {
namespace {

template <int BITS>
constexpr uint32_t kMask = (0xffu >> (8 - BITS)) * 0x01010101u;

// One lane of a chunk: four codes in each word of `codes` -> the words of the chunk's vectors, and back.
template <int BITS>
void fold(const uint32_t* codes, uint32_t* lane) {
  if (BITS == 3) {
    lane[0] = lane[1] = lane[2] = 0;
    for (int i = 0; i < 8; ++i) {
      lane[i / 4] |= (codes[i] & 0x03030303u) << 2 * (i % 4);
      lane[2] |= (codes[i] >> 2 & 0x01010101u) << i;
    }
  } else {
    lane[0] = 0;
    for (int i = 0; i < 8 / BITS; ++i) lane[0] |= (codes[i] & kMask<BITS>) << BITS * i;
  }
}
template <int BITS>
void unfold(const uint32_t* lane, uint32_t* codes) {
  if (BITS == 3) {
    for (int i = 0; i < 8; ++i) {
      codes[i] = (lane[i / 4] >> 2 * (i % 4) & 0x03030303u) | (lane[2] >> i & 0x01010101u) << 2;
    }
  } else {
    for (int i = 0; i < 8 / BITS; ++i) codes[i] = lane[0] >> BITS * i & kMask<BITS>;
  }
}

// One column's codes of a span, to the lane of each chunk; returns their sum.
template <int BITS>
int32_t fold_span(const uint8_t* codes, int64_t count, uint8_t* lane) {
  constexpr int64_t kFeatures = chunk_features(BITS), kVectors = chunk_vectors(BITS);
  int32_t sum = 0;
  for (int64_t f = 0; f < count; ++f) sum += BITS == 8 ? (int32_t)(int8_t)codes[f] : (int32_t)codes[f];
  for (int64_t f = 0; f < count; f += kFeatures, lane += kVectors * 2 * 64) {
    uint32_t some[kFeatures / 4] = {}, words[kVectors];
    if (count - f >= kFeatures) std::memcpy(some, codes + f, kFeatures);
    else std::memcpy(some, codes + f, (size_t)(count - f));
    fold<BITS>(some, words);
    for (int v = 0; v < kVectors; ++v) std::memcpy(lane + 64 * v, &words[v], 4);
  }
  return sum;
}
template <int BITS>
void unfold_span(const uint8_t* lane, int64_t count, uint8_t* codes) {
  constexpr int64_t kFeatures = chunk_features(BITS), kVectors = chunk_vectors(BITS);
  for (int64_t f = 0; f < count; f += kFeatures, lane += kVectors * 2 * 64) {
    uint32_t some[kFeatures / 4], words[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&words[v], lane + 64 * v, 4);
    unfold<BITS>(words, some);
    std::memcpy(codes + f, some, (size_t)(count - f < kFeatures ? count - f : kFeatures));
  }
}

float zero_at(const IntWeights& w, const uint8_t* zeros, int64_t c) {
  if (w.zeros == Zeros::constant || w.zeros == Zeros::minima) return (float)w.zero;
  return w.zeros == Zeros::codes ? (float)zeros[c] : load_number(zeros, DType::f32, c);
}

float minimum_at(const IntWeights& w, const uint8_t* zeros, int64_t c) {
  return w.zeros == Zeros::minima ? load_number(zeros, w.scale_type, c) : 0.f;
}

// One code of a lane; f: counted from the chunk's start.
uint8_t code_at(int bits, const uint8_t* lane, int64_t f) {
  const int64_t j = f % 4, i = f / 4;
  if (bits == 3) return (uint8_t)((lane[64 * (i / 4) + j] >> 2 * (i % 4) & 3) | (lane[128 + j] >> i & 1) << 2);
  return (uint8_t)(lane[j] >> bits * i & ((1 << bits) - 1));
}

// One panel; codes: of its columns, `w.k` bytes each.
template <int BITS>
void pack_panel(const IntWeights& w, const uint8_t* codes, const float* scale, const float* zero, uint8_t* at,
                int64_t panel) {
  std::memset(at, 0, (size_t)w.panel_bytes);
  for (int32_t s = 0; s < w.spans; ++s) {
    const Span& span = w.span[s];
    uint8_t *scales = at + span.offset, *zeros = scales + scales_bytes(w.scale_type);
    uint8_t *sums = zeros + zeros_bytes(w.scale_type, w.zeros), *chunks = sums + (w.sums ? kPanel * 4 : 0);
    for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
      const int64_t index = (panel * kPanel + c) * w.spans + s;
      store_number(scales, w.scale_type, c, scale[index]);
      if (w.zeros == Zeros::codes) zeros[c] = (uint8_t)zero[index];
      if (w.zeros == Zeros::real) std::memcpy(zeros + 4 * c, &zero[index], 4);
      if (w.zeros == Zeros::minima) store_number(zeros, w.scale_type, c, zero[index]);
      uint8_t* lane = chunks + (c / 16) * chunk_vectors(BITS) * 64 + (c % 16) * 4;
      const int32_t sum = fold_span<BITS>(codes + c * w.k + span.first, span.count, lane);
      if (w.sums) std::memcpy(sums + 4 * c, &sum, 4);
    }
  }
}

template <int BITS>
void unpack_panel(const IntWeights& w, uint8_t* codes, float* scale, float* zero, int64_t panel) {
  const uint8_t* at = w.panels + panel * w.panel_bytes;
  for (int32_t s = 0; s < w.spans; ++s) {
    const Span& span = w.span[s];
    const uint8_t *scales = at + span.offset, *zeros = scales + scales_bytes(w.scale_type);
    const uint8_t* chunks = zeros + zeros_bytes(w.scale_type, w.zeros) + (w.sums ? kPanel * 4 : 0);
    for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
      const int64_t column = panel * kPanel + c, index = column * w.spans + s;
      if (scale) scale[index] = load_number(scales, w.scale_type, c);
      if (zero && w.zeros == Zeros::codes) zero[index] = zeros[c];
      if (zero && w.zeros == Zeros::real) std::memcpy(&zero[index], zeros + 4 * c, 4);
      if (zero && w.zeros == Zeros::minima) zero[index] = load_number(zeros, w.scale_type, c);
      const uint8_t* lane = chunks + (c / 16) * chunk_vectors(BITS) * 64 + (c % 16) * 4;
      unfold_span<BITS>(lane, span.count, codes + column * w.k + span.first);
    }
  }
}

void pack_one(const IntWeights& w, const uint8_t* codes, const float* scale, const float* zero, uint8_t* panels,
              int64_t panel) {
  uint8_t* at = panels + panel * w.panel_bytes;
  with_bits(w.bits, [&](auto bits) { pack_panel<bits()>(w, codes, scale, zero, at, panel); });
}

}  // namespace

int64_t lay_out(IntWeights& w, const int32_t* lengths, int32_t count, Span* span) {
  const int64_t features = chunk_features(w.bits), header = header_bytes(w.scale_type, w.zeros, w.sums);
  int64_t first = 0, offset = 0, steps = 0;
  for (int32_t s = 0; s < count; ++s) {
    span[s].first = (int32_t)first, span[s].count = lengths[s];
    span[s].chunks = (int32_t)ceil_div(lengths[s], features);
    span[s].step = (int32_t)steps, span[s].offset = offset;
    span[s].a_scale = 1.f, span[s].a_zero = 0;
    first += lengths[s];
    steps += span[s].chunks * features / 4;
    offset += header + span[s].chunks * chunk_vectors(w.bits) * 2 * 64;
  }
  w.k = first, w.spans = count, w.span = span, w.steps = steps, w.panel_bytes = offset;
  return offset * ceil_div(w.n, kPanel);
}

void pack_panels(const IntWeights& w, const uint8_t* codes, const float* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) pack_one(w, codes + p * kPanel * w.k, scale, zero, panels, p);
}

void pack_panels(const IntWeights& w, const WordRows& words, const float* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last) {
  unpack_words(w, words, first, last,
               [&](const uint8_t* codes, int64_t p) { pack_one(w, codes, scale, zero, panels, p); });
}

void unpack_panels(const IntWeights& w, uint8_t* codes, float* scale, float* zero, int64_t first, int64_t last) {
  with_bits(w.bits, [&](auto bits) {
    for (int64_t p = first; p < last; ++p) unpack_panel<bits()>(w, codes, scale, zero, p);
  });
}

void dequantize_features(const IntWeights& w, const int64_t* features, int64_t count, float* to, int64_t first,
                         int64_t last) {
  const int64_t in_chunk = chunk_features(w.bits), vectors = chunk_vectors(w.bits);
  for (int64_t i = 0; i < count; ++i) {
    int32_t s = 0;
    while (w.span[s].first + w.span[s].count <= features[i]) ++s;
    const Span& span = w.span[s];
    const int64_t f = features[i] - span.first;
    for (int64_t panel = first; panel < last; ++panel) {
      const uint8_t *scales = w.panels + panel * w.panel_bytes + span.offset, *zeros = scales + scales_bytes(w.scale_type);
      const uint8_t* chunks = zeros + zeros_bytes(w.scale_type, w.zeros) + (w.sums ? kPanel * 4 : 0);
      const uint8_t* chunk = chunks + f / in_chunk * vectors * 2 * 64;
      for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
        const uint8_t* lane = chunk + (c / 16) * vectors * 64 + (c % 16) * 4;
        const uint8_t code = code_at(w.bits, lane, f % in_chunk);
        const float zero = zero_at(w, zeros, c);
        const float value = w.bits == 8 ? (float)(int8_t)code : (float)code;
        const float scaled = (value - zero) * load_number(scales, w.scale_type, c);
        to[i * w.n + panel * kPanel + c] = scaled - minimum_at(w, zeros, c);
      }
    }
  }
}

int64_t gather_rows(const IntWeights& w, const int64_t* ids, int64_t count, void* y, DType type, int threads) {
  float numbers[256];
  for (int i = 0; i < 256; ++i) numbers[i] = w.bits == 8 ? (float)(int8_t)i : (float)i;
  return gather(w.n, w.k, numbers, ids, count, y, type, threads, [&](int64_t row, uint8_t* codes, const auto& f) {
    const int64_t c = row % kPanel;
    for (int32_t s = 0; s < w.spans; ++s) {
      const Span& span = w.span[s];
      const uint8_t* scales = w.panels + row / kPanel * w.panel_bytes + span.offset;
      const uint8_t* zeros = scales + scales_bytes(w.scale_type);
      const uint8_t* chunks = zeros + zeros_bytes(w.scale_type, w.zeros) + (w.sums ? kPanel * 4 : 0);
      const uint8_t* lane = chunks + (c / 16) * chunk_vectors(w.bits) * 64 + (c % 16) * 4;
      with_bits(w.bits, [&](auto bits) { unfold_span<bits()>(lane, span.count, codes + span.first); });
      f(span.first, span.count,
        Step{load_number(scales, w.scale_type, c), zero_at(w, zeros, c), minimum_at(w, zeros, c)});
    }
  });
}

}  // namespace bitgrain
