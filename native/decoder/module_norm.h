// RMSNorm to the bit as modules of transformers compute it by torch's operators, for a norm whose numbers others compare:
//
//   r = 1 / sqrt(mean(x^2) + eps) in float32; y = weight * round(x * r), rounded again
//
// Its sum runs in the order of torch's own (ATen's cascade_sum for one contiguous row): `lanes` numbers of a vector, four
// vectors side by side, sums of 16 of those cascaded. Whether that is still the order is for the caller to find out.
#pragma once
#include "common.h"

namespace bitgrain {

constexpr int64_t kMostNormed = 32768;  // numbers of a row: beyond, torch sums in several threads

// x, y [rows, width] and weight [width], all of `type`; lanes 4, 8 or 16.
void module_norm(const void* x, DType type, int64_t rows, int64_t width, const void* weight, float eps, int lanes, void* y);

}  // namespace bitgrain
