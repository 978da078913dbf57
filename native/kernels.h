// The kernels of one instruction set, each working on one thread; who calls them splits the work.
#pragma once
#include "attention/attention.h"
#include "attention/packed.h"
#include "attention/prefill.h"
#include "decoder/dense_rows.h"
#include "decoder/rows.h"
#include "linear/activations.h"
#include "linear/code_linear.h"
#include "linear/int_linear.h"
#include "solver/descend.h"
#include "solver/gram.h"
#include "solver/tile_search.h"

namespace bitgrain {

struct Kernels {
  const char* name;
  // int8 products
  int64_t grouped_rows, single_rows;  // of a register tile: weights with several spans, with one
  void (*quantize_tiles)(const ActivationJob&, int64_t first, int64_t last);
  void (*int_panels)(const IntPanelJob&, int64_t first, int64_t last);
  // prefill attention
  int64_t (*prefill_steps)(DType, int64_t features);
  void (*pack_past)(const PrefillJob&, int64_t first, int64_t last);
  void (*attend_tiles)(const PrefillJob&, int64_t first, int64_t last);
  // products with codes that are looked up
  int64_t input_bytes;  // 2: inputs are rounded to bfloat16; 4: they stay float32
  int64_t packed_rows;  // more (in tiles of single_rows, not of grouped_rows) are worth looking up a panel once for all
  void (*arrange_inputs)(const InputJob&, int64_t first, int64_t last);
  void (*code_panels)(const CodePanelJob&, int64_t first, int64_t last);
  // decode attention
  void (*load_queries)(const AttentionJob&, const AttentionPart&, bool packed);
  void (*attend_dense)(const AttentionJob&, const DenseTokens&, AttentionPart&);
  void (*attend_packed)(const AttentionJob&, const PackedTokens&, AttentionPart&);
  bool (*pack_states)(const StatesJob&, int64_t pair);
  void (*read_states)(const StatesJob&, int64_t pair);
  void (*exp_floats)(const float* x, float* y, int64_t count);
  // second moments
  bool has_bf16_dot;
  void (*gram_pack)(const GramJob&, int64_t first, int64_t last);    // panels
  void (*gram_blocks)(const GramJob&, int64_t first, int64_t last);  // of the triangle
  // GPTQ: columns [first, last) of some panels of lanes
  void (*update_columns)(const DescendJob&, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel);
  void (*round_columns)(const DescendJob&, int64_t first, int64_t last, int64_t seen, int64_t first_panel,
                        int64_t last_panel);
  // range searches: some tiles
  void (*tile_sums)(const TileJob&, int64_t first, int64_t last);
  void (*best_candidates)(const TileJob&, int64_t first, int64_t last);
  // the machine's own limits
  void (*read_bytes)(const uint8_t* memory, int64_t bytes);
  int64_t (*int8_loop)(int64_t rounds);  // both return the products that they made
  int64_t (*bf16_loop)(int64_t rounds);
  // rows between products
  void (*norm_row)(const void* norm_rows, int64_t row, float* to);
  void (*gated_row)(const void* gated_rows, int64_t row, float* to);
  // y[y_at ..] = x[x_at ..] + add; `add` may be null
  void (*add_row)(const void* x, DType x_type, int64_t x_at, const float* add, int64_t width, void* y, DType y_type,
                  int64_t y_at);
  void (*rotate_rows)(const RotateRows&, int64_t first, int64_t last);
  void (*dense_rows)(const DenseRowsJob&, int64_t first, int64_t last);
  // products on the matrix unit
  int64_t int_matrix_rows, code_matrix_rows;  // from so many rows on; out of reach where there is none
  void (*quantize_matrix)(const ActivationJob&, int64_t first, int64_t last);  // tiles
  void (*int_matrix)(const IntPanelJob&, int64_t first, int64_t last);         // panels
  void (*arrange_matrix)(const InputJob&, int64_t first, int64_t last);        // tiles
  void (*code_matrix)(const CodePanelJob&, int64_t first, int64_t last);       // panels
  int64_t query_rows;                                                          // of a tile, of tokens in bfloat16
  void (*pack_matrix)(const PrefillJob&, int64_t first, int64_t last);
  void (*attend_matrix)(const PrefillJob&, int64_t first, int64_t last);
};

// Whether the matrix unit can take a weight: codes less a zero point that no code comes near would not fit a byte.
BG_INLINE bool fits_matrix(const IntWeights& w) { return w.bits == 8 || (w.zero >= 0 && w.zero < 128); }

// Whether m rows meet a weight on the matrix unit. Sums of short spans take longer on their way out than they take to make.
BG_INLINE bool uses_matrix(const Kernels& kernel, const IntWeights& w, int64_t m) {
  return fits_matrix(w) && m >= kernel.int_matrix_rows && w.k >= kMatrixBytes * w.spans;
}
BG_INLINE bool uses_matrix(const Kernels& kernel, const CodeWeights&, int64_t m) { return m >= kernel.code_matrix_rows; }

// The best level that this machine has, or the one that the environment variable BITGRAIN_ISA names.
const Kernels& kernels();

// Names of the levels that were built and that this machine can run, best first.
int list_kernels(const Kernels** found, int room);

// Use another level from now on; false if there is none of that name here. For tests.
bool use_kernels(const char* name);

}  // namespace bitgrain
