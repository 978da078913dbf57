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

// A tile of queries of one head: [query, query + rows) of a batch row.
struct QueryRun {
  int64_t row, head, query, rows;
};

// Items are (batch row, head, tile of queries), a head's last tiles, which see most tokens, first.
BG_INLINE QueryRun query_run(const PrefillJob& one, int64_t item) {
  const int64_t pair = item / one.tiles, query = (one.tiles - 1 - item % one.tiles) * one.rows;
  const int64_t left = one.job->queries - query;
  return {pair / one.job->heads, pair % one.job->heads, query, left < one.rows ? left : one.rows};
}

struct TokenRange {
  int64_t first, end;  // the one behind the last
};

// Tokens that one of some queries sees.
BG_INLINE TokenRange seen_tokens(const PrefillJob& one, int64_t query, int64_t rows) {
  const int64_t ahead = one.past->tokens - one.job->queries, first = ahead + query + 1 - one.window;
  return {one.window && first > 0 ? first : 0, one.job->causal ? ahead + query + rows : one.past->tokens};
}

// Those of `count` tokens from `block` on that a query sees, counted from `block`; first is end where it sees none.
BG_INLINE TokenRange seen_in_block(const PrefillJob& one, int64_t query, int64_t block, int64_t count) {
  const TokenRange seen = seen_tokens(one, query, 1);
  const int64_t end = seen.end - block < 0 ? 0 : seen.end - block < count ? seen.end - block : count;
  const int64_t first = seen.first - block < 0 ? 0 : seen.first - block;
  return {first < end ? first : end, end};
}

void prefill_attention(const AttentionJob& job, const DenseTokens& past, int64_t window, int threads);

}  // namespace bitgrain
