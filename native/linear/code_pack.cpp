#include "floats.h"
#include "linear/code_weights.h"
#include "linear/gather.h"
#include "linear/panels.h"

namespace bitgrain {
namespace {

// One lane of a chunk: `code` as the words of the chunk's vectors, and back.
template <int BITS>
void fold(const uint8_t* code, uint32_t* lane) {
  auto pair = [&](int i) { return (uint32_t)code[2 * i] | (uint32_t)code[2 * i + 1] << 16; };
  constexpr uint32_t kMask = (0xffu >> (8 - BITS)) * 0x00010001u;
  if (BITS == 3) {
    for (int v = 0; v < 3; ++v) {
      lane[v] = (pair(15) >> v & 0x00010001u) << 15;
      for (int i = 0; i < 5; ++i) lane[v] |= (pair(5 * v + i) & kMask) << 3 * i;
    }
  } else {
    lane[0] = 0;
    for (int i = 0; i < 16 / BITS; ++i) lane[0] |= (pair(i) & kMask) << BITS * i;
  }
}
template <int BITS>
void unfold(const uint32_t* lane, uint8_t* code) {
  auto put = [&](int i, uint32_t pair) { code[2 * i] = (uint8_t)pair, code[2 * i + 1] = (uint8_t)(pair >> 16); };
  constexpr uint32_t kMask = (0xffu >> (8 - BITS)) * 0x00010001u;
  if (BITS == 3) {
    uint32_t last = 0;
    for (int v = 0; v < 3; ++v) {
      last |= (lane[v] >> 15 & 0x00010001u) << v;
      for (int i = 0; i < 5; ++i) put(5 * v + i, lane[v] >> 3 * i & kMask);
    }
    put(15, last);
  } else {
    for (int i = 0; i < 16 / BITS; ++i) put(i, lane[0] >> BITS * i & kMask);
  }
}

// Calls f(column of the panel, group, the group's scales and zeros, the column's lane of its first chunk) for all.
template <typename P, typename F>
void visit(const CodeWeights& w, P* at, int64_t panel, const F& f) {
  const int64_t vectors = chunk_vectors(w.bits);
  for (int64_t s = 0; s < w.spans; ++s) {
    P *zeros = at + scales_bytes(w.scale_type), *chunks = zeros + zeros_bytes(w.scale_type, w.zeros);
    for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
      f(c, s, at, zeros, chunks + (c / 16) * vectors * 64 + (c % 16) * 4);
    }
    at = chunks + chunks_of(w, s) * vectors * 2 * 64;
  }
}

template <int BITS>
void pack_panel(const CodeWeights& w, const uint8_t* codes, const void* scale, const float* zero, uint8_t* panel_at,
                int64_t panel) {
  constexpr int64_t kFeatures = chunk_features(BITS), kVectors = chunk_vectors(BITS);
  const size_t size = size_of(w.scale_type);
  std::memset(panel_at, 0, (size_t)w.panel_bytes);
  visit(w, panel_at, panel, [&](int64_t c, int64_t s, uint8_t* scales, uint8_t* zeros, uint8_t* lane) {
    const int64_t index = (panel * kPanel + c) * w.spans + s, count = features_of(w, s);
    std::memcpy(scales + (size_t)c * size, (const uint8_t*)scale + (size_t)index * size, size);
    if (w.zeros == Zeros::codes) zeros[c] = (uint8_t)zero[index];
    if (w.zeros == Zeros::real) std::memcpy(zeros + 4 * c, &zero[index], 4);
    if (w.zeros == Zeros::minima) store_number(zeros, w.scale_type, c, zero[index]);
    const uint8_t* row = codes + c * w.k + s * w.group;
    for (int64_t f = 0; f < count; f += kFeatures, lane += kVectors * 2 * 64) {
      uint8_t some[kFeatures] = {};
      uint32_t words[kVectors];
      if (count - f >= kFeatures) std::memcpy(some, row + f, kFeatures);
      else std::memcpy(some, row + f, (size_t)(count - f));
      fold<BITS>(some, words);
      for (int v = 0; v < kVectors; ++v) std::memcpy(lane + 64 * v, &words[v], 4);
    }
  });
}

// One column's codes of a group.
template <int BITS>
void unfold_group(const uint8_t* lane, int64_t count, uint8_t* codes) {
  constexpr int64_t kFeatures = chunk_features(BITS), kVectors = chunk_vectors(BITS);
  for (int64_t f = 0; f < count; f += kFeatures, lane += kVectors * 2 * 64) {
    uint8_t some[kFeatures];
    uint32_t words[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&words[v], lane + 64 * v, 4);
    unfold<BITS>(words, some);
    std::memcpy(codes + f, some, (size_t)(count - f < kFeatures ? count - f : kFeatures));
  }
}

template <int BITS>
void unpack_panel(const CodeWeights& w, uint8_t* codes, void* scale, float* zero, int64_t panel) {
  const size_t size = size_of(w.scale_type);
  visit(w, w.panels + panel * w.panel_bytes, panel,
        [&](int64_t c, int64_t s, const uint8_t* scales, const uint8_t* zeros, const uint8_t* lane) {
    const int64_t index = (panel * kPanel + c) * w.spans + s, count = features_of(w, s);
    if (scale) std::memcpy((uint8_t*)scale + (size_t)index * size, scales + (size_t)c * size, size);
    if (zero && w.zeros == Zeros::codes) zero[index] = zeros[c];
    if (zero && w.zeros == Zeros::real) std::memcpy(&zero[index], zeros + 4 * c, 4);
    if (zero && w.zeros == Zeros::minima) zero[index] = load_number(zeros, w.scale_type, c);
    unfold_group<BITS>(lane, count, codes + (panel * kPanel + c) * w.k + s * w.group);
  });
}

void pack_one(const CodeWeights& w, const uint8_t* codes, const void* scale, const float* zero, uint8_t* panels,
              int64_t panel) {
  uint8_t* at = panels + panel * w.panel_bytes;
  with_bits(w.bits, [&](auto bits) { pack_panel<bits()>(w, codes, scale, zero, at, panel); });
}

}  // namespace

int64_t lay_out(CodeWeights& w) {
  w.spans = ceil_div(w.k, w.group);
  int64_t chunks = 0;
  for (int64_t s = 0; s < w.spans; ++s) chunks += chunks_of(w, s);
  w.steps = chunks * chunk_features(w.bits) / 2;
  w.panel_bytes = w.spans * code_header_bytes(w.scale_type, w.zeros) + chunks * chunk_vectors(w.bits) * 2 * 64;
  return w.panel_bytes * ceil_div(w.n, kPanel);
}

void set_table(CodeWeights& w, const float* numbers, int64_t count) {
  const int64_t period = int64_t{1} << (w.bits < 4 ? w.bits : 4);
  for (int64_t i = 0; i < 32; ++i) {
    const float number = i % period < count ? numbers[i % period] : 0.f;
    w.table[i % 16] = number, w.words[i] = to_bf16(number);
  }
  for (int i = 0; i < 128; ++i) {
    const uint8_t code = (uint8_t)i;
    const uint16_t word = to_bf16(w.kind == CodeKind::e5m2 ? from_e5m2(code) : from_e4m3(code));
    w.low[i] = (uint8_t)word, w.high[i] = (uint8_t)(word >> 8);
  }
}

void pack_panels(const CodeWeights& w, const uint8_t* codes, const void* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) pack_one(w, codes + p * kPanel * w.k, scale, zero, panels, p);
}

void pack_panels(const CodeWeights& w, const WordRows& words, const void* scale, const float* zero, uint8_t* panels,
                 int64_t first, int64_t last) {
  unpack_words(w, words, first, last,
               [&](const uint8_t* codes, int64_t p) { pack_one(w, codes, scale, zero, panels, p); });
}

void unpack_panels(const CodeWeights& w, uint8_t* codes, void* scale, float* zero, int64_t first, int64_t last) {
  with_bits(w.bits, [&](auto bits) {
    for (int64_t p = first; p < last; ++p) unpack_panel<bits()>(w, codes, scale, zero, p);
  });
}

namespace {

// What a code stands for, as panels hold it.
float number_of(const CodeWeights& w, uint8_t code) {
  switch (w.kind) {
    case CodeKind::integers: return (float)(int8_t)code;
    case CodeKind::e4m3: return from_e4m3(code);
    case CodeKind::e5m2: return from_e5m2(code);
    default: return w.table[code % 16];
  }
}

}  // namespace

int64_t gather_rows(const CodeWeights& w, const int64_t* ids, int64_t count, void* y, DType type, int threads) {
  float numbers[256];
  for (int i = 0; i < 256; ++i) numbers[i] = number_of(w, (uint8_t)i);
  const int64_t vectors = chunk_vectors(w.bits);
  return gather(w.n, w.k, numbers, ids, count, y, type, threads, [&](int64_t row, uint8_t* codes, const auto& f) {
    const int64_t c = row % kPanel;
    const uint8_t* scales = w.panels + row / kPanel * w.panel_bytes;
    for (int64_t s = 0; s < w.spans; ++s) {
      const uint8_t *zeros = scales + scales_bytes(w.scale_type), *chunks = zeros + zeros_bytes(w.scale_type, w.zeros);
      const int64_t count_now = features_of(w, s);
      with_bits(w.bits, [&](auto bits) {
        unfold_group<bits()>(chunks + (c / 16) * vectors * 64 + (c % 16) * 4, count_now, codes + s * w.group);
      });
      Step step{load_any(scales, w.scale_type, c) * w.outer, 0.f, 0.f};
      if (w.zeros == Zeros::codes) step.zero = (float)zeros[c];
      if (w.zeros == Zeros::real) step.zero = load_number(zeros, DType::f32, c);
      if (w.zeros == Zeros::minima) {
        step.zero = w.zero, step.minimum = load_number(zeros, w.scale_type, c) * w.outer;
      }
      f(s * w.group, count_now, step);
      scales = chunks + chunks_of(w, s) * vectors * 2 * 64;
    }
  });
}

}  // namespace bitgrain
