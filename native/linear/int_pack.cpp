#include "floats.h"
#include "linear/int_weights.h"

namespace bitgrain {
namespace {

// Where in a chunk the code of feature f (counted from the chunk's start) of one lane has its bits: calls
// put(byte offset from the lane's first byte of the chunk, shift, which bits of the code: first, count).
template <typename F>
void locate(int bits, int64_t f, const F& put) {
  const int64_t j = f % 4, i = f / 4;
  switch (bits) {
    case 8: put(j, 0, 0, 8); break;
    case 4: put(j, 4 * i, 0, 4); break;
    case 2: put(j, 2 * i, 0, 2); break;
    default:
      put(64 * (i / 4) + j, 2 * (i % 4), 0, 2);
      put(128 + j, i, 2, 1);
  }
}

void store_scale(uint8_t* to, DType type, int64_t column, float value) {
  if (type == DType::f32) {
    std::memcpy(to + 4 * column, &value, 4);
  } else {
    const uint16_t half = type == DType::bf16 ? to_bf16(value) : to_f16(value);
    std::memcpy(to + 2 * column, &half, 2);
  }
}

float load_scale(const uint8_t* from, DType type, int64_t column) {
  if (type == DType::f32) {
    float value;
    std::memcpy(&value, from + 4 * column, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from + 2 * column, 2);
  return type == DType::bf16 ? from_bf16(half) : from_f16(half);
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
  const int64_t features = chunk_features(w.bits), vectors = chunk_vectors(w.bits);
  for (int64_t panel = first; panel < last; ++panel) {
    uint8_t* at = panels + panel * w.panel_bytes;
    std::memset(at, 0, (size_t)w.panel_bytes);
    for (int32_t s = 0; s < w.spans; ++s) {
      const Span& span = w.span[s];
      uint8_t *scales = at + span.offset, *zeros = scales + scales_bytes(w.scale_type);
      uint8_t *sums = zeros + zeros_bytes(w.zeros), *chunks = sums + (w.sums ? kPanel * 4 : 0);
      for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
        const int64_t column = panel * kPanel + c, index = column * w.spans + s;
        store_scale(scales, w.scale_type, c, scale[index]);
        if (w.zeros == Zeros::codes) zeros[c] = (uint8_t)zero[index];
        if (w.zeros == Zeros::real) std::memcpy(zeros + 4 * c, &zero[index], 4);
        const uint8_t* row = codes + column * w.k + span.first;
        uint8_t* lane = chunks + (c / 16) * vectors * 64 + (c % 16) * 4;
        int32_t sum = 0;
        for (int64_t f = 0; f < span.count; ++f) {
          const uint8_t code = row[f];
          sum += w.bits == 8 ? (int32_t)(int8_t)code : (int32_t)code;
          uint8_t* chunk = lane + (f / features) * vectors * 2 * 64;
          locate(w.bits, f % features, [&](int64_t byte, int64_t shift, int low, int count) {
            chunk[byte] |= (uint8_t)((code >> low & ((1 << count) - 1)) << shift);
          });
        }
        if (w.sums) std::memcpy(sums + 4 * c, &sum, 4);
      }
    }
  }
}

void unpack_panels(const IntWeights& w, uint8_t* codes, float* scale, float* zero, int64_t first, int64_t last) {
  const int64_t features = chunk_features(w.bits), vectors = chunk_vectors(w.bits);
  for (int64_t panel = first; panel < last; ++panel) {
    const uint8_t* at = w.panels + panel * w.panel_bytes;
    for (int32_t s = 0; s < w.spans; ++s) {
      const Span& span = w.span[s];
      const uint8_t *scales = at + span.offset, *zeros = scales + scales_bytes(w.scale_type);
      const uint8_t* chunks = zeros + zeros_bytes(w.zeros) + (w.sums ? kPanel * 4 : 0);
      for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
        const int64_t column = panel * kPanel + c, index = column * w.spans + s;
        if (scale) scale[index] = load_scale(scales, w.scale_type, c);
        if (zero && w.zeros == Zeros::codes) zero[index] = zeros[c];
        if (zero && w.zeros == Zeros::real) std::memcpy(&zero[index], zeros + 4 * c, 4);
        uint8_t* row = codes + column * w.k + span.first;
        const uint8_t* lane = chunks + (c / 16) * vectors * 64 + (c % 16) * 4;
        for (int64_t f = 0; f < span.count; ++f) {
          const uint8_t* chunk = lane + (f / features) * vectors * 2 * 64;
          uint8_t code = 0;
          locate(w.bits, f % features, [&](int64_t byte, int64_t shift, int low, int count) {
            code |= (uint8_t)((chunk[byte] >> shift & ((1 << count) - 1)) << low);
          });
          row[f] = code;
        }
      }
    }
  }
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
      const uint8_t* chunks = zeros + zeros_bytes(w.zeros) + (w.sums ? kPanel * 4 : 0);
      const uint8_t* chunk = chunks + f / in_chunk * vectors * 2 * 64;
      for (int64_t c = 0; c < kPanel && panel * kPanel + c < w.n; ++c) {
        const uint8_t* lane = chunk + (c / 16) * vectors * 64 + (c % 16) * 4;
        int code = 0;
        locate(w.bits, f % in_chunk, [&](int64_t byte, int64_t shift, int low, int bits) {
          code |= (lane[byte] >> shift & ((1 << bits) - 1)) << low;
        });
        float zero = (float)w.zero;
        if (w.zeros == Zeros::codes) zero = zeros[c];
        if (w.zeros == Zeros::real) std::memcpy(&zero, zeros + 4 * c, 4);
        const float value = w.bits == 8 ? (float)(int8_t)code : (float)code;
        to[i * w.n + panel * kPanel + c] = (value - zero) * load_scale(scales, w.scale_type, c);
      }
    }
  }
}

}  // namespace bitgrain
