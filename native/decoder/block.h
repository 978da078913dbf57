// A decoder block between its input and its output, in one call or in parts:
//
//   h = x + o(attention(rotate(q), rotate(k), v)), with q, k, v = products of norm(x)
//   y = h + down(act(gate) * up), with gate, up = products of norm(h)
//
// Weights of one stage may be joined in memory (one qkv weight): what counts is where their columns lie in a row.
#pragma once
#include "decoder/products.h"
#include "decoder/rows.h"

namespace bitgrain {

struct AttentionStage {
  Norm norm;
  const Products* qkv;
  int64_t qkv_width, at[3];  // where the columns of q, k and v start
  int64_t joined;            // 1: one weight writes all columns
  int64_t heads, kv_heads, head_dim;
  bool normed[2];            // q, k
  Norm head_norm[2];
  Rotary rotary;
  float scale;
  const Products* o;
};

struct MlpStage {
  Norm norm;
  const Products* gate_up;
  int64_t width, gate_at, up_at, row_width;  // width of the gate; where gate and up lie in a row. up_at < 0: no gate
  int64_t joined;
  Act act;
  const Products* down;
};

struct Positions {  // what the model gives its blocks
  const void* cos;
  const void* sin;
  DType type;
  int64_t rows, rotary_dim;
};

struct KeysValues {  // [batch, kv_heads, .., head_dim], of the type of x
  void* keys;
  void* values;
  int64_t batch_stride, head_stride;
  int64_t past;  // tokens that are there
};

// q, k and v of m rows of x [m, hidden], normed and rotated, to out [m, qkv_width].
void start_attention(const AttentionStage& part, const void* x, DType type, int64_t m, const Positions& positions,
                     void* out, DType out_type, int threads);

// h [m, hidden] = x + o(attended [m, heads * head_dim]).
void finish_attention(const AttentionStage& part, const void* x, DType type, int64_t m, const void* attended,
                      DType attended_type, float* h, int threads);

// y [m, hidden] = h + mlp(norm(h)); what lies between gate, up and down is kept in `type`.
void run_mlp(const MlpStage& part, const float* h, int64_t m, void* y, DType type, int threads);

// finish_attention and run_mlp; without an MLP y = h.
void finish_block(const AttentionStage& attention, const MlpStage* mlp, const void* x, DType type, int64_t m,
                  const void* attended, DType attended_type, void* y, int threads);

// One new token of each sequence: its keys and values are added to the cache.
void run_block(const AttentionStage& attention, const MlpStage* mlp, const void* x, DType type, int64_t batch,
               const Positions& positions, const KeysValues& cache, void* y, int threads);

}  // namespace bitgrain
