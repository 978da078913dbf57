// The kernels of one instruction set, each working on one thread; who calls them splits the work.
#pragma once
#include "attention/attention.h"
#include "attention/packed.h"
#include "linear/activations.h"
#include "linear/int_linear.h"
#include "decoder/dense_rows.h"
#include "decoder/rows.h"

namespace bitgrain {

struct Kernels {
  const char* name;
  // int8 products
  int64_t grouped_rows, single_rows;  // of a register tile: weights with several spans, with one
  void (*quantize_tiles)(const ActivationJob&, int64_t first, int64_t last);
  void (*int_panels)(const IntPanelJob&, int64_t first, int64_t last);
  // decode attention
  void (*load_queries)(const AttentionJob&, const AttentionPart&, bool packed);
  void (*attend_dense)(const AttentionJob&, const DenseTokens&, AttentionPart&);
  void (*attend_packed)(const AttentionJob&, const PackedTokens&, AttentionPart&);
  bool (*pack_states)(const StatesJob&, int64_t pair);
  void (*read_states)(const StatesJob&, int64_t pair);
  void (*exp_floats)(const float* x, float* y, int64_t count);
  // rows between products
  void (*norm_row)(const void* norm_rows, int64_t row, float* to);
  void (*gated_row)(const void* gated_rows, int64_t row, float* to);
  // y[y_at ..] = x[x_at ..] + add; `add` may be null
  void (*add_row)(const void* x, DType x_type, int64_t x_at, const float* add, int64_t width, void* y, DType y_type,
                  int64_t y_at);
  void (*rotate_rows)(const RotateRows&, int64_t first, int64_t last);
  void (*dense_rows)(const DenseRowsJob&, int64_t first, int64_t last);
};

// The best level that this machine has, or the one that the environment variable BITGRAIN_ISA names.
const Kernels& kernels();

// Names of the levels that were built and that this machine can run, best first.
int list_kernels(const Kernels** found, int room);

// Use another level from now on; false if there is none of that name here. For tests.
bool use_kernels(const char* name);

}  // namespace bitgrain
