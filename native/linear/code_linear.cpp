#include "linear/code_linear.h"

#include "kernels.h"
#include "linear/panels.h"
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
  static thread_local Scratch tiles_memory, sums_memory, scales_memory;
  const Kernels& kernel = kernels();
  const CodeWeights& w = *call.weights[0];
  const bool matrix = uses_matrix(kernel, w, call.m), convert = w.bits == 8 && call.m > kConvertedRows;
  const bool unpacked = matrix || convert || call.m > kernel.packed_rows;
  int64_t tiles = ceil_div(call.m, matrix ? kMatrixTile : unpacked ? kernel.single_rows : kernel.grouped_rows);
  // of about one size, and no tile of few rows at the end
  const int64_t rows = matrix ? kMatrixTile : ceil_div(call.m, tiles);
  const int64_t row_bytes = matrix ? matrix_row_bytes(w) : w.steps * 2 * kernel.input_bytes;
  tiles = ceil_div(call.m, rows);

  bool zeros = false;
  for (int64_t i = 0; i < call.count; ++i) zeros = zeros || call.weights[i]->zeros != Zeros::constant;
  InputJob inputs{call.x, call.x_type, call.m, call.x_stride, &w, rows, row_bytes, nullptr, nullptr, nullptr, call.source};
  inputs.tiles = tiles_memory.get<uint8_t>(tiles * rows * row_bytes);
  if (zeros) inputs.sums = sums_memory.get<float>(tiles * rows * w.spans);
  if (w.inputs.kind != InputScale::none) inputs.scales = scales_memory.get<float>(tiles * rows * scales_of_row(w));
  parallel_for(call.m < 8 ? 1 : threads, tiles, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch row_memory;
    InputJob own = inputs;
    if (own.source) own.row = row_memory.get<float>(w.k);
    (matrix ? kernel.arrange_matrix : kernel.arrange_inputs)(own, first, last);
  });

  int64_t tiles_at_once = unpacked ? kUnpackedRows / rows : kInputsAtOnce / (rows * row_bytes);
  tiles_at_once = tiles_at_once < 2 ? 2 : tiles_at_once;
  const int64_t blocks = ceil_div(tiles, tiles_at_once);
  tiles_at_once = ceil_div(tiles, blocks);

  for_panels(call.weights, call.count, call.m, blocks, threads, [&](int64_t i, int64_t block, int64_t from, int64_t to) {
    static thread_local Scratch totals_memory;
    const int64_t first = block * tiles_at_once, last = first + tiles_at_once < tiles ? first + tiles_at_once : tiles;
    float* totals = unpacked ? totals_memory.get<float>(tiles_at_once * rows * kPanel) : nullptr;
    const CodePanelJob job{call.weights[i], inputs.tiles, inputs.sums, inputs.scales, call.m, rows, row_bytes, first, last,
                           totals, call.y[i], call.y_type, call.y_stride[i]};
    (matrix ? kernel.code_matrix : kernel.code_panels)(job, from, to);
  });
}

}  // namespace bitgrain
