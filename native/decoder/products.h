// Matrix products of several weights that read the same rows, whatever kernel runs them.
#pragma once
#include <vector>

#include "decoder/dense_rows.h"
#include "decoder/rows.h"
#include "linear/code_linear.h"
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

// Weights that are looked up, of the same groups and bits. The memory is the caller's.
class CodeProducts final : public Products {
 public:
  explicit CodeProducts(std::vector<const CodeWeights*> weights) : weights_(std::move(weights)) {}

  void run(const Rows& rows, int64_t m, void* const* y, DType y_type, int64_t stride, int threads) const override {
    const int64_t strides[] = {stride, stride, stride};
    code_linear({rows.x, rows.type, m, rows.stride, (int64_t)weights_.size(), weights_.data(), y, strides, y_type,
                 rows.source},
                threads);
  }

 private:
  std::vector<const CodeWeights*> weights_;  // at most 3
};

// Dense weights of one type. The memory is the caller's.
class DenseProducts final : public Products {
 public:
  explicit DenseProducts(std::vector<const DenseWeights*> weights) : weights_(std::move(weights)) {}

  void run(const Rows& rows, int64_t m, void* const* y, DType y_type, int64_t stride, int threads) const override {
    const int64_t strides[] = {stride, stride, stride};
    dense_rows({rows.x, rows.type, m, rows.stride, (int64_t)weights_.size(), weights_.data(), y, strides, y_type,
                rows.source},
               threads);
  }

 private:
  std::vector<const DenseWeights*> weights_;  // at most 3
};

// Products of different kinds; the rows [m, k] that they read are made once for all. `places`: of each part's weights
// among all of them.
class MixedProducts final : public Products {
 public:
  MixedProducts(int64_t k, std::vector<const Products*> parts, std::vector<std::vector<int>> places)
      : k_(k), parts_(std::move(parts)), places_(std::move(places)) {}

  void run(const Rows& rows, int64_t m, void* const* y, DType y_type, int64_t stride, int threads) const override {
    static thread_local Scratch memory;
    Rows made = rows;
    if (rows.source) {
      float* to = memory.get<float>(m * k_);
      make_rows(*rows.source, m, k_, to, DType::f32, threads);
      made = {to, DType::f32, k_, nullptr};
    }
    for (size_t part = 0; part < parts_.size(); ++part) {
      void* own[3];
      for (size_t i = 0; i < places_[part].size(); ++i) own[i] = y[places_[part][i]];
      parts_[part]->run(made, m, own, y_type, stride, threads);
    }
  }

 private:
  int64_t k_;
  std::vector<const Products*> parts_;
  std::vector<std::vector<int>> places_;  // at most 3 in all
};

}  // namespace bitgrain
