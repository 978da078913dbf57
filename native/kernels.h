// The kernels of one instruction set, each working on one thread; who calls them splits the work.
#pragma once
#include "linear/activations.h"
#include "linear/code_linear.h"
#include "linear/int_linear.h"

namespace bitgrain {

struct Kernels {
  const char* name;
  // int8 products
  int64_t grouped_rows, single_rows;  // of a register tile: weights with several spans, with one
  void (*quantize_tiles)(const ActivationJob&, int64_t first, int64_t last);
  void (*int_panels)(const IntPanelJob&, int64_t first, int64_t last);
  // products with codes that are looked up
  int64_t input_bytes;  // 2: inputs are rounded to bfloat16; 4: they stay float32
  int64_t packed_rows;  // more (in tiles of single_rows, not of grouped_rows) are worth looking up a panel once for all
  void (*arrange_inputs)(const InputJob&, int64_t first, int64_t last);
  void (*code_panels)(const CodePanelJob&, int64_t first, int64_t last);
};

// The best level that this machine has, or the one that the environment variable BITGRAIN_ISA names.
const Kernels& kernels();

// Names of the levels that were built and that this machine can run, best first.
int list_kernels(const Kernels** found, int room);

// Use another level from now on; false if there is none of that name here. For tests.
bool use_kernels(const char* name);

}  // namespace bitgrain
