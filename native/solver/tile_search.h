// What a tile of numbers loses under a scale and zero point, for range searches: x ~ s (v - z), v = round(x / s + z).
//
// Terms are float32, computed as torch computes them one after the other; they are added in float64, 16 sums side by side
// whose halves are then added to each other: the same at every instruction set.
#pragma once
#include "common.h"
#include "solver/grid.h"

namespace bitgrain {

struct TileJob {
  const float* x;        // [tiles, n]
  const float* weights;  // [tiles, n] or null
  int64_t tiles, n;
  Grid grid;
  const float* scale;    // [candidates, tiles]; x is divided by 1 where it is 0
  const float* zero;     // likewise, or null
  int64_t candidates;
  // of one candidate: sums [tiles] of w (x - s (v - z))^2 and, if wanted, of w v, w v v and w x v
  double *error, *wv, *wvv, *wxv;
  int32_t* best;         // [tiles], of several: the first with the smallest error below error[tile]; -1 for none
};

// Fills error, and wv, wvv, wxv where these are not null.
void tile_sums(const TileJob& job, int threads);

// error: in, what is to be undercut; out, the smallest.
void best_candidates(const TileJob& job, int threads);

}  // namespace bitgrain
