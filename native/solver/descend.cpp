#include "solver/descend.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Their rows of the factor stay in a shared cache while panel after panel passes by.
constexpr int64_t kColumnsAtOnce = 256;

}  // namespace

void load_lanes(const DescendJob& job, int threads) {
  parallel_for(threads, ceil_div(job.lanes, kLanePanel), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t lane = panel * kLanePanel, left = job.lanes - lane < kLanePanel ? job.lanes - lane : kLanePanel;
      float* to = job.panels + panel * job.columns * kLanePanel;
      for (int64_t i = 0; i < job.columns; ++i, to += kLanePanel) {
        for (int64_t j = 0; j < kLanePanel; ++j) to[j] = j < left ? job.numbers[i * job.lanes + lane + j] : 0.f;
      }
    }
  });
}

void update_columns(const DescendJob& job, int64_t first, int64_t last, int threads) {
  const Kernels& run = kernels();
  parallel_for(threads, ceil_div(job.lanes, kLanePanel), 1,
               [&](int64_t a, int64_t b) { run.update_columns(job, first, last, a, b); });
}

void round_columns(const DescendJob& job, int64_t first, int64_t last, int64_t seen, int threads) {
  const Kernels& run = kernels();
  for (int64_t start = first; start < last; start += kColumnsAtOnce) {
    const int64_t stop = start + kColumnsAtOnce < last ? start + kColumnsAtOnce : last;
    parallel_for(threads, ceil_div(job.lanes, kLanePanel), 1,
                 [&](int64_t a, int64_t b) { run.round_columns(job, start, stop, seen, a, b); });
  }
}

}  // namespace bitgrain
