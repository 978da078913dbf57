// A format's numbers, to which the loops of solvers and range searches round.
#pragma once
#include "common.h"

namespace bitgrain {

struct Grid {
  enum Kind : int32_t { integer = 0, floating = 1, table = 2 };
  int32_t kind;
  float low, high;       // numbers beyond are clipped first (integer, floating)
  float smallest, step;  // floating: the smallest power of two with a step of its own, and that step relative to it
  int32_t count;         // table
  float values[16];      // ascending
  float above[15];       // x > above[i] means values[i + 1] or more
};

}  // namespace bitgrain
