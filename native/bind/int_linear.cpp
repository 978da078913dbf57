#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bind/bind.h"
#include "bind/packed_weight.h"
#include "linear/int_linear.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

// Weights and how their activations are quantized.
class IntWeight : public PackedWeight<IntWeights, float> {
 public:
  IntWeight(int64_t n, int bits, int scale_type, int zeros, int zero, bool sums, const std::vector<int32_t>& lengths) {
    w_.n = n, w_.bits = bits, w_.scale_type = static_cast<DType>(scale_type), w_.zeros = static_cast<Zeros>(zeros);
    w_.zero = zero, w_.sums = sums;
    spans_.resize(lengths.size());
    nbytes_ = lay_out(w_, lengths.data(), static_cast<int32_t>(lengths.size()), spans_.data());
  }

  void set_inputs(bool fixed, float divisor, int low, int high, int shift, const std::vector<float>& scales,
                  const std::vector<int32_t>& zeros) {
    spec_ = {fixed, divisor, low, high, shift};
    for (size_t s = 0; s < spans_.size(); ++s) {
      spans_[s].a_scale = fixed ? scales[s] : 1.f;
      spans_[s].a_zero = (fixed ? zeros[s] : 0) + shift;
    }
  }

  void run(uintptr_t x, int x_type, int64_t m, int64_t x_stride, uintptr_t y, int y_type, int64_t y_stride,
           int threads) const {
    nb::gil_scoped_release free;
    const IntWeights* weights[] = {&w_};
    void* to[] = {reinterpret_cast<void*>(y)};
    int_linear({reinterpret_cast<const void*>(x), static_cast<DType>(x_type), m, x_stride, spec_, 1, weights, to,
                &y_stride, static_cast<DType>(y_type)}, threads);
  }

  void dequantize(uintptr_t features, int64_t count, uintptr_t to, int threads) const {
    for_all_panels(threads, [&](int64_t first, int64_t last) {
      dequantize_features(w_, reinterpret_cast<const int64_t*>(features), count, reinterpret_cast<float*>(to), first,
                          last);
    });
  }

  const ActivationSpec& spec() const { return spec_; }

 private:
  ActivationSpec spec_{};
  std::vector<Span> spans_;
};

}  // namespace

void bind_int_linear(nb::module_& m) {
  nb::class_<IntWeight>(m, "IntWeight")
      .def(nb::init<int64_t, int, int, int, int, bool, const std::vector<int32_t>&>())
      .def("nbytes", &IntWeight::nbytes)
      .def("attach", &IntWeight::attach)
      .def("set_inputs", &IntWeight::set_inputs)
      .def("pack", &IntWeight::pack)
      .def("pack_words", &IntWeight::pack_words)
      .def("unpack", &IntWeight::unpack)
      .def("gather", &IntWeight::gather)
      .def("dequantize", &IntWeight::dequantize)
      .def("run", &IntWeight::run)
      .def("weights_at", [](const IntWeight& w) { return reinterpret_cast<uintptr_t>(&w.weights()); })
      .def("spec_at", [](const IntWeight& w) { return reinterpret_cast<uintptr_t>(&w.spec()); });
}
