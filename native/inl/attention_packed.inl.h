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

// The bytes of 16 numbers in units of their step, |x| <= most_units(PLANES): plane p to to[p * stride].
template <int PLANES>
BG_INLINE void store_planes(F32 x, int8_t* to, int64_t stride, I32* sums) {
  BG_UNROLL for (int p = 0; p < PLANES; ++p) {
    I32 digit;
    if (p + 1 < PLANES) {
      const float unit = PLANES - p == 3 ? (float)(kRadix * kRadix) : (float)kRadix;
      digit = round_to_int(mul_f(x, set_f(1.f / unit)));
      x = fnma_f(to_float(digit), set_f(unit), x);
    } else {
      digit = round_to_int(x);
    }
    sums[p] = add_i(sums[p], digit);
    store_low_bytes(to + p * stride, digit);
  }
}

// A little less than what PLANES bytes hold, so that no digit is rounded up to 128.
template <int PLANES>
BG_INLINE float most_units() {
  return PLANES == 3 ? 127.f * kRadix * kRadix + 120.f * kRadix : 127.f * kRadix + 120.f;
}

// sum_p kRadix^(PLANES - 1 - p) x[p]
template <int PLANES>
BG_INLINE F32 join_planes(const I32* x) {
  F32 y = to_float(x[0]);
  BG_UNROLL for (int p = 1; p < PLANES; ++p) y = fma_f(y, set_f((float)kRadix), to_float(x[p]));
  return y;
}
template <int PLANES>
BG_INLINE float join_sums(const int32_t* x) {
  float y = (float)x[0];
  for (int p = 1; p < PLANES; ++p) y = y * (float)kRadix + (float)x[p];
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
    I32 sums[PLANES];
    BG_UNROLL for (int p = 0; p < PLANES; ++p) sums[p] = zero_i();
    for (int64_t c = 0; c < size; c += 16) {
      store_planes<PLANES>(div_f(load_f(q + c), set_f(step)), part.q_bytes + r * PLANES * kMostChannels + c,
                           kMostChannels, sums);
    }
    BG_UNROLL for (int p = 0; p < PLANES; ++p) part.q_sums[r * PLANES + p] = sum_i(sums[p]);
  }
}

// V times 16 tokens of a tile against R rows: scores.
template <int BITS, int PLANES, int R, int V>
BG_INLINE void packed_scores(const AttentionPart& part, int64_t row, const PackedSide& side, const uint8_t* tile,
                             int64_t next, const uint16_t* scales, const uint16_t* zeros, int64_t token) {
  constexpr int kSteps = 8 / BITS, kMiddle = BITS == 8 ? 128 : 1 << (BITS - 1);
  const int64_t chunks = side.size / (4 * kSteps), run = chunks * 64;
  const int8_t* q = part.q_bytes + row * PLANES * kMostChannels;
  const int32_t* sums = part.q_sums + row * PLANES;
  I32 sum[R][V][PLANES];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < PLANES; ++p) {
    BG_UNROLL for (int v = 0; v < V; ++v) sum[r][v][p] = set_i(-kMiddle * sums[r * PLANES + p]);
  }
  const uint8_t* at = tile + token / 16 * run;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Bytes code[V][kSteps];
    BG_UNROLL for (int v = 0; v < V; ++v) {
      unpack_codes<BITS>(at + v * run, code[v]);
      prefetch(at + v * run + next);
    }
    at += 64;
    BG_UNROLL for (int i = 0; i < kSteps; ++i) {
      BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < PLANES; ++p) {
        const Bytes x = repeat4((const uint8_t*)q + (r * PLANES + p) * kMostChannels + 4 * i);
        BG_UNROLL for (int v = 0; v < V; ++v) dot4(sum[r][v][p], code[v][i], x);
      }
    }
    q += 4 * kSteps;
  }
  BG_UNROLL for (int v = 0; v < V; ++v) {
    const F32 scale = load_f16(scales + token + 16 * v);
    const F32 shift = sub_f(load_f16(zeros + token + 16 * v), set_f((float)kMiddle));
    BG_UNROLL for (int r = 0; r < R; ++r) {
      const F32 found = fnma_f(shift, set_f(join_sums<PLANES>(sums + r * PLANES)), join_planes<PLANES>(sum[r][v]));
      store_f(part.scores + r * kBlock + token + 16 * v, mul_f(mul_f(found, scale), set_f(part.q_steps[row + r])));
    }
  }
}

// 16 channels of a tile from channel c on, weighted: sum[r] += steps[r] weights[r] (code - middle) - shifts[r].
template <int BITS, int PLANES, int R>
BG_INLINE void packed_values(const int8_t* weights, const int32_t* sums, const float* steps, const float* shifts,
                             const uint8_t* at, int64_t next, float* to, int64_t size) {
  constexpr int kSteps = 8 / BITS, kMiddle = BITS == 8 ? 128 : 1 << (BITS - 1), kChunks = kBlock / (4 * kSteps);
  I32 sum[R][PLANES];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < PLANES; ++p) {
    sum[r][p] = set_i(-kMiddle * sums[r * PLANES + p]);
  }
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    Bytes code[kSteps];
    unpack_codes<BITS>(at, code);
    prefetch(at + next);
    at += 64;
    BG_UNROLL for (int i = 0; i < kSteps; ++i) {
      BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int p = 0; p < PLANES; ++p) {
        dot4(sum[r][p], code[i], repeat4((const uint8_t*)weights + (r * PLANES + p) * kBlock + 4 * i));
      }
    }
    weights += 4 * kSteps;
  }
  BG_UNROLL for (int r = 0; r < R; ++r) {
    const F32 before = sub_f(load_f(to + r * size), set_f(shifts[r]));
    store_f(to + r * size, fma_f(join_planes<PLANES>(sum[r]), set_f(steps[r]), before));
  }
}

// One tile of tokens and R rows from `row` on.
template <int BITS, int PLANES, int R>
static void packed_tile(const AttentionJob& job, const AttentionPart& part, const PackedTokens& past, int64_t row,
                        int64_t tile, int64_t skip, int64_t stop) {
  constexpr int V = R * PLANES > 8 ? 1 : R * PLANES > 4 ? 2 : 4;
  const int64_t pair = part.row * job.groups + part.group, at = tile * past.k.pairs + pair;
  const uint8_t* keys = past.k.codes + at * tile_bytes(past.k);
  const uint16_t *k_scales = past.k.scales + at * kBlock, *k_zeros = past.k.zeros + at * kBlock;
  const int64_t k_next = past.k.pairs * tile_bytes(past.k), v_next = past.v.pairs * tile_bytes(past.v);
  for (int64_t token = 0; token < kBlock; token += 16 * V) {
    packed_scores<BITS, PLANES, R, V>(part, row, past.k, keys, k_next, k_scales, k_zeros, token);
  }
  scores_to_weights(job, part, row, R, tile * kBlock - past.first, skip, stop);

  const uint16_t *v_scales = past.v.scales + at * kBlock, *v_zeros = past.v.zeros + at * kBlock;
  alignas(64) int8_t weights[R * PLANES * kBlock];
  int32_t sums[R * PLANES];
  float steps[R], shifts[R];
  F32 scale[kBlock / 16], shift[kBlock / 16];
  BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
    scale[i] = load_f16(v_scales + 16 * i);
    shift[i] = sub_f(load_f16(v_zeros + 16 * i), set_f(BITS == 8 ? 128.f : (float)(1 << (BITS - 1))));
  }
  for (int r = 0; r < R; ++r) {
    F32 x[kBlock / 16], largest = zero_f(), shifted = zero_f();
    BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
      x[i] = mul_f(load_f(part.scores + r * kBlock + 16 * i), scale[i]);
      largest = max_f(largest, x[i]);
      shifted = fma_f(x[i], shift[i], shifted);
    }
    const float most = max_of_f(largest), step = most > 0.f ? most / most_units<PLANES>() : 1.f;
    steps[r] = step, shifts[r] = sum_f(shifted);
    const F32 by = set_f(1.f / step);
    I32 sum[PLANES];
    BG_UNROLL for (int p = 0; p < PLANES; ++p) sum[p] = zero_i();
    BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
      store_planes<PLANES>(mul_f(x[i], by), weights + r * PLANES * kBlock + 16 * i, kBlock, sum);
    }
    BG_UNROLL for (int p = 0; p < PLANES; ++p) sums[r * PLANES + p] = sum_i(sum[p]);
  }
  const uint8_t* values = past.v.codes + at * tile_bytes(past.v);
  const int64_t size = padded_size(job.v_size), run = kBlock * 16 * BITS / 8;
  for (int64_t c = 0; c < past.v.size; c += 16) {
    packed_values<BITS, PLANES, R>(weights, sums, steps, shifts, values + c / 16 * run, v_next,
                                   part.sum + row * size + c, size);
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

// Three planes for queries in float32, two for those of 16 bits.
static void split_queries_of(const AttentionJob& job, const AttentionPart& part) {
  if (job.q_type == DType::f32) split_queries<3>(job, part);
  else split_queries<2>(job, part);
}

static void attend_packed(const AttentionJob& job, const PackedTokens& past, AttentionPart& part) {
  clear_part(job, part);
  if (job.q_type == DType::f32) {
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
