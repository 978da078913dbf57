// Attention over packed keys and values, see attention/packed.h. Queries, and weights times the scales of values, are
// sums of `PLANES` bytes, so that all products with codes are exact integers.
namespace bitgrain {
namespace BG_ISA {

template <int BITS>
BG_INLINE void unpack_codes(const uint8_t* p, Bytes* w) {
  const Bytes x = load_b(p);
  if constexpr (BITS == 8) {
    w[0] = x;
  } else if constexpr (BITS == 4) {
    w[0] = and_b(x, 15);
    w[1] = and_b(shift_right_b<4>(x), 15);
  } else {
    w[0] = and_b(x, 3);
    w[1] = and_b(shift_right_b<2>(x), 3);
    w[2] = and_b(shift_right_b<4>(x), 3);
    w[3] = and_b(shift_right_b<6>(x), 3);
  }
}

// The bytes of 16 whole numbers, |x| <= most_units(PLANES), each from -128 to 127: plane p to to[p * stride].
template <int PLANES>
BG_INLINE void store_planes(I32 x, int8_t* to, int64_t stride) {
  BG_UNROLL for (int p = PLANES - 1; p >= 0; --p) {
    store_low_bytes(to + p * stride, x);
    if (p > 0) x = shift_right_signed_i<8>(add_i(x, set_i(128)));
  }
}

// A little less than 127 in each byte: quotients are rounded before they are whole.
template <int PLANES>
BG_INLINE float most_units() {
  return PLANES == 3 ? 8355000.f : 32600.f;
}

// sum_p 256^(PLANES - 1 - p) x[p]
template <int PLANES>
BG_INLINE F32 join_planes(const I32* x) {
  F32 y = to_float(x[0]);
  BG_UNROLL for (int p = 1; p < PLANES; ++p) y = fma_f(y, set_f(256.f), to_float(x[p]));
  return y;
}

// The queries of a part to bytes: q_bytes [row][PLANES][kMostChannels], q_steps [row], q_sums [row][PLANES].
template <int PLANES>
static void split_queries(const AttentionJob& job, const AttentionPart& part) {
  const int64_t size = padded_size(job.k_size), rows = padded_rows(job);
  for (int64_t r = 0; r < rows; ++r) {
    const float* q = part.q + r * size;
    F32 largest = zero_f(), bad = zero_f();
    for (int64_t c = 0; c < size; c += 16) {
      const F32 x = load_f(q + c);
      largest = max_f(abs_f(x), largest);
      bad = add_f(bad, sub_f(x, x));  // NaN as soon as one is NaN or Inf
    }
    const float most = max_of_f(largest), step = (most > 0.f ? most / most_units<PLANES>() : 1.f) + sum_f(bad);
    part.q_steps[r] = step;
    int8_t* bytes = part.q_bytes + r * PLANES * kMostChannels;
    for (int64_t c = 0; c < size; c += 16) {
      store_planes<PLANES>(round_to_int(div_f(load_f(q + c), set_f(step))), bytes + c, kMostChannels);
    }
    BG_UNROLL for (int p = 0; p < PLANES; ++p) {
      I32 sum = zero_i();
      for (int64_t c = 0; c < size; c += 16) sum = add_i(sum, load_s8_i(bytes + p * kMostChannels + c));
      part.q_sums[r * PLANES + p] = sum_i(sum);
    }
  }
}

// Rows of a tile whose products run together: their sums, twice (two vectors of codes share what is read of a row), fill
// the registers.
constexpr int kDotRows = kRowTile < 4 ? 1 : 4;

// V times 16 tokens of a tile from `token` on against R rows: scores.
// LINES vectors of codes are fetched ahead, `next` bytes from the first.
template <int BITS, int PLANES, int R, int V, int LINES>
BG_INLINE void packed_scores(const AttentionPart& part, int64_t row, float* scores, int64_t chunks, const uint8_t* at,
                             int64_t next, const uint16_t* scales, const uint16_t* zeros) {
  constexpr int kSteps = 8 / BITS, kMiddle = BITS == 8 ? 128 : 1 << (BITS - 1);
  const int64_t run = chunks * 64;
  const uint8_t* q = (const uint8_t*)part.q_bytes + row * PLANES * kMostChannels;
  const int32_t* sums = part.q_sums + row * PLANES;
  I32 sum[R][V][PLANES];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < PLANES; ++p) {
    BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v][p] = set_i(-kMiddle * sums[r * PLANES + p]);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Bytes code[V][kSteps];
    BG_UNROLL for (int v = 0; v < V; ++v) unpack_codes<BITS>(at + v * run, code[v]);
    BG_UNROLL for (int i = 0; i < LINES; ++i) prefetch(at + i * run + next);
    at += 64;
    BG_UNROLL for (int i = 0; i < kSteps; ++i) {
      BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < PLANES; ++p) {
        const Bytes x = repeat4(q + (r * PLANES + p) * kMostChannels + 4 * i);
        BG_UNROLL for (int v = 0; v < V; ++v) dot4(sum[r][v][p], code[v][i], x);
      }
    }
    q += 4 * kSteps;
  }
  F32 scale[V], shift[V];
  BG_UNROLL for (int v = 0; v < V; ++v) {
    scale[v] = load_f16(scales + 16 * v);
    shift[v] = sub_f(load_f16(zeros + 16 * v), set_f((float)kMiddle));
  }
  BG_UNROLL for (int r = 0; r < R; ++r) {
    const F32 step = set_f(part.q_steps[row + r]);
    I32 all[PLANES];
    BG_UNROLL for (int p = 0; p < PLANES; ++p) all[p] = set_i(sums[r * PLANES + p]);
    const F32 q_sum = join_planes<PLANES>(all);
    BG_UNROLL for (int v = 0; v < V; ++v) {
      const F32 found = fnma_f(shift[v], q_sum, join_planes<PLANES>(sum[r][v]));
      store_f(scores + r * kBlock + 16 * v, mul_f(mul_f(found, scale[v]), step));
    }
  }
}

// V times 16 channels of a tile, weighted: to[r] += step (sum_t weights[r][t] code[t] - shifts[r]).
// Of PLANES bytes the last USED hold something.
template <int BITS, int PLANES, int USED, int R, int V, int LINES>
BG_INLINE void packed_values(const int8_t* weights, float step, const float* shifts, const uint8_t* at,
                             int64_t next, float* to, int64_t size) {
  constexpr int kSteps = 8 / BITS, kChunks = kBlock / (4 * kSteps);
  I32 sum[R][V][USED];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < USED; ++p) {
    BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v][p] = zero_i();
  }
  weights += (PLANES - USED) * kBlock;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    Bytes code[V][kSteps];
    BG_UNROLL for (int v = 0; v < V; ++v) unpack_codes<BITS>(at + v * kChunks * 64, code[v]);
    BG_UNROLL for (int i = 0; i < LINES; ++i) prefetch(at + i * kChunks * 64 + next);
    at += 64;
    BG_UNROLL for (int i = 0; i < kSteps; ++i) {
      BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < USED; ++p) {
        const Bytes x = repeat4((const uint8_t*)weights + (r * PLANES + p) * kBlock + 4 * i);
        BG_UNROLL for (int v = 0; v < V; ++v) dot4(sum[r][v][p], code[v][i], x);
      }
    }
    weights += 4 * kSteps;
  }
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int v = 0; v < V; ++v) {
    float* y = to + r * size + 16 * v;
    const F32 found = sub_f(join_planes<USED>(sum[r][v]), set_f(shifts[r]));
    store_f(y, fma_f(found, set_f(step), load_f(y)));
  }
}

// The weights of R rows as bytes.
template <int PLANES, int R>
struct SplitWeights {
  alignas(64) int8_t bytes[R][PLANES][kBlock];
  float shifts[R];  // their products with the zero points
  float step;       // of all: that of the tile's largest scale
};

// Weights of R rows, at most 1, times the scales of values, to bytes. Returns, for each group of G rows, how many planes
// hold something: 0, 1 or all.
template <int PLANES, int R, int G>
BG_INLINE void split_weights(const float* scores, const uint16_t* scales, const uint16_t* zeros,
                             SplitWeights<PLANES, R>& split, int* used) {
  constexpr int kVectors = kBlock / 16;
  F32 scale[kVectors], zero[kVectors], largest = zero_f();
  BG_UNROLL for (int i = 0; i < kVectors; ++i) {
    scale[i] = load_f16(scales + 16 * i), zero[i] = load_f16(zeros + 16 * i);
    largest = max_f(largest, scale[i]);
  }
  const float most = max_of_f(largest);
  split.step = most > 0.f ? most / most_units<PLANES>() : 1.f;
  BG_UNROLL for (int i = 0; i < kVectors; ++i) scale[i] = mul_f(scale[i], set_f(1.f / split.step));
  for (int group = 0; group < R / G; ++group) {
    F32 heaviest = zero_f();
    for (int r = group * G; r < group * G + G; ++r) {
      F32 shift = zero_f();
      BG_UNROLL for (int i = 0; i < kVectors; ++i) {
        const F32 x = mul_f(load_f(scores + r * kBlock + 16 * i), scale[i]);
        const I32 units = round_to_int(x);
        heaviest = max_f(x, heaviest);  // in this order NaN, which rows of nobody may be, goes by
        store_planes<PLANES>(units, split.bytes[r][0] + 16 * i, kBlock);
        shift = fma_f(to_float(units), zero[i], shift);
      }
      split.shifts[r] = sum_f(shift);
    }
    // half a unit is rounded to none; NaN is not greater than anything, and makes the row's total NaN
    used[group] = any_greater(heaviest, set_f(127.f)) ? PLANES : any_greater(heaviest, set_f(0.5f)) ? 1 : 0;
  }
}

// One tile of tokens and R rows from `row` on.
template <int BITS, int PLANES, int R>
static void packed_tile(const AttentionJob& job, const AttentionPart& part, const PackedTokens& past, int64_t row,
                        int64_t tile, int64_t skip, int64_t stop) {
  constexpr int kRows = R < kDotRows ? R : kDotRows, V = kDotRows == 1 ? 1 : kRows == 4 ? 2 : 4;
  // the groups of rows share the work of fetching the next tile, so that it is spread evenly
  constexpr int kGroups = R / kRows, kLines = V > kGroups ? V / kGroups : 1, kPair = 2 > kGroups ? 2 / kGroups : 1;
  const int64_t at = tile * past.k.pairs + part.row * job.groups + part.group;
  const int64_t chunks = past.k.size * BITS / 32, run = kBlock * 16 * BITS / 8;
  const uint8_t *keys = past.k.codes + at * tile_bytes(past.k), *values = past.v.codes + at * tile_bytes(past.v);
  const int64_t k_next = past.k.pairs * tile_bytes(past.k), v_next = past.v.pairs * tile_bytes(past.v);
  const uint16_t* numbers[] = {past.k.scales, past.k.zeros, past.v.scales, past.v.zeros};
  BG_UNROLL for (int i = 0; i < 4; ++i) BG_UNROLL for (int line = 0; line < 2; ++line) {
    prefetch(numbers[i] + (at + past.k.pairs) * kBlock + line * 32);
  }
  for (int64_t token = 0; token < kBlock; token += 16 * V) {
    for (int r = 0; r < R; r += kRows) {
      const int64_t ahead = k_next + r / kRows * kLines % V * chunks * 64;
      packed_scores<BITS, PLANES, kRows, V, kLines>(
          part, row + r, part.scores + r * kBlock + token, chunks, keys + token / 16 * chunks * 64, ahead,
          past.k.scales + at * kBlock + token, past.k.zeros + at * kBlock + token);
    }
  }
  scores_to_weights(job, part, row, R, tile * kBlock - past.first, skip, stop);

  SplitWeights<PLANES, R> split;
  int used[kGroups];
  split_weights<PLANES, R, kRows>(part.scores, past.v.scales + at * kBlock, past.v.zeros + at * kBlock, split, used);
  const int64_t size = padded_size(job.v_size);
  for (int64_t c = 0; c < past.v.size;) {
    float* sum = part.sum + row * size + c;
    const uint8_t* codes = values + c / 16 * run;
    const bool two = kDotRows > 1 && c + 32 <= past.v.size;
    for (int group = 0; group < kGroups; ++group) {
      const int r = group * kRows;
      const int64_t ahead = v_next + (two ? group * kPair % 2 * run : 0);
      const auto add = two ? used[group] == 1 ? packed_values<BITS, PLANES, 1, kRows, 2, kPair>
                                              : packed_values<BITS, PLANES, PLANES, kRows, 2, kPair>
                           : packed_values<BITS, PLANES, PLANES, kRows, 1, 1>;
      if (used[group] > 0) add(split.bytes[r][0], split.step, split.shifts + r, codes, ahead, sum + r * size, size);
    }
    c += two ? 32 : 16;
  }
}

template <int BITS, int PLANES>
static void attend_packed_of(const AttentionJob& job, const PackedTokens& past, const AttentionPart& part) {
  const int64_t rows = job.heads / job.groups * job.queries;
  for (int64_t tile = part.first / kBlock; tile * kBlock < part.last; ++tile) {
    const int64_t skip = part.first > tile * kBlock ? part.first - tile * kBlock : 0;
    const int64_t stop = part.last - tile * kBlock < kBlock ? part.last - tile * kBlock : kBlock;
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      if (left > 4 && kRowTile == 8) {
        packed_tile<BITS, PLANES, kRowTile>(job, part, past, row, tile, skip, stop), row += 8;
      } else if (left > 2 && kRowTile >= 4) {
        packed_tile<BITS, PLANES, 4 < kRowTile ? 4 : kRowTile>(job, part, past, row, tile, skip, stop), row += 4;
      } else if (left > 1) {
        packed_tile<BITS, PLANES, 2>(job, part, past, row, tile, skip, stop), row += 2;
      } else {
        packed_tile<BITS, PLANES, 1>(job, part, past, row, tile, skip, stop), row += 1;
      }
    }
  }
}

static void split_queries_of(const AttentionJob& job, const AttentionPart& part) {
  if (job.planes == 3) split_queries<3>(job, part);
  else split_queries<2>(job, part);
}

static void attend_packed(const AttentionJob& job, const PackedTokens& past, AttentionPart& part) {
  clear_part(job, part);
  if (job.planes == 3) {
    if (past.k.bits == 8) attend_packed_of<8, 3>(job, past, part);
    else if (past.k.bits == 4) attend_packed_of<4, 3>(job, past, part);
    else attend_packed_of<2, 3>(job, past, part);
  } else {
    if (past.k.bits == 8) attend_packed_of<8, 2>(job, past, part);
    else if (past.k.bits == 4) attend_packed_of<4, 2>(job, past, part);
    else attend_packed_of<2, 2>(job, past, part);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
