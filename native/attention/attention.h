// Attention of a few queries over many tokens of the past (decoding): softmax(scaling Q K^T) V.
//
// The query heads that share a head of keys and values are computed together, so that the past is read once. Tokens are
// split into runs of kRun, whose length does not depend on the number of threads; a run gives for each query the largest
// score, the sum of exp(score - largest) and that sum weighted with the values (a part), and parts are merged in their
// order. Inside a run tokens come in blocks of kBlock with an online softmax.
#pragma once
#include "common.h"

namespace bitgrain {

constexpr int64_t kRun = 256, kBlock = 64;
constexpr float kUnseen = -3e38f;  // the score of a token that a query does not see; finite, so that nothing is NaN

enum class MaskKind : int32_t { none = 0, seen = 1, added = 2 };  // bytes 0 and 1; floats

struct AttentionJob {
  const void* q;  // [batch, heads, queries, k_size], the last axis contiguous; strides in elements
  DType q_type;
  int32_t planes;  // for packed keys and values: bytes of what is multiplied by codes (attention/packed.h)
  int64_t q_stride[3];
  int64_t batch, heads, groups, queries;  // groups: heads of keys and values
  int64_t k_size, v_size;
  float scaling, softcap;  // softcap 0: none
  bool causal;             // the last query sees all tokens, the one before it all but the last
  MaskKind mask_kind;
  const void* mask;  // [batch, heads, queries, tokens], u8 or f32, tokens contiguous; strides in elements, 0: shared
  int64_t mask_stride[3];
  const float* sinks;  // [heads] or null: a score more in each row, without a value
  void* out;           // [batch, heads, queries, v_size], the type of q
  int64_t out_stride[3];
};

// Keys and values as numbers.
struct DenseTokens {
  int64_t tokens;
  DType type;
  const void *k, *v;  // [batch, groups, tokens, size], the last axis contiguous; strides in elements
  int64_t k_stride[3], v_stride[3];
};

// What one run of tokens of one batch row and group gives, and what it needs. Rows are (head of the group, query).
struct AttentionPart {
  int64_t row, group;         // of the batch; of keys and values
  int64_t first, last;        // tokens of its source
  int64_t position, tokens;   // of token 0 of the source among all tokens; how many those are
  float *top, *total, *sum;   // [rows], [rows, 16] whose lanes add up, [rows, padded v_size]
  float *q;                   // [rows, padded k_size]: the queries
  float *scores;              // [rows of a tile, kBlock]
  int8_t* q_bytes;            // for packed keys: see attention_packed.inl.h
  float* q_steps;
  int32_t* q_sums;
};

constexpr int64_t kMostRows = 8;  // of a tile of rows at any instruction set

static inline constexpr int64_t padded_size(int64_t size) { return round_up(size, 16); }
static inline constexpr int64_t padded_rows(const AttentionJob& job) {
  return round_up(job.heads / job.groups * job.queries, kMostRows);
}
static inline constexpr int64_t part_floats(const AttentionJob& job) {
  return padded_rows(job) * (1 + 16 + padded_size(job.v_size));
}

}  // namespace bitgrain
