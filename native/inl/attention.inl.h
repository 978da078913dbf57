// What attention over any kind of keys and values shares: scores to weights, see attention/attention.h.
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

// Scores of rows [row, row + rows) and of `count` tokens from `token` of the source on become exp(score - largest so
// far), 0 for tokens that are not seen; largest, sum and weighted values so far are brought to the new largest.
static void scores_to_weights(const AttentionJob& job, const AttentionPart& part, int64_t row, int64_t rows,
                              int64_t token, int64_t count) {
  const int64_t shared = job.heads / job.groups, all = shared * job.queries, size = padded_size(job.v_size);
  for (int64_t r = 0; r < rows && row + r < all; ++r) {
    const int64_t head = part.group * shared + (row + r) / job.queries, query = (row + r) % job.queries;
    // the last token that is seen, counted from the block's first one
    int64_t end = count - 1;
    if (job.causal) {
      const int64_t causal = part.tokens - job.queries + query - (part.position + token);
      end = causal < end ? causal : end;
    }
    const void* mask = nullptr;
    if (job.mask_kind != MaskKind::none) {
      const int64_t at = part.row * job.mask_stride[0] + head * job.mask_stride[1] + query * job.mask_stride[2] +
                         part.position + token;
      mask = (const uint8_t*)job.mask + at * (job.mask_kind == MaskKind::seen ? 1 : 4);
    }
    float* score = part.scores + r * kBlock;
    F32 most = set_f(kUnseen), x[kBlock / 16];
    BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
      F32 s = mul_f(load_f(score + 16 * i), set_f(job.scaling));
      if (job.softcap != 0.f) s = mul_f(tanh_f(div_f(s, set_f(job.softcap))), set_f(job.softcap));
      const int64_t left = count - 16 * i < 0 ? 0 : count - 16 * i < 16 ? count - 16 * i : 16;
      if (mask && job.mask_kind == MaskKind::added) {
        s = add_f(s, load_elements<DType::f32>(mask, 16 * i, left));
      } else if (mask) {
        alignas(16) uint8_t seen[16] = {};
        std::memcpy(seen, (const uint8_t*)mask + 16 * i, (size_t)left);
        s = fma_f(sub_f(to_float(load_u8_i(seen)), set_f(1.f)), set_f(-kUnseen), s);
      }
      if (16 * i + 15 > end) {
        static const float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const F32 past = add_f(load_f(kLanes), set_f((float)(16 * i - end)));
        s = fma_f(min_f(max_f(past, zero_f()), set_f(1.f)), set_f(kUnseen), s);
      }
      x[i] = max_f(set_f(kUnseen), s);  // in this order NaN comes through
      most = max_f(most, x[i]);
    }
    float top = max_of_f(most);
    const float before = part.top[row + r];
    if (top > before) {
      part.top[row + r] = top;
      alignas(64) float fades[16];
      store_f(fades, exp_f(set_f(before - top)));
      part.total[row + r] *= fades[0];
      float* sum = part.sum + (row + r) * size;
      for (int64_t c = 0; c < size; c += 16) store_f(sum + c, mul_f(load_f(sum + c), set_f(fades[0])));
    } else {
      top = before;
    }
    F32 total = zero_f();
    BG_UNROLL for (int i = 0; i < (int)kBlock / 16; ++i) {
      const F32 weight = exp_f(sub_f(x[i], set_f(top)));
      store_f(score + 16 * i, weight);
      total = add_f(total, weight);
    }
    part.total[row + r] += sum_f(total);
  }
}

BG_INLINE void clear_part(const AttentionJob& job, const AttentionPart& part) {
  const int64_t rows = padded_rows(job);
  for (int64_t r = 0; r < rows; ++r) part.top[r] = kUnseen, part.total[r] = 0.f;
  std::memset(part.sum, 0, (size_t)(rows * padded_size(job.v_size)) * 4);
}

}  // namespace BG_ISA
}  // namespace bitgrain
