#include "linear/code_linear.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Inputs that stay in a core's own cache beside a panel of weights.
constexpr int64_t kInputsAtOnce = 384 << 10;
// Where a panel is unpacked once for them all, it is the sums (32 a row) that stay there.
constexpr int64_t kUnpackedRows = 384;
// From more rows on it is worth doing for 8-bit codes, which take longer than looking up does.
constexpr int64_t kConvertedRows = 48;

}  // namespace

void code_linear(const CodeLinearCall& call, int threads) {
  if (call.m <= 0) return;
  static thread_local Scratch tiles_memory, sums_memory;
  const Kernels& kernel = kernels();
  const CodeWeights& w = *call.weights[0];
  const bool convert = w.bits == 8 && call.m > kConvertedRows, unpacked = convert || call.m > kernel.packed_rows;
  int64_t tiles = ceil_div(call.m, unpacked ? kernel.single_rows : kernel.grouped_rows);
  const int64_t rows = ceil_div(call.m, tiles);  // of about one size, and no tile of few rows at the end
  tiles = ceil_div(call.m, rows);

  bool zeros = false;
  int64_t panels = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    zeros = zeros || call.weights[i]->zeros != Zeros::constant;
    panels += ceil_div(call.weights[i]->n, kPanel);
  }
  InputJob inputs{call.x, call.x_type, call.m, call.x_stride, &w, rows, nullptr, nullptr};
  inputs.tiles = tiles_memory.get<uint8_t>(tiles * rows * w.steps * 2 * kernel.input_bytes);
  if (zeros) inputs.sums = sums_memory.get<float>(tiles * rows * w.spans);
  parallel_for(call.m < 8 ? 1 : threads, tiles, 1,
               [&](int64_t first, int64_t last) { kernel.arrange_inputs(inputs, first, last); });

  int64_t tiles_at_once = unpacked ? kUnpackedRows / rows : kInputsAtOnce / (rows * w.steps * 2 * kernel.input_bytes);
  tiles_at_once = tiles_at_once < 2 ? 2 : tiles_at_once;
  const int64_t blocks = ceil_div(tiles, tiles_at_once);
  tiles_at_once = ceil_div(tiles, blocks);

  // items: all panels against the first tiles, then all against the next ones
  const int64_t grain = call.m <= 16 ? (panels + 8 * threads - 1) / (8 * threads) : 1;
  const int64_t runs = ceil_div(panels, grain);
  parallel_for(threads, blocks * runs, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch totals_memory;
    float* totals = unpacked ? totals_memory.get<float>(tiles_at_once * rows * kPanel) : nullptr;
    for (int64_t item = first; item < last; ++item) {
      const int64_t first_tile = item / runs * tiles_at_once;
      const int64_t last_tile = first_tile + tiles_at_once < tiles ? first_tile + tiles_at_once : tiles;
      int64_t from = (item % runs) * grain, to = from + grain < panels ? from + grain : panels;
      for (int64_t i = 0; i < call.count && from < to; ++i) {
        const CodeWeights& one = *call.weights[i];
        const int64_t own = ceil_div(one.n, kPanel), stop = to < own ? to : own;
        if (from < stop) {
          kernel.code_panels({&one, inputs.tiles, inputs.sums, call.m, rows, first_tile, last_tile, totals, call.y[i],
                              call.y_type, call.y_stride[i]},
                             from, stop);
        }
        from = from > own ? from - own : 0, to -= own;
      }
    }
  });
}

}  // namespace bitgrain
