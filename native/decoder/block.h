// A decoder block between its input and its output, in one call or in parts:
//
//   h = x + o(attention(rotate(q), rotate(k), v)), with q, k, v = products of norm(x)
//   y = h + down(act(gate) * up), with gate, up = products of norm(h)
//
// Weights of one stage may be joined in memory (one qkv weight): what counts is where their columns lie in a row.
#pragma once
#include "attention/packed.h"
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

struct KeysValues {  // of past and new tokens; there is room for the new ones at the end
  int64_t tokens;
  void* keys;  // [batch, kv_heads, tokens, head_dim], of the type of x
  void* values;
  int64_t k_stride[2], v_stride[2];  // of batch and head
  const PackedSide *packed_keys, *packed_values;  // or null: in place of those
  int64_t first;                                  // token in their memory
};

struct Mask {  // as in AttentionJob
  MaskKind kind;
  const void* mask;
  int64_t stride[3];
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

// A few new tokens of each sequence, x [batch, tokens, hidden]: their keys and values are written to the cache, and
// without a mask each sees what stands before it. False where they cannot be packed: NaN, Inf, or scales beyond float16.
bool run_block(const AttentionStage& attention, const MlpStage* mlp, const void* x, DType type, int64_t batch,
               int64_t tokens, const Positions& positions, const KeysValues& cache, const Mask& mask, void* y,
               int threads);

}  // namespace bitgrain
