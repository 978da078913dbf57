// What attention over any kind of keys and values shares: queries, scores to weights; see attention/attention.h.
namespace bitgrain {
namespace BG_ISA {

// Rows (head, query) that are worked on together, at most kMostRows.
constexpr int kRowTile = kSingleRows >= 8 ? 8 : kSingleRows >= 4 ? 4 : 2;

static void exp_floats(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i < 16 ? count - i : 16;
    store_elements(y, DType::f32, i, left, exp_f(load_elements<DType::f32>(x, i, left)));
  }
}

BG_INLINE F32 tanh_f(F32 x) {  // to about 1e-7: caps are added to nothing smaller
  const F32 one = set_f(1.f), e = exp_f(add_f(x, x));
  return sub_f(one, div_f(set_f(2.f), add_f(e, one)));
}

// The queries of a part as floats, [rows, padded k_size] with zeros behind; packed: as bytes too.
static void split_queries_of(const AttentionJob& job, const AttentionPart& part);

template <DType T>
static void load_queries_of(const AttentionJob& job, const AttentionPart& part) {
  const int64_t shared = job.heads / job.groups, size = padded_size(job.k_size), rows = shared * job.queries;
  for (int64_t r = 0; r < padded_rows(job); ++r) {
    const int64_t head = part.group * shared + r / job.queries, query = r % job.queries;
    const int64_t at = part.row * job.q_stride[0] + head * job.q_stride[1] + query * job.q_stride[2];
    for (int64_t c = 0; c < size; c += 16) {
      const int64_t left = job.k_size - c < 16 ? job.k_size - c : 16;
      store_f(part.q + r * size + c, r < rows ? load_elements<T>(job.q, at + c, left) : zero_f());
    }
  }
}

static void load_queries(const AttentionJob& job, const AttentionPart& part, bool packed) {
  if (job.q_type == DType::f32) load_queries_of<DType::f32>(job, part);
  else if (job.q_type == DType::bf16) load_queries_of<DType::bf16>(job, part);
  else load_queries_of<DType::f16>(job, part);
  if (packed) split_queries_of(job, part);
}

// What is added to the scores of the block's tokens [skip, stop) by the mask of one row.
BG_INLINE void load_mask(const AttentionJob& job, int64_t at, int64_t skip, int64_t stop, float* added) {
  if (job.mask_kind == MaskKind::added) {
    std::memcpy(added + skip, (const float*)job.mask + at + skip, (size_t)(stop - skip) * 4);
    return;
  }
  alignas(64) uint8_t seen[kBlock] = {};
  std::memcpy(seen + skip, (const uint8_t*)job.mask + at + skip, (size_t)(stop - skip));
  for (int64_t i = 0; i < kBlock; i += 16) {
    store_f(added + i, mul_f(sub_f(set_f(1.f), to_float(load_u8_i(seen + i))), set_f(kUnseen)));
  }
}

// Scores of one row and a block of tokens [skip, stop), as the softmax takes them: scaled, capped, masked, and kUnseen for
// tokens that are not seen. end: the last one that is; at: where the mask of the block's first token lies.
static void masked_scores(const AttentionJob& job, float* score, int64_t at, int64_t skip, int64_t stop, int64_t end,
                          F32* x) {
  alignas(64) float added[kBlock] = {};
  if (job.mask_kind != MaskKind::none) load_mask(job, at, skip, stop, added);
  // what nobody wrote may be NaN
  for (int64_t t = 0; t < skip; ++t) score[t] = 0.f;
  for (int64_t t = stop; t < kBlock; ++t) score[t] = 0.f;
  BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
    F32 s = mul_f(load_f(score + 16 * i), set_f(job.scaling));
    if (job.softcap != 0.f) s = mul_f(tanh_f(div_f(s, set_f(job.softcap))), set_f(job.softcap));
    if (job.mask_kind != MaskKind::none) s = add_f(s, load_f(added + 16 * i));
    if (16 * i < skip || 16 * i + 15 > end) {  // min(1, tokens beyond) kUnseen
      static const float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const F32 lane = add_f(load_f(kLanes), set_f((float)(16 * i)));
      const F32 beyond = max_f(sub_f(lane, set_f((float)end)), sub_f(set_f((float)skip), lane));
      s = fma_f(min_f(max_f(beyond, zero_f()), set_f(1.f)), set_f(kUnseen), s);
    }
    x[i] = max_f(set_f(kUnseen), s);  // in this order NaN comes through
  }
}

// Scores of rows [row, row + rows) and of a block, whose tokens [skip, stop) count and whose first one is number
// `token` of the source, become exp(score - largest so far), 0 for tokens that are not seen; the largest, the sum and
// the weighted values so far are brought up to date.
static void scores_to_weights(const AttentionJob& job, const AttentionPart& part, int64_t row, int64_t rows,
                              int64_t token, int64_t skip, int64_t stop) {
  const int64_t shared = job.heads / job.groups, all = shared * job.queries, size = padded_size(job.v_size);
  const bool plain = job.mask_kind == MaskKind::none && job.softcap == 0.f && skip == 0 && stop == kBlock;
  for (int64_t r = 0; r < rows && row + r < all; ++r) {
    const int64_t one = job.queries == 1 ? row + r : (row + r) / job.queries, query = row + r - one * job.queries;
    int64_t end = stop - 1;  // the last token that is seen
    if (job.causal) {
      const int64_t causal = part.tokens - job.queries + query - (part.position + token);
      end = causal < end ? causal : end;
    }
    float* score = part.scores + r * kBlock;
    F32 x[kBlock / 16];
    if (plain && end == kBlock - 1) {
      BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
        x[i] = max_f(set_f(kUnseen), mul_f(load_f(score + 16 * i), set_f(job.scaling)));
      }
    } else {
      const int64_t head = part.group * shared + one;
      masked_scores(job, score, part.row * job.mask_stride[0] + head * job.mask_stride[1] +
                    query * job.mask_stride[2] + part.position + token, skip, stop, end, x);
    }
    F32 most = x[0];
    BG_UNROLL for (int i = 1; i < (int)kBlock / 16; ++i) most = max_f(most, x[i]);
    float top = part.top[row + r];
    if (any_greater(most, set_f(top))) {
      const float before = top;
      part.top[row + r] = top = max_of_f(most);
      const F32 fade = exp_below_f(set_f(before - top));
      float *sum = part.sum + (row + r) * size, *total = part.total + (row + r) * 16;
      store_f(total, mul_f(load_f(total), fade));
      for (int64_t c = 0; c < size; c += 16) store_f(sum + c, mul_f(load_f(sum + c), fade));
    }
    F32 total = load_f(part.total + (row + r) * 16);
    BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
      const F32 weight = exp_below_f(sub_f(x[i], set_f(top)));
      store_f(score + 16 * i, weight);
      total = add_f(total, weight);
    }
    store_f(part.total + (row + r) * 16, total);
  }
}

BG_INLINE void clear_part(const AttentionJob& job, const AttentionPart& part) {
  const int64_t rows = padded_rows(job);
  for (int64_t r = 0; r < rows; ++r) part.top[r] = kUnseen;
  std::memset(part.total, 0, (size_t)(rows * (16 + padded_size(job.v_size))) * 4);
}

}  // namespace BG_ISA
}  // namespace bitgrain
