// H += X^T X, of which only the upper triangle is computed: the second moments of a layer's inputs.
//
// Tokens are worked on up to kGramTokens at a time. They are first laid out in panels of 48 features: [panels][steps][48]
// words of 4 bytes, a step being one token in float32, or two tokens in bfloat16 where the level multiplies such pairs
// (products are then exact, and summed in float32). A sum runs over kGramChunk steps, the sums of chunks are added, and
// what the tokens of one call come to is added to H: the rounding is that of short sums.
#pragma once
#include "common.h"

namespace bitgrain {

constexpr int64_t kGramPanel = 48, kGramTokens = 512, kGramChunk = 128, kGramPairChunk = 32;

struct GramJob {
  const void* x;  // [tokens, k], rows `stride` elements apart
  DType type;     // f32, bf16, f16
  int64_t tokens, k, stride;
  bool pairs;     // panels hold pairs of bf16
  float* panels;
  float* h;       // [k, k]
};

constexpr int64_t gram_steps(const GramJob& job) { return job.pairs ? ceil_div(job.tokens, 2) : job.tokens; }

// h is complete on and above the diagonal; what lies below is not defined before `mirror`.
void add_gram(const void* x, DType type, int64_t tokens, int64_t k, int64_t stride, float* h, int threads);

// The upper triangle of h [k, k] on both sides.
void mirror(float* h, int64_t k, int threads);

}  // namespace bitgrain
