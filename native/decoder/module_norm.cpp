#include "decoder/module_norm.h"

#include <algorithm>
#include <cmath>

#include "floats.h"

namespace bitgrain {
namespace {

constexpr int kSide = 4, kLevels = 4;

int64_t ceil_log2(int64_t n) {
  int64_t log = 1;
  while ((int64_t(1) << log) < n) ++log;
  return log;
}

template <int kLanes>
float sum_of_squares(const float* x, int64_t width) {
  float sums[kLevels][kSide][kLanes] = {};
  const int64_t vectors = width / kLanes, count = vectors / kSide;
  const int64_t power = std::max<int64_t>(4, ceil_log2(count) / kLevels), step = int64_t(1) << power;
  const auto add = [&](int level, int side, const float* from) {
    for (int i = 0; i < kLanes; ++i) sums[level][side][i] += from[i] * from[i];
  };
  int64_t at = 0;
  while (at + step <= count) {
    for (const int64_t end = at + step; at < end; ++at) {
      for (int side = 0; side < kSide; ++side) add(0, side, x + (at * kSide + side) * kLanes);
    }
    for (int level = 1; level < kLevels; ++level) {
      for (int side = 0; side < kSide; ++side) {
        for (int i = 0; i < kLanes; ++i) sums[level][side][i] += sums[level - 1][side][i], sums[level - 1][side][i] = 0;
      }
      if (at & (step - 1) << level * power) break;
    }
  }
  for (; at < count; ++at) {
    for (int side = 0; side < kSide; ++side) add(0, side, x + (at * kSide + side) * kLanes);
  }
  for (int level = 1; level < kLevels; ++level) {
    for (int side = 0; side < kSide; ++side) {
      for (int i = 0; i < kLanes; ++i) sums[0][side][i] += sums[level][side][i];
    }
  }
  for (at = count * kSide; at < vectors; ++at) add(0, 0, x + at * kLanes);
  for (int side = 1; side < kSide; ++side) {
    for (int i = 0; i < kLanes; ++i) sums[0][0][i] += sums[0][side][i];
  }
  float sum = 0;
  for (at = vectors * kLanes; at < width; ++at) sum += x[at] * x[at];
  for (int i = 0; i < kLanes; ++i) sum += sums[0][0][i];
  return sum;
}

template <DType kType>
void norm_rows_of(const void* x, int64_t rows, int64_t width, const void* weight, float eps, int lanes, void* y) {
  static thread_local Scratch memory;
  float* row = memory.get<float>(width);
  for (int64_t first = 0; first < rows * width; first += width) {
    for (int64_t i = 0; i < width; ++i) row[i] = load_number(x, kType, first + i);
    const float sum = lanes == 16  ? sum_of_squares<16>(row, width)
                      : lanes == 8 ? sum_of_squares<8>(row, width)
                                   : sum_of_squares<4>(row, width);
    const float r = 1.f / std::sqrt(sum / float(width) + eps);
    for (int64_t i = 0; i < width; ++i) {
      float normed = row[i] * r;
      if (kType == DType::bf16) normed = from_bf16(to_bf16(normed));
      if (kType == DType::f16) normed = from_f16(to_f16(normed));
      store_number(y, kType, first + i, load_number(weight, kType, i) * normed);
    }
  }
}

}  // namespace

void module_norm(const void* x, DType type, int64_t rows, int64_t width, const void* weight, float eps, int lanes, void* y) {
  const auto run = type == DType::f32    ? norm_rows_of<DType::f32>
                   : type == DType::bf16 ? norm_rows_of<DType::bf16>
                                         : norm_rows_of<DType::f16>;
  run(x, rows, width, weight, eps, lanes, y);
}

}  // namespace bitgrain
