#include "linear/int_linear.h"

#include "kernels.h"
#include "linear/panels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Activations that stay in a core's own cache beside a panel of weights.
constexpr int64_t kActivationBytes = 384 << 10;

}  // namespace

void int_linear(const IntLinearCall& call, int threads) {
  if (call.m <= 0) return;
  static thread_local Scratch bytes_memory, sums_memory, scales_memory;
  const Kernels& kernel = kernels();
  const IntWeights& w = *call.weights[0];
  const int64_t rows = has_one_span(w) ? kernel.single_rows : kernel.grouped_rows;
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

  const int64_t tile_bytes = rows * 4 * w.steps;
  int64_t tiles_at_once = kActivationBytes / tile_bytes < 2 ? 2 : kActivationBytes / tile_bytes;
  const int64_t blocks = ceil_div(tiles, tiles_at_once);
  tiles_at_once = ceil_div(tiles, blocks);

  for_panels(call.weights, call.count, call.m, blocks, threads, [&](int64_t i, int64_t block, int64_t from, int64_t to) {
    const int64_t first = block * tiles_at_once, last = first + tiles_at_once < tiles ? first + tiles_at_once : tiles;
    kernel.int_panels({call.weights[i], acts.bytes, acts.sums, acts.scales, call.m, rows, first, last, call.y[i],
                       call.y_type, call.y_stride[i]},
                      from, to);
  });
}

}  // namespace bitgrain
