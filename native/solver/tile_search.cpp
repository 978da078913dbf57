#include "solver/tile_search.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// So many numbers are worth the call of another thread.
int64_t tiles_at_once(const TileJob& job) {
  const int64_t work = job.n * job.candidates;
  return work > 0 && work < 16384 ? 16384 / work : 1;
}

}  // namespace

void tile_sums(const TileJob& job, int threads) {
  const Kernels& run = kernels();
  parallel_for(threads, job.tiles, tiles_at_once(job), [&](int64_t a, int64_t b) { run.tile_sums(job, a, b); });
}

void best_candidates(const TileJob& job, int threads) {
  const Kernels& run = kernels();
  parallel_for(threads, job.tiles, tiles_at_once(job), [&](int64_t a, int64_t b) { run.best_candidates(job, a, b); });
}

}  // namespace bitgrain
