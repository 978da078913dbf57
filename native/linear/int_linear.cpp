#include "linear/int_linear.h"

#include "kernels.h"
#include "linear/panels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Activations that stay in a core's own cache beside a panel of weights.
constexpr int64_t kActivationBytes = 384 << 10;
// Processors with a matrix unit have 2 MB of such a cache.
constexpr int64_t kMatrixActivationBytes = 1 << 20;

}  // namespace

void int_linear(const IntLinearCall& call, int threads) {
  if (call.m <= 0) return;
  static thread_local Scratch bytes_memory, sums_memory, scales_memory;
  const Kernels& kernel = kernels();
  const IntWeights& w = *call.weights[0];
  const bool matrix = uses_matrix(kernel, w, call.m);
  const int64_t rows = matrix ? kMatrixTile : has_one_span(w) ? kernel.single_rows : kernel.grouped_rows;
  const int64_t row_bytes = matrix ? matrix_row_bytes(w) : 4 * w.steps;
  const int64_t tiles = ceil_div(call.m, rows);

  ActivationJob acts{};
  acts.x = call.x, acts.type = call.x_type, acts.m = call.m, acts.stride = call.x_stride;
  acts.spec = call.spec, acts.w = &w, acts.rows = rows, acts.row_bytes = row_bytes;
  acts.bytes = bytes_memory.get<uint8_t>(tiles * rows * row_bytes);
  acts.sums = sums_memory.get<int32_t>(tiles * rows * w.spans);
  acts.sum_factor = w.zeros == Zeros::constant ? -w.zero : 1;
  acts.scales = scales_memory.get<float>(tiles * rows);
  // a few rows are quantized sooner than a second thread is there
  const auto quantize = matrix ? kernel.quantize_matrix : kernel.quantize_tiles;
  parallel_for(call.m < 8 ? 1 : threads, tiles, 1, [&](int64_t first, int64_t last) {
    if (call.source) {
      static thread_local Scratch row_memory;
      ActivationJob own = acts;
      own.source = call.source, own.row = row_memory.get<float>(w.k);
      quantize(own, first, last);
    } else {
      quantize(acts, first, last);
    }
  });

  int64_t tiles_at_once = (matrix ? kMatrixActivationBytes : kActivationBytes) / (rows * row_bytes);
  tiles_at_once = tiles_at_once < 2 ? 2 : tiles_at_once;
  const int64_t blocks = ceil_div(tiles, tiles_at_once);
  tiles_at_once = ceil_div(tiles, blocks);

  for_panels(call.weights, call.count, call.m, blocks, threads, [&](int64_t i, int64_t block, int64_t from, int64_t to) {
    const int64_t first = block * tiles_at_once, last = first + tiles_at_once < tiles ? first + tiles_at_once : tiles;
    IntPanelJob job{call.weights[i], acts.bytes, acts.sums, acts.scales, call.m, rows, row_bytes, first, last,
                    call.y[i], call.y_type, call.y_stride[i]};
    if (matrix) {
      static thread_local Scratch totals_memory, partial_memory;
      job.totals = totals_memory.get<float>(tiles_at_once * rows * kPanel);
      job.partial = partial_memory.get<int32_t>(tiles_at_once * rows * kPanel);
      kernel.int_matrix(job, from, to);
    } else {
      kernel.int_panels(job, from, to);
    }
  });
}

}  // namespace bitgrain
