// Many queries over many tokens, see attention/prefill.h.
namespace bitgrain {
namespace BG_ISA {

BG_INLINE bool as_pairs(DType type) { return BG_HAS_BF16_DOT && type == DType::bf16; }

static int64_t prefill_steps(DType type, int64_t features) { return as_pairs(type) ? ceil_div(features, 2) : features; }

// A number into its place among lanes: 4 bytes each, one float or two bfloat16.
BG_INLINE void put(uint8_t* lanes, bool pairs, int64_t lane_stride, int64_t index, float x) {
  if (pairs) {
    const uint16_t half = to_bf16(x);
    std::memcpy(lanes + index / 2 * lane_stride + index % 2 * 2, &half, 2);
  } else {
    std::memcpy(lanes + index * lane_stride, &x, 4);
  }
}

// Panels of 32 tokens: their keys as columns, their values as a run of the reduction.
static void pack_past(const PrefillJob& one, int64_t first, int64_t last) {
  const AttentionJob& job = *one.job;
  const DenseTokens& past = *one.past;
  const bool pairs = as_pairs(past.type);
  const int64_t features = round_up(job.v_size, 32);
  for (int64_t item = first; item < last; ++item) {
    const int64_t pair = item / one.key_panels, panel = item % one.key_panels;
    const int64_t row = pair / job.groups, group = pair % job.groups;
    const int64_t k_at = row * past.k_stride[0] + group * past.k_stride[1];
    const int64_t v_at = row * past.v_stride[0] + group * past.v_stride[1];
    uint8_t* k = one.k + pair * one.k_bytes + panel * one.k_steps * 128;
    uint8_t* v = one.v + pair * one.v_bytes;
    std::memset(k, 0, (size_t)one.k_steps * 128);
    for (int64_t t = 0; t < 32; ++t) {
      const int64_t token = panel * 32 + t;
      const bool real = token < past.tokens;
      if (real) {
        for (int64_t i = 0; i < job.k_size; ++i) {
          put(k + 4 * t, pairs, 128, i, load_number(past.k, past.type, k_at + token * past.k_stride[2] + i));
        }
      }
      for (int64_t i = 0; i < features; ++i) {
        const float x = real && i < job.v_size ? load_number(past.v, past.type, v_at + token * past.v_stride[2] + i) :
            0.f;
        put(v + i / 32 * one.value_steps * 128 + i % 32 * 4, pairs, 128, token, x);
      }
    }
  }
}

// R rows a against 32 columns w, to R rows of floats `stride` apart: added to what they hold times
// fades[r * fade_stride], or in its place where fades is null. A function for each R, and nothing else: what is around
// it is compiled once.
template <bool PAIRS, int R>
static __attribute__((noinline)) void multiply(const uint8_t* w, const uint8_t* a, int64_t steps, float* to,
                                               int64_t stride, const float* fades, int64_t fade_stride) {
  constexpr int V = kSingleVectors;
  for (int half = 0; half < 2; half += V) {
    F32 sum[R][V];
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int j = 0; j < V; ++j) {
      const float* before = to + r * stride + 16 * (half + j);
      sum[r][j] = fades ? mul_f(load_f(before), set_f(fades[r * fade_stride])) : zero_f();
    }
    const uint8_t *columns = w + 64 * half, *x = a;
    for (int64_t step = 0; step < steps; ++step) {
      Bytes column[V];
      BG_UNROLL for (int j = 0; j < V; ++j) column[j] = load_b(columns + 64 * j);
      BG_UNROLL for (int r = 0; r < R; ++r) {
        const Bytes row = repeat4(x + 4 * r);
#if BG_HAS_BF16_DOT
        if constexpr (PAIRS) {
          BG_UNROLL for (int j = 0; j < V; ++j) dot2(sum[r][j], column[j], row);
          continue;
        }
#endif
        BG_UNROLL for (int j = 0; j < V; ++j) {
          sum[r][j] = fma_f(as_float(as_lanes(column[j])), as_float(as_lanes(row)), sum[r][j]);
        }
      }
      columns += 128, x += 4 * R;
    }
    BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int j = 0; j < V; ++j) {
      store_f(to + r * stride + 16 * (half + j), sum[r][j]);
    }
  }
}

using Multiply = void (*)(const uint8_t* w, const uint8_t* a, int64_t steps, float* to, int64_t stride,
                          const float* fades, int64_t fade_stride);

template <int R = kSingleRows>
static Multiply multiply_of(bool pairs, int rows) {
  if constexpr (R > 1) {
    if (rows != R) return multiply_of<R - 1>(pairs, rows);
  }
#if BG_HAS_BF16_DOT
  if (pairs) return multiply<true, R>;
#endif
  return multiply<false, R>;
}

struct QueryTile {
  alignas(64) float scores[kSingleRows][kKeysAtOnce];
  alignas(64) float out[kSingleRows][kMostFeatures];
  alignas(64) uint8_t q[kMostFeatures * kSingleRows * 4];
  alignas(64) uint8_t weights[kKeysAtOnce * kSingleRows * 4];
  float top[kSingleRows], total[kSingleRows];
};

// exp(score - largest so far) of one row and block of keys, of which those from `low` to below `high` are seen.
static void soften(QueryTile& tile, int r, int rows, float scaling, int64_t low, int64_t high, bool pairs) {
  float* score = tile.scores[r];
  F32 most = set_f(kUnseen);
  BG_UNROLL for (int i = 0; i < (int)kKeysAtOnce / 16; ++i) {
    F32 s = mul_f(load_f(score + 16 * i), set_f(scaling));
    if (16 * i < low || 16 * i + 16 > high) {
      alignas(64) float part[16];
      store_f(part, s);
      for (int lane = 0; lane < 16; ++lane) {
        if (16 * i + lane < low || 16 * i + lane >= high) part[lane] = kUnseen;
      }
      s = load_f(part);
    }
    store_f(score + 16 * i, s);
    most = max_f(most, s);
  }
  const float largest = max_of_f(most), before = tile.top[r], top = largest > before ? largest : before;
  alignas(64) float fade[16];
  store_f(fade, exp_below_f(set_f(before - top)));
  F32 total = zero_f();
  BG_UNROLL for (int i = 0; i < (int)kKeysAtOnce / 16; ++i) {
    const F32 weight = exp_below_f(sub_f(load_f(score + 16 * i), set_f(top)));
    total = add_f(total, weight);
    alignas(64) uint8_t words[64];
    if (pairs) store_bf16(words, weight);
    else store_f((float*)words, weight);
    const int count = pairs ? 8 : 16;
    for (int j = 0; j < count; ++j) std::memcpy(tile.weights + ((i * count + j) * rows + r) * 4, words + 4 * j, 4);
  }
  tile.top[r] = top;
  tile.total[r] = tile.total[r] * fade[0] + sum_f(total);
  score[0] = fade[0];  // for the sum so far
}

static void attend_tile(const PrefillJob& one, QueryTile& tile, int64_t row, int64_t head, int64_t query, int rows) {
  const AttentionJob& job = *one.job;
  const bool pairs = as_pairs(one.past->type);
  const Multiply multiply = multiply_of(pairs, rows);
  const int64_t group = head / (job.heads / job.groups), pair = row * job.groups + group;
  const int64_t features = round_up(job.v_size, 32);
  const uint8_t *k = one.k + pair * one.k_bytes, *v = one.v + pair * one.v_bytes;

  for (int r = 0; r < rows; ++r) {
    const int64_t at = row * job.q_stride[0] + head * job.q_stride[1] + (query + r) * job.q_stride[2];
    if (pairs && job.k_size % 2) std::memset(tile.q + ((one.k_steps - 1) * rows + r) * 4, 0, 4);
    for (int64_t i = 0; i < job.k_size; ++i) put(tile.q + 4 * r, pairs, 4 * rows, i,
                                                 load_number(job.q, job.q_type, at + i));
    std::memset(tile.out[r], 0, (size_t)features * 4);
    tile.top[r] = kUnseen, tile.total[r] = 0.f;
  }

  const TokenRange all = seen_tokens(one, query, rows);
  for (int64_t block = all.first / kKeysAtOnce * kKeysAtOnce; block < all.end; block += kKeysAtOnce) {
    const int64_t panels = ceil_div(all.end - block < kKeysAtOnce ? all.end - block : kKeysAtOnce, 32);
    for (int64_t panel = 0; panel < panels; ++panel) {
      multiply(k + (block / 32 + panel) * one.k_steps * 128, tile.q, one.k_steps, tile.scores[0] + 32 * panel,
               kKeysAtOnce, nullptr, 0);
    }
    for (int r = 0; r < rows; ++r) {
      const TokenRange seen = seen_in_block(one, query + r, block, 32 * panels);
      soften(tile, r, rows, job.scaling, seen.first, seen.end, pairs);
    }
    const uint8_t* values = v + (pairs ? block / 2 : block) * 128;
    for (int64_t c = 0; c < features; c += 32, values += one.value_steps * 128) {
      multiply(values, tile.weights, pairs ? panels * 16 : panels * 32, tile.out[0] + c, kMostFeatures, tile.scores[0],
               kKeysAtOnce);
    }
  }

  for (int r = 0; r < rows; ++r) {
    const int64_t at = row * job.out_stride[0] + head * job.out_stride[1] + (query + r) * job.out_stride[2];
    const F32 by = set_f(1.f / tile.total[r]);
    for (int64_t c = 0; c < job.v_size; c += 16) {
      const int64_t count = job.v_size - c < 16 ? job.v_size - c : 16;
      store_elements(job.out, job.q_type, at + c, count, mul_f(load_f(tile.out[r] + c), by));
    }
  }
}

static void attend_tiles(const PrefillJob& one, int64_t first, int64_t last) {
  QueryTile tile;
  for (int64_t item = first; item < last; ++item) {
    const QueryRun run = query_run(one, item);
    attend_tile(one, tile, run.row, run.head, run.query, (int)run.rows);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
