// What a decoder does with rows (tokens) between its matrix products: norms, gated activations, rotations.
#pragma once
#include "common.h"

namespace bitgrain {

// Rows that are made when they are needed, in the cache of the thread that needs them: make(context, row, to).
struct RowSource {
  void (*make)(const void* context, int64_t row, float* to);
  const void* context;
};

// y = (x - mean) / sqrt(variance + eps) * weight + bias; not centered: y = x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
  int64_t width;
  const float* weight;  // null: none
  const float* bias;    // null: none
  float eps;
  int32_t centered;
};

struct NormRows {
  Norm norm;
  const void* x;  // rows `stride` elements apart
  DType type;
  int64_t stride;
};

enum class Act : int32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu_squared = 4 };

// act(gate) * up, or act(gate).
struct GatedRows {
  const void* gate;
  const void* up;  // null: none
  DType type;
  int64_t stride, width;
  Act act;
};

constexpr int64_t kMaxHead = 256;

enum class Rotary : int32_t { none = 0, half = 1, neighbours = 2 };  // which two features of a head turn together

// Heads of queries and keys, normed (where they have a norm) and rotated in place.
struct RotateRows {
  void* x;  // rows `stride` elements apart: q_heads heads from feature q_at on, k_heads from k_at on
  DType type;
  int64_t stride, q_at, k_at, q_heads, k_heads, head_dim;
  const Norm* q_norm;  // of one head, or null
  const Norm* k_norm;
  Rotary rotary;
  const void* cos;  // [cos_rows, rotary_dim]; row r of x takes row r % cos_rows
  const void* sin;
  DType cos_type;
  int64_t cos_rows, rotary_dim;
};

// Rows that nothing quantizes, to y [m, width].
void make_rows(const RowSource& source, int64_t m, int64_t width, void* y, DType type, int threads);

}  // namespace bitgrain
