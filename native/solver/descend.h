// GPTQ's loop over the columns of a weight (arXiv 2210.17323, algorithm 1), rows side by side ("lanes").
//
// With U^T U = H^-1 and F = U^T: column i, brought up to date by w_i -= sum of F_ij e_j over the columns j before it, is
// rounded to its grid, and e_i = (w_i - q_i) / F_ii. Lanes never meet, so that any split of them gives the same bits.
//
// The weights lie in panels of 48 lanes, [panels][columns][48]; where a column has been rounded its errors take its
// place. A register tile takes kFloatRows columns at once: one long product with all errors before them, then one column
// after the other.
#pragma once
#include "common.h"
#include "solver/grid.h"

namespace bitgrain {

constexpr int64_t kLanePanel = 48, kDescendChunk = 256;

struct DescendJob {
  int64_t columns, lanes;
  float* panels;
  const float* factor;   // F [columns, columns], lower triangular
  const int32_t* tiles;  // [columns]: which row of the tables below
  const float *scale, *divisor, *zero;  // [.., lanes]; divisor: scale, 1 where that is 0; zero: null if symmetric
  Grid grid;
  float* numbers;        // [columns, lanes]: in, weights; out, numbers of the grid
  double* loss;          // [lanes]: the sum of e^2 is added
  const uint8_t* kept;   // [columns, lanes]: 1 for weights that stay as they are, with no error; or null
  float* exact;          // [columns, lanes]: out, every weight as it was when its turn came; or null
};

// Weights of job.numbers into panels.
void load_lanes(const DescendJob& job, int threads);

// Columns [first, last) after the errors of all before `first`: as they are now, into job.numbers.
void update_columns(const DescendJob& job, int64_t first, int64_t last, int threads);

// Rounds columns [first, last), which have seen the errors of columns before `seen` (0 or first) already.
void round_columns(const DescendJob& job, int64_t first, int64_t last, int64_t seen, int threads);

}  // namespace bitgrain
