#include "solver/gram.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {

void add_gram(const void* x, DType type, int64_t tokens, int64_t k, int64_t stride, float* h, int threads) {
  static thread_local Scratch scratch;
  const Kernels& run = kernels();
  const int64_t panels = ceil_div(k, kGramPanel);
  for (int64_t first = 0; first < tokens; first += kGramTokens) {
    GramJob job{static_cast<const uint8_t*>(x) + first * stride * static_cast<int64_t>(size_of(type)), type,
                tokens - first < kGramTokens ? tokens - first : kGramTokens, k, stride,
                type == DType::bf16 && run.has_bf16_dot, nullptr, h};
    job.panels = scratch.get<float>(panels * gram_steps(job) * kGramPanel);
    parallel_for(threads, panels, 1, [&](int64_t a, int64_t b) { run.gram_pack(job, a, b); });
    parallel_for(threads, panels * (panels + 1) / 2, 4, [&](int64_t a, int64_t b) { run.gram_blocks(job, a, b); });
  }
}

void mirror(float* h, int64_t k, int threads) {
  constexpr int64_t kBlock = 32;  // two blocks fit the innermost cache
  parallel_for(threads, ceil_div(k, kBlock), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t top = block * kBlock, bottom = top + kBlock < k ? top + kBlock : k;
      for (int64_t left = 0; left <= top; left += kBlock) {
        for (int64_t i = top; i < bottom; ++i) {
          const int64_t end = left + kBlock < i ? left + kBlock : i;
          for (int64_t j = left; j < end; ++j) h[i * k + j] = h[j * k + i];
        }
      }
    }
  });
}

}  // namespace bitgrain
