// Many queries over many tokens in bfloat16, on the matrix unit; see attention/prefill.h and inl/matrix.inl.h.
namespace bitgrain {
namespace BG_ISA {

constexpr int64_t kQueryTiles = 2, kQueryRows = kQueryTiles * kMatrixTile;
constexpr int64_t kKeyPanels = kKeysAtOnce / 32, kFeaturePanels = kMostFeatures / 32;

struct MatrixQueries {
  alignas(64) float scores[kKeyPanels][kQueryTiles][2][16][16];  // as multiply_matrix leaves them
  alignas(64) float out[kFeaturePanels][kQueryTiles][2][16][16];
  alignas(64) uint8_t q[kQueryTiles][kFeaturePanels][16][64];
  alignas(64) uint8_t weights[kQueryTiles][kKeyPanels][16][64];
  float top[kQueryRows], total[kQueryRows], fade[kQueryRows];
};

// Panels of 32 tokens, as pack_past lays them; keys are padded to 32 features.
static void pack_matrix(const PrefillJob& one, int64_t first, int64_t last) {
  const AttentionJob& job = *one.job;
  const DenseTokens& past = *one.past;
  const int64_t features = round_up(job.v_size, 32);
  for (int64_t item = first; item < last; ++item) {
    const int64_t pair = item / one.key_panels, panel = item % one.key_panels;
    const int64_t row = pair / job.groups, group = pair % job.groups;
    const uint16_t* keys = (const uint16_t*)past.k + row * past.k_stride[0] + group * past.k_stride[1];
    const uint16_t* values = (const uint16_t*)past.v + row * past.v_stride[0] + group * past.v_stride[1];
    uint8_t* k = one.k + pair * one.k_bytes + panel * one.k_steps * 128;
    uint8_t* v = one.v + pair * one.v_bytes + panel * 16 * 128;
    std::memset(k, 0, (size_t)one.k_steps * 128);
    for (int64_t t = 0; t < 32; ++t) {
      const int64_t token = panel * 32 + t;
      if (token >= past.tokens) break;
      const uint16_t* key = keys + token * past.k_stride[2];
      for (int64_t i = 0; i + 2 <= job.k_size; i += 2) std::memcpy(k + i * 64 + 4 * t, key + i, 4);
      if (job.k_size % 2) std::memcpy(k + (job.k_size - 1) * 64 + 4 * t, key + job.k_size - 1, 2);
    }
    for (int64_t t = 0; t < 32; t += 2) {
      const int64_t token = panel * 32 + t;
      const uint16_t *even = values + token * past.v_stride[2], *odd = even + past.v_stride[2];
      for (int64_t c = 0; c < features; c += 32) {
        alignas(64) uint32_t lanes[32] = {};
        const int64_t count = job.v_size - c < 32 ? job.v_size - c : 32;
        if (token + 1 < past.tokens) {
          for (int64_t i = 0; i < count; ++i) lanes[i] = even[c + i] | (uint32_t)odd[c + i] << 16;
        } else if (token < past.tokens) {
          for (int64_t i = 0; i < count; ++i) lanes[i] = even[c + i];
        }
        std::memcpy(v + c / 32 * one.value_steps * 128 + t / 2 * 128, lanes, 128);
      }
    }
  }
}

// exp(score - largest so far) of row r and a block of keys, of which those from `low` to below `high` are seen.
static void soften_matrix(MatrixQueries& now, int64_t r, float scaling, int64_t low, int64_t high) {
  const int64_t tile = r / kMatrixTile, line = r % kMatrixTile;
  const int64_t from = low / 16, to = ceil_div(high, 16);  // vectors with a key that is seen
  alignas(64) float score[kKeysAtOnce];
  F32 most = set_f(kUnseen);
  for (int64_t i = from; i < to; ++i) {
    F32 s = mul_f(load_f(now.scores[i / 2][tile][i % 2][line]), set_f(scaling));
    if (16 * i < low || 16 * i + 16 > high) {
      const unsigned before = low > 16 * i ? (1u << (low - 16 * i)) - 1 : 0;
      const unsigned until = high < 16 * i + 16 ? (1u << (high - 16 * i)) - 1 : 0xffff;
      s = _mm512_mask_mov_ps(set_f(kUnseen), (__mmask16)(until & ~before), s);
    }
    store_f(score + 16 * i, s);
    most = max_f(most, s);
  }
  const float largest = max_of_f(most), before = now.top[r], top = largest > before ? largest : before;
  alignas(64) float fade[16];
  store_f(fade, exp_below_f(set_f(before - top)));
  F32 total = zero_f();
  for (int64_t i = 0; i < kKeysAtOnce / 16; ++i) {
    F32 weight = zero_f();
    if (i >= from && i < to) weight = exp_below_f(sub_f(load_f(score + 16 * i), set_f(top)));
    total = add_f(total, weight);
    _mm256_storeu_si256((__m256i*)(now.weights[tile][i / 2][line] + i % 2 * 32), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  now.top[r] = top;
  now.total[r] = now.total[r] * fade[0] + sum_f(total);
  now.fade[r] = fade[0];
}

template <int T>
static void attend_queries(const PrefillJob& one, MatrixQueries& now, const QueryRun& run) {
  const AttentionJob& job = *one.job;
  const auto [row, head, query, rows] = run;
  const int64_t group = head / (job.heads / job.groups), pair = row * job.groups + group;
  const int64_t features = round_up(job.v_size, 32), q_steps = one.k_steps / 16;
  const uint8_t *k = one.k + pair * one.k_bytes, *v = one.v + pair * one.v_bytes;

  std::memset(now.out, 0, (size_t)(features / 32) * sizeof(now.out[0]));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = row * job.q_stride[0] + head * job.q_stride[1] + (query + r) * job.q_stride[2];
    for (int64_t i = 0; i < job.k_size; i += 32) {
      uint8_t* to = now.q[r / kMatrixTile][i / 32][r % kMatrixTile];
      const int64_t count = job.k_size - i < 32 ? job.k_size - i : 32;
      if (job.q_type == DType::bf16) {
        std::memcpy(to, (const uint16_t*)job.q + at + i, (size_t)count * 2);
        continue;
      }
      for (int64_t j = 0; j < count; ++j) {
        const uint16_t half = to_bf16(load_number(job.q, job.q_type, at + i + j));
        std::memcpy(to + 2 * j, &half, 2);
      }
    }
    now.top[r] = kUnseen, now.total[r] = 0.f;
  }

  const TokenRange all = seen_tokens(one, query, rows);
  for (int64_t block = all.first / kKeysAtOnce * kKeysAtOnce; block < all.end; block += kKeysAtOnce) {
    const int64_t panels = ceil_div(all.end - block < kKeysAtOnce ? all.end - block : kKeysAtOnce, 32);
    for (int64_t panel = 0; panel < panels; ++panel) {
      multiply_matrix<MatrixKind::bf16, T>(now.q[0][0][0], sizeof(now.q[0]),
                                           k + (block / 32 + panel) * one.k_steps * 128, q_steps, false,
                                           now.scores[panel]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const TokenRange seen = seen_in_block(one, query + r, block, 32 * panels);
      soften_matrix(now, r, job.scaling, seen.first, seen.end);
    }
    for (int64_t c = 0; c < features / 32; ++c) {
      for (int64_t r = 0; r < rows; ++r) BG_UNROLL for (int half = 0; half < 2; ++half) {
        float* out = now.out[c][r / kMatrixTile][half][r % kMatrixTile];
        store_f(out, mul_f(load_f(out), set_f(now.fade[r])));
      }
      multiply_matrix<MatrixKind::bf16, T>(now.weights[0][0][0], sizeof(now.weights[0]),
                                           v + (c * one.value_steps + block / 2) * 128, panels, true, now.out[c]);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = row * job.out_stride[0] + head * job.out_stride[1] + (query + r) * job.out_stride[2];
    const F32 by = set_f(1.f / now.total[r]);
    for (int64_t c = 0; c < job.v_size; c += 16) {
      const F32 out = load_f(now.out[c / 32][r / kMatrixTile][c % 32 / 16][r % kMatrixTile]);
      store_elements(job.out, job.q_type, at + c, job.v_size - c < 16 ? job.v_size - c : 16, mul_f(out, by));
    }
  }
}

static void attend_matrix(const PrefillJob& one, int64_t first, int64_t last) {
  const MatrixUnit unit;
  MatrixQueries now;
  // what no row fills meets no number that is not one; a tile's rows may be fewer than those of the one before it
  std::memset(now.q, 0, sizeof(now.q));
  std::memset(now.weights, 0, sizeof(now.weights));
  for (int64_t item = first; item < last; ++item) {
    const QueryRun run = query_run(one, item);
    if (run.rows > kMatrixTile) attend_queries<2>(one, now, run);
    else attend_queries<1>(one, now, run);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
