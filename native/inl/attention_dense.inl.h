// Attention over keys and values that are floats, see attention/attention.h.
namespace bitgrain {
namespace BG_ISA {

// Scores of R rows and of `count` tokens: 16 sums at a time, each of one row and one token.
template <DType T, int R>
static void dense_scores(const float* q, int64_t q_size, const uint8_t* k, int64_t step, int64_t size, int64_t count,
                         float* scores) {
  constexpr int kTokens = 16 / R;
  for (int64_t t = 0; t < count; t += kTokens) {
    F32 sum[16];
    BG_UNROLL for (int i = 0; i < 16; ++i) sum[i] = zero_f();
    const uint8_t* token[kTokens];
    BG_UNROLL for (int i = 0; i < kTokens; ++i) token[i] = k + (t + i < count ? t + i : count - 1) * step;
    for (int64_t c = 0; c < size; c += 16) {
      const int64_t left = size - c < 16 ? size - c : 16;
      F32 key[kTokens];
      BG_UNROLL for (int i = 0; i < kTokens; ++i) key[i] = load_elements<T>(token[i], c, left);
      BG_UNROLL for (int r = 0; r < R; ++r) {
        const F32 x = load_f(q + r * q_size + c);
        BG_UNROLL for (int i = 0; i < kTokens; ++i) sum[r * kTokens + i] = fma_f(x, key[i], sum[r * kTokens + i]);
      }
    }
    alignas(64) float found[16];
    store_f(found, sums_f(sum));
    BG_UNROLL for (int r = 0; r < R; ++r) std::memcpy(scores + r * kBlock + t, found + r * kTokens, kTokens * 4);
  }
}

// sum[r] += weights[r] V for V times 16 channels from channel c on; TAIL: for the last ones, fewer than 16.
template <DType T, int R, int V, bool TAIL>
BG_INLINE void dense_values(const float* weights, const uint8_t* v, int64_t step, int64_t size, int64_t c,
                            int64_t count, float* sum) {
  const int64_t padded = padded_size(size);
  F32 total[R][V];
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int i = 0; i < V; ++i) {
    total[r][i] = load_f(sum + r * padded + c + 16 * i);
  }
  for (int64_t t = 0; t < count; ++t) {
    F32 value[V];
    BG_UNROLL for (int i = 0; i < V; ++i) {
      value[i] = load_elements<T>(v + t * step, c + 16 * i, TAIL ? size - c : 16);
    }
    BG_UNROLL for (int r = 0; r < R; ++r) {
      const F32 weight = set_f(weights[r * kBlock + t]);
      BG_UNROLL for (int i = 0; i < V; ++i) total[r][i] = fma_f(weight, value[i], total[r][i]);
    }
  }
  BG_UNROLL for (int r = 0; r < R; ++r) BG_UNROLL for (int i = 0; i < V; ++i) {
    store_f(sum + r * padded + c + 16 * i, total[r][i]);
  }
}

template <DType T, int R>
static void dense_tile(const AttentionJob& job, const AttentionPart& part, int64_t row, int64_t token, int64_t count,
                       const uint8_t* k, int64_t k_step, const uint8_t* v, int64_t v_step) {
  const int64_t q_size = padded_size(job.k_size), v_size = padded_size(job.v_size);
  dense_scores<T, R>(part.q + row * q_size, q_size, k, k_step, job.k_size, count, part.scores);
  scores_to_weights(job, part, row, R, token, 0, count);
  float* sum = part.sum + row * v_size;
  int64_t c = 0;
  const int64_t size = job.v_size;
  for (; c + 32 <= size; c += 32) dense_values<T, R, 2, false>(part.scores, v, v_step, size, c, count, sum);
  for (; c + 16 <= size; c += 16) dense_values<T, R, 1, false>(part.scores, v, v_step, size, c, count, sum);
  if (c < size) dense_values<T, R, 1, true>(part.scores, v, v_step, size, c, count, sum);
}

template <DType T>
static void attend_dense_of(const AttentionJob& job, const DenseTokens& dense, const AttentionPart& part) {
  const int64_t item = (int64_t)size_of(T), rows = job.heads / job.groups * job.queries;
  const int64_t k_step = dense.k_stride[2] * item, v_step = dense.v_stride[2] * item;
  const uint8_t* k = (const uint8_t*)dense.k + (part.row * dense.k_stride[0] + part.group * dense.k_stride[1]) * item;
  const uint8_t* v = (const uint8_t*)dense.v + (part.row * dense.v_stride[0] + part.group * dense.v_stride[1]) * item;
  for (int64_t t = part.first; t < part.last; t += kBlock) {
    const int64_t count = part.last - t < kBlock ? part.last - t : kBlock;
    const uint8_t *keys = k + t * k_step, *values = v + t * v_step;
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      if (left > 4 && kRowTile == 8) {
        dense_tile<T, kRowTile>(job, part, row, t, count, keys, k_step, values, v_step), row += 8;
      } else if (left > 2 && kRowTile >= 4) {
        dense_tile<T, 4 < kRowTile ? 4 : kRowTile>(job, part, row, t, count, keys, k_step, values, v_step), row += 4;
      } else if (left > 1) {
        dense_tile<T, 2>(job, part, row, t, count, keys, k_step, values, v_step), row += 2;
      } else {
        dense_tile<T, 1>(job, part, row, t, count, keys, k_step, values, v_step), row += 1;
      }
    }
  }
}

static void attend_dense(const AttentionJob& job, const DenseTokens& dense, AttentionPart& part) {
  clear_part(job, part);
  if (dense.type == DType::f32) attend_dense_of<DType::f32>(job, dense, part);
  else if (dense.type == DType::bf16) attend_dense_of<DType::bf16>(job, dense, part);
  else attend_dense_of<DType::f16>(job, dense, part);
}

}  // namespace BG_ISA
}  // namespace bitgrain
