// Attention of many queries over many tokens (prefill): softmax(scaling Q K^T) V with an online softmax (arXiv 2205.14135).
//
// Both products run as those of linear layers do: keys are packed as a weight of 32 tokens a panel, values as one of 32
// features a panel, queries and softmax weights are the interleaved rows. A lane of 4 bytes holds two bfloat16 numbers where
// inputs are bfloat16 and the level multiplies them (products exact, sums in float32, softmax weights rounded to bfloat16),
// else one float.
#pragma once
#include "attention/attention.h"
#include "common.h"

namespace bitgrain {

constexpr int64_t kKeysAtOnce = 128;
constexpr int64_t kMostFeatures = 256;  // of a head

struct PrefillJob {
  const AttentionJob* job;  // no mask, cap or sinks
  const DenseTokens* past;
  int64_t window;       // a query sees so many tokens, itself included; 0: all
  int64_t k_steps;      // lanes of one token's key
  int64_t key_panels;   // of 32 tokens
  int64_t value_steps;  // lanes of one feature's values
  uint8_t *k, *v;       // packed: [batch, groups][key_panels][k_steps][32][4], [batch, groups][v panels][value_steps][32][4]
  int64_t k_bytes, v_bytes;  // of one batch row and group
  int64_t rows, tiles;       // of a tile of queries; tiles of one head
};

void prefill_attention(const AttentionJob& job, const DenseTokens& past, int64_t window, int threads);

}  // namespace bitgrain
