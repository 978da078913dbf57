// Panels of packed integer weights against tiles of quantized activations, on the matrix unit; see inl/matrix.inl.h.
//
// A run of up to kMatrixSteps steps of a panel is unpacked once for all tiles of rows, less the weights' zero points
// where those are codes: what is left fits a byte, and needs no correction later. Codes of 8 bits are read as they lie.
namespace bitgrain {
namespace BG_ISA {

constexpr int64_t kIntMatrixRows = 8;  // from so many rows on the unit is faster than registers
constexpr int64_t kMatrixSteps = 8;  // 16 KB of unpacked weights, beside as many bytes of two tiles of inputs

// A part of a span in a run of steps.
struct MatrixPart {
  const Span* span;
  int32_t index;         // of the span
  int64_t x_step, steps;
  const uint8_t* header;
  const uint8_t* weights;
  bool first, last;      // of the span's parts
};

// What the sums of a span are to be multiplied with, and what comes to them.
struct SpanScales {
  F32 scale[2], shift[2];
  I32 start[2];
};

template <int BITS>
BG_INLINE I32 zero_codes(const IntWeights& w, const uint8_t* header, int v) {  // taken off codes of fewer than 8 bits
  if (BITS == 8 || w.zeros == Zeros::real) return zero_i();
  if (w.zeros == Zeros::codes) return load_u8_i(header + scales_bytes(w.scale_type) + 16 * v);
  return set_i(w.zero);
}

template <int BITS>
BG_INLINE SpanScales span_scales(const IntWeights& w, const Span& span, const uint8_t* header) {
  const uint8_t* zeros = header + scales_bytes(w.scale_type);
  SpanScales of;
  for (int v = 0; v < 2; ++v) {
    of.scale[v] = mul_f(load_scales(header, w.scale_type, 16 * v), set_f(span.a_scale));
    of.start[v] = zero_i(), of.shift[v] = zero_f();
    if (w.sums) {
      const I32 codes = load_i(zeros + zeros_bytes(w.scale_type, w.zeros) + 64 * v);
      const I32 real = mul_i(zero_codes<BITS>(w, header, v), set_i(-span.count));
      of.start[v] = mul_i(add_i(codes, real), set_i(-span.a_zero));
    }
    if (w.zeros == Zeros::real) of.shift[v] = mul_f(load_f((const float*)zeros + 16 * v), of.scale[v]);
    if (w.zeros == Zeros::codes && BITS == 8) of.shift[v] = mul_f(to_float(load_u8_i(zeros + 16 * v)), of.scale[v]);
    if (w.zeros == Zeros::minima) {
      of.shift[v] = mul_f(load_scales(zeros, w.scale_type, 16 * v), set_f(span.a_scale));
      if (BITS == 8) of.shift[v] = fma_f(set_f((float)w.zero), of.scale[v], of.shift[v]);
    }
  }
  return of;
}

// total [16][32] += scale * (found [2][16][16] + start + add) - shift * sums. START: there is something to add to the
// integers; SHIFT: something to take off. sums: of the rows' inputs, `add` if they belong to the integers.
template <bool START, bool SHIFT>
static void add_matrix_sums(const int32_t* found, const SpanScales& of, const int32_t* sums, bool add, float* total) {
  for (int r = 0; r < kMatrixTile; ++r) {
    BG_UNROLL for (int v = 0; v < 2; ++v) {
      I32 whole = load_i(found + (v * 16 + r) * 16);
      if (START) whole = add_i(whole, add_i(of.start[v], set_i(add ? sums[r] : 0)));
      F32 y = fma_f(to_float(whole), of.scale[v], load_f(total + r * kPanel + 16 * v));
      if (SHIFT) y = fnma_f(of.shift[v], set_f((float)sums[r]), y);
      store_f(total + r * kPanel + 16 * v, y);
    }
  }
}

// Chunks [first, first + count) of a span to bytes, as chunks of 8 bits lie.
template <int BITS>
static void unpack_chunks(const IntWeights& w, const uint8_t* header, const uint8_t* p, int64_t count, uint8_t* to) {
  constexpr int kSteps = Codes<BITS>::kSteps, kHalf = Codes<BITS>::kVectors * 64;
  Bytes zero[2];
  for (int v = 0; v < 2; ++v) {
    const I32 one = zero_codes<BITS>(w, header, v), two = or_i(one, shift_left_i<8>(one));
    zero[v] = or_i(two, shift_left_i<16>(two));
  }
  for (int64_t c = 0; c < count; ++c, p += 2 * kHalf) {
    BG_UNROLL for (int i = 0; i < 2 * kHalf / 64; ++i) prefetch(p + kAhead + 64 * i);
    BG_UNROLL for (int i = 0; i < kSteps; ++i) BG_UNROLL for (int v = 0; v < 2; ++v, to += 64)
        store_i(to, sub_bytes(Codes<BITS>::step(p + v * kHalf, i), zero[v]));
  }
}

// Parts of the next run of steps, from step `done` of span `s` on; both move on.
template <int BITS>
static int next_parts(const IntWeights& w, const uint8_t*& header, int32_t& s, int64_t& done, int64_t& x_step,
                      uint8_t* room, MatrixPart* parts) {
  constexpr int64_t kFeatures = chunk_features(BITS), kChunk = 2 * 64 * chunk_vectors(BITS);
  const int64_t header_size = header_bytes(w.scale_type, w.zeros, w.sums);
  int count = 0;
  for (int64_t left = kMatrixSteps; s < w.spans && left > 0;) {
    const Span& span = w.span[s];
    const int64_t whole = matrix_steps(span.chunks * kFeatures), rest = whole - done;
    if (rest > left && count > 0) break;  // begins in the next run
    const int64_t now = rest < left ? rest : left, chunk = done * kMatrixBytes / kFeatures;
    const int64_t chunks_now = now * kMatrixBytes / kFeatures, chunks_left = span.chunks - chunk;
    const uint8_t* codes = header + header_size + chunk * kChunk;
    MatrixPart& part = parts[count++];
    part = {&span, s, x_step, now, header, room, done == 0, now == rest};
    if (BITS == 8 && chunks_now <= chunks_left) {
      part.weights = codes;
    } else {
      unpack_chunks<BITS>(w, header, codes, chunks_now < chunks_left ? chunks_now : chunks_left, room);
      room += now * kMatrixStep;
    }
    done += now, left -= now, x_step += now;
    if (now == rest) header += header_size + span.chunks * kChunk, ++s, done = 0;
  }
  return count;
}

template <int BITS, int T>
static void multiply_parts(const IntPanelJob& job, const MatrixPart* parts, int count, const SpanScales* of, int64_t tile,
                           int64_t place) {
  constexpr MatrixKind kKind = BITS == 8 ? MatrixKind::unsigned_signed : MatrixKind::signed_signed;
  const IntWeights& w = *job.w;
  const int64_t x_tile = job.row_bytes * kMatrixTile;
  const uint8_t* x = job.bytes + tile * x_tile;
  const int32_t* sums = job.sums + tile * kMatrixTile * w.spans;
  int32_t* kept = job.partial + place * kMatrixSums;
  const bool add = BITS == 8 && w.zeros == Zeros::constant && w.zero != 0, start = add || w.sums;
  const bool shift = w.zeros == Zeros::real || w.zeros == Zeros::minima || (w.zeros == Zeros::codes && BITS == 8);
  for (int i = 0; i < count; ++i) {
    const MatrixPart& part = parts[i];
    alignas(64) int32_t own[T * kMatrixSums];
    int32_t* found = part.first && part.last ? own : kept;
    multiply_matrix<kKind, T>(x + part.x_step * 1024, x_tile, part.weights, part.steps, !part.first, found);
    if (!part.last) continue;
    for (int t = 0; t < T; ++t) {
      const int32_t *ints = found + t * kMatrixSums, *of_rows = sums + (t * w.spans + part.index) * kMatrixTile;
      float* total = job.totals + (place + t) * kMatrixSums;
      if (start && shift) add_matrix_sums<true, true>(ints, of[i], of_rows, add, total);
      else if (start) add_matrix_sums<true, false>(ints, of[i], of_rows, add, total);
      else if (shift) add_matrix_sums<false, true>(ints, of[i], of_rows, add, total);
      else add_matrix_sums<false, false>(ints, of[i], of_rows, add, total);
    }
  }
}

template <int BITS>
static void int_matrix_panel(const IntPanelJob& job, int64_t panel) {
  const IntWeights& w = *job.w;
  const int64_t tiles = job.last_tile - job.first_tile;
  for (int64_t i = 0; i < tiles * kMatrixSums; i += 16) store_f(job.totals + i, zero_f());
  alignas(64) uint8_t room[kMatrixSteps * kMatrixStep];
  const uint8_t* header = w.panels + panel * w.panel_bytes;
  int64_t done = 0, x_step = 0;
  for (int32_t s = 0; s < w.spans;) {
    MatrixPart parts[kMatrixSteps];
    SpanScales of[kMatrixSteps];
    const int count = next_parts<BITS>(w, header, s, done, x_step, room, parts);
    for (int i = 0; i < count; ++i) of[i] = span_scales<BITS>(w, *parts[i].span, parts[i].header);
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2) multiply_parts<BITS, 2>(job, parts, count, of, job.first_tile + t, t);
    if (t < tiles) multiply_parts<BITS, 1>(job, parts, count, of, job.first_tile + t, t);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = (job.first_tile + t) * kMatrixTile, left = job.m - row;
    for (int64_t r = 0; r < kMatrixTile && r < left; ++r) {
      finish_tile(job, panel * kPanel, row + r, 1, 2, job.totals + t * kMatrixSums + r * kPanel);
    }
  }
}

static void quantize_matrix(const ActivationJob& job, int64_t first, int64_t last) {
  quantize_rows<true>(job, first, last);
}

static void int_matrix(const IntPanelJob& job, int64_t first, int64_t last) {
  const MatrixUnit unit;
  for (int64_t panel = first; panel < last; ++panel) {
    switch (job.w->bits) {
      case 8: int_matrix_panel<8>(job, panel); break;
      case 4: int_matrix_panel<4>(job, panel); break;
      case 3: int_matrix_panel<3>(job, panel); break;
      default: int_matrix_panel<2>(job, panel);
    }
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
