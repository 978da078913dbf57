// Matrix products of several weights that read the same rows, whatever kernel runs them.
#pragma once
#include <vector>

#include "decoder/rows.h"
#include "linear/int_linear.h"

namespace bitgrain {

// [m, k]: in memory, `stride` elements apart, or made one by one.
struct Rows {
  const void* x;
  DType type;
  int64_t stride;
  const RowSource* source;
};

class Products {
 public:
  virtual ~Products() = default;
  // y[i] [m, n of weight i], rows `stride` elements apart
  virtual void run(const Rows& rows, int64_t m, void* const* y, DType y_type, int64_t stride, int threads) const = 0;
};

// Integer weights of the same spans, with one way to quantize what they read. The memory is the caller's.
class IntProducts final : public Products {
 public:
  IntProducts(std::vector<const IntWeights*> weights, const ActivationSpec& spec)
      : weights_(std::move(weights)), spec_(spec) {}

  void run(const Rows& rows, int64_t m, void* const* y, DType y_type, int64_t stride, int threads) const override {
    const int64_t strides[] = {stride, stride, stride};
    int_linear({rows.x, rows.type, m, rows.stride, spec_, (int64_t)weights_.size(), weights_.data(), y, strides, y_type,
                rows.source},
               threads);
  }

 private:
  std::vector<const IntWeights*> weights_;  // at most 3
  ActivationSpec spec_;
};

}  // namespace bitgrain
