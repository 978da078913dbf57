#include "linear/int_linear.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Activations that stay in a core's own cache beside a panel of weights.
constexpr int64_t kActivationBytes = 384 << 10;
// Weights that a thread takes at a time where little is computed with them.
constexpr int64_t kPanelBytes = 48 << 10;

}  // namespace

void int_linear(const IntLinearCall& call, int threads) {
  if (call.m <= 0) return;
  static thread_local Scratch bytes_memory, sums_memory, scales_memory;
  const Kernels& kernel = kernels();
  const IntWeights& w = *call.weights[0];
  const int64_t rows = w.bits == 8 && w.spans == 1 ? kernel.single_rows : kernel.grouped_rows;
  const int64_t tiles = ceil_div(call.m, rows);

  ActivationJob acts{};
  acts.x = call.x, acts.type = call.x_type, acts.m = call.m, acts.stride = call.x_stride;
  acts.spec = call.spec, acts.w = &w, acts.rows = rows;
  acts.bytes = bytes_memory.get<uint8_t>(tiles * rows * 4 * w.steps);
  acts.sums = sums_memory.get<int32_t>(tiles * rows * w.spans);
  acts.sum_factor = w.zeros == Zeros::constant ? -w.zero : 1;
  acts.scales = scales_memory.get<float>(tiles * rows);
  // a few rows are quantized sooner than a second thread is there
  parallel_for(call.m < 8 ? 1 : threads, tiles, 1, [&](int64_t first, int64_t last) {
    if (call.source) {
      static thread_local Scratch row_memory;
      ActivationJob own = acts;
      own.source = call.source, own.row = row_memory.get<float>(w.k);
      kernel.quantize_tiles(own, first, last);
    } else {
      kernel.quantize_tiles(acts, first, last);
    }
  });

  int64_t panels = 0;
  for (int64_t i = 0; i < call.count; ++i) panels += ceil_div(call.weights[i]->n, kPanel);
  const int64_t tile_bytes = rows * 4 * w.steps;
  int64_t tiles_at_once = kActivationBytes / tile_bytes < 2 ? 2 : kActivationBytes / tile_bytes;
  const int64_t blocks = ceil_div(tiles, tiles_at_once);
  tiles_at_once = ceil_div(tiles, blocks);

  // items: all panels against the first tiles, then all against the next ones
  const int64_t grain = call.m <= 16 ? ceil_div(kPanelBytes, w.panel_bytes) : 1;
  const int64_t runs = ceil_div(panels, grain);
  parallel_for(threads, blocks * runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / runs;
      int64_t from = (item % runs) * grain, to = from + grain < panels ? from + grain : panels;
      for (int64_t i = 0; i < call.count && from < to; ++i) {
        const IntWeights& one = *call.weights[i];
        const int64_t own = ceil_div(one.n, kPanel), stop = to < own ? to : own;
        if (from < stop) {
          IntPanelJob job{&one, acts.bytes, acts.sums, acts.scales, call.m, rows, block * tiles_at_once, 0,
                          call.y[i], call.y_type, call.y_stride[i]};
          job.last_tile = job.first_tile + tiles_at_once < tiles ? job.first_tile + tiles_at_once : tiles;
          kernel.int_panels(job, from, stop);
        }
        from = from > own ? from - own : 0, to -= own;
      }
    }
  });
}

}  // namespace bitgrain
