// Panels of packed integer weights against tiles of quantized activations, on the matrix unit; see inl/matrix.inl.h.
//
// A run of up to kMatrixSteps steps of a panel is unpacked once for all tiles of rows, less the weights' zero points
// where those are codes: what is left fits a byte, and needs no correction later. Codes of 8 bits are read as they lie.
namespace bitgrain {
namespace BG_ISA {

constexpr int64_t kIntMatrixRows = 12;  // from so many rows on the unit is faster than registers
constexpr int64_t kMatrixSteps = 8;     // 16 KB of unpacked weights, beside as many bytes of two tiles of inputs

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
  bool shifts;  // whether there is something to take off
};

constexpr int32_t kMostTaken = 127;  // off codes of fewer than 8 bits, whose difference then fits a byte

template <int BITS>
BG_INLINE I32 zero_codes(const IntWeights& w, const uint8_t* header, int v) {
  if (BITS == 8 || w.zeros == Zeros::real) return zero_i();
  if (w.zeros != Zeros::codes) return set_i(w.zero);  // uses_matrix has seen it
  return min_i(load_u8_i(header + scales_bytes(w.scale_type) + 16 * v), set_i(kMostTaken));
}

template <int BITS>
BG_INLINE SpanScales span_scales(const IntWeights& w, const Span& span, const uint8_t* header) {
  const uint8_t* zeros = header + scales_bytes(w.scale_type);
  SpanScales of;
  of.shifts = w.zeros == Zeros::real || w.zeros == Zeros::minima;
  for (int v = 0; v < 2; ++v) {
    of.scale[v] = mul_f(load_scales(header, w.scale_type, 16 * v), set_f(span.a_scale));
    of.start[v] = zero_i(), of.shift[v] = zero_f();
    if (w.sums) {
      const I32 codes = load_i(zeros + zeros_bytes(w.scale_type, w.zeros) + 64 * v);
      const I32 real = mul_i(zero_codes<BITS>(w, header, v), set_i(-span.count));
      of.start[v] = mul_i(add_i(codes, real), set_i(-span.a_zero));
    }
    if (w.zeros == Zeros::real) of.shift[v] = mul_f(load_f((const float*)zeros + 16 * v), of.scale[v]);
    if (w.zeros == Zeros::codes) {
      const F32 rest = sub_f(to_float(load_u8_i(zeros + 16 * v)), to_float(zero_codes<BITS>(w, header, v)));
      of.shift[v] = mul_f(rest, of.scale[v]);
      of.shifts |= any_greater(rest, zero_f());
    }
    if (w.zeros == Zeros::minima) {
      of.shift[v] = mul_f(load_scales(zeros, w.scale_type, 16 * v), set_f(span.a_scale));
      if (BITS == 8) of.shift[v] = fma_f(set_f((float)w.zero), of.scale[v], of.shift[v]);
    }
  }
  return of;
}

// Sums of a tile of rows against a span: found [2][16][16], of the rows' inputs sums [16].
struct FoundSums {
  const int32_t *found, *sums;
  const SpanScales* of;
  bool add;          // the inputs' sums belong to the integers
  bool first, last;  // of the spans
};

// total [16][32] = total + scale * (found + start + add) - shift * sums; LAST: that are outputs, of rows `row` on. START:
// there is something to add to the integers; SHIFT: something to take off.
template <bool START, bool SHIFT, bool LAST>
static void add_matrix_sums(const IntPanelJob& job, const FoundSums& one, int64_t panel, int64_t row, float* total) {
  const float* before = one.first ? kNoSums : total;
  const int64_t left = job.m - row, rows = LAST && left < kMatrixTile ? left : kMatrixTile;
  for (int64_t r = 0; r < rows; ++r) {
    F32 y[2];
    BG_UNROLL for (int v = 0; v < 2; ++v) {
      I32 whole = load_i(one.found + (v * 16 + r) * 16);
      if (START) whole = add_i(whole, add_i(one.of->start[v], set_i(one.add ? one.sums[r] : 0)));
      y[v] = fma_f(to_float(whole), one.of->scale[v], load_f(before + r * kPanel + 16 * v));
      if (SHIFT) y[v] = fnma_f(one.of->shift[v], set_f((float)one.sums[r]), y[v]);
      if (!LAST) store_f(total + r * kPanel + 16 * v, y[v]);
    }
    BG_UNROLL for (int v = 0; LAST && v < 2; ++v) finish_sums(job, panel * kPanel + 16 * v, row + r, y[v]);
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

// Where step `done` of a span begins; the next panel follows the last span.
template <int BITS>
BG_INLINE const uint8_t* parts_at(const IntWeights& w, const uint8_t* header, int64_t done) {
  const int64_t chunk = done * kMatrixBytes / chunk_features(BITS);
  return header + (done > 0 ? header_bytes(w.scale_type, w.zeros, w.sums) + chunk * 2 * 64 * chunk_vectors(BITS) : 0);
}

template <int BITS, int T>
static void multiply_parts(const IntPanelJob& job, int64_t panel, const MatrixPart* parts, int count,
                           const SpanScales* of, int64_t tile) {
  constexpr MatrixKind kKind = BITS == 8 ? MatrixKind::unsigned_signed : MatrixKind::signed_signed;
  const IntWeights& w = *job.w;
  const int64_t x_tile = job.row_bytes * kMatrixTile, place = (tile - job.first_tile) * kMatrixSums;
  const uint8_t* x = job.bytes + tile * x_tile;
  const bool add = BITS == 8 && w.zeros == Zeros::constant && w.zero != 0, start = add || w.sums;
  for (int i = 0; i < count; ++i) {
    const MatrixPart& part = parts[i];
    alignas(64) int32_t own[T * kMatrixSums];
    int32_t* found = part.first && part.last ? own : job.partial + place;
    multiply_matrix<kKind, T>(x + part.x_step * 1024, x_tile, part.weights, part.steps, !part.first, found);
    if (!part.last) continue;
    for (int t = 0; t < T; ++t) {
      const int32_t* sums = job.sums + ((tile + t) * w.spans + part.index) * kMatrixTile;
      const FoundSums one{found + t * kMatrixSums, sums, of + i, add, part.index == 0, part.index + 1 == w.spans};
      const int64_t row = (tile + t) * kMatrixTile;
      float* total = job.totals + place + t * kMatrixSums;
      if (one.last) add_matrix_sums<true, true, true>(job, one, panel, row, total);
      else if (start && of[i].shifts) add_matrix_sums<true, true, false>(job, one, panel, row, total);
      else if (start) add_matrix_sums<true, false, false>(job, one, panel, row, total);
      else if (of[i].shifts) add_matrix_sums<false, true, false>(job, one, panel, row, total);
      else add_matrix_sums<false, false, false>(job, one, panel, row, total);
    }
  }
}

template <int BITS>
static void int_matrix_panel(const IntPanelJob& job, int64_t panel) {
  const IntWeights& w = *job.w;
  alignas(64) uint8_t room[kMatrixSteps * kMatrixStep];
  const uint8_t* header = w.panels + panel * w.panel_bytes;
  int64_t done = 0, x_step = 0;
  for (int32_t s = 0; s < w.spans;) {
    MatrixPart parts[kMatrixSteps];
    SpanScales of[kMatrixSteps];
    const uint8_t* from = parts_at<BITS>(w, header, done);
    const int count = next_parts<BITS>(w, header, s, done, x_step, room, parts);
    for (int i = 0; i < count; ++i) of[i] = span_scales<BITS>(w, *parts[i].span, parts[i].header);
    const uint8_t* next = parts_at<BITS>(w, header, done);
    Ahead ahead(next, next - from, ceil_div(job.last_tile - job.first_tile, 2));
    int64_t tile = job.first_tile;
    for (; tile + 2 <= job.last_tile; tile += 2) {
      ahead.fetch();
      multiply_parts<BITS, 2>(job, panel, parts, count, of, tile);
    }
    if (tile < job.last_tile) ahead.fetch(), multiply_parts<BITS, 1>(job, panel, parts, count, of, tile);
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
