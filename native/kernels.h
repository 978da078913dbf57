// The kernels of one instruction set, each working on one thread; who calls them splits the work.
#pragma once
#include "linear/activations.h"
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
};

// The best level that this machine has, or the one that the environment variable BITGRAIN_ISA names.
const Kernels& kernels();

// Names of the levels that were built and that this machine can run, best first.
int list_kernels(const Kernels** found, int room);

// Use another level from now on; false if there is none of that name here. For tests.
bool use_kernels(const char* name);

}  // namespace bitgrain
