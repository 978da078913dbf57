#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bind/bind.h"
#include "bind/packed_weight.h"
#include "kernels.h"
#include "linear/code_linear.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

// Weights that are looked up in a table.
class CodeWeight : public PackedWeight<CodeWeights, void> {
 public:
  CodeWeight(int64_t n, int64_t k, int64_t group, int bits, int kind, const std::vector<float>& table, int scale_type,
             int zeros, float zero, float outer) {
    w_.n = n, w_.k = k, w_.group = group, w_.bits = bits, w_.kind = static_cast<CodeKind>(kind), w_.outer = outer;
    w_.scale_type = static_cast<DType>(scale_type), w_.zeros = static_cast<Zeros>(zeros);
    w_.zero = zero;
    set_table(w_, table.data(), static_cast<int64_t>(table.size()));
    nbytes_ = lay_out(w_);
  }

  // Inputs are rounded to a format from now on; see InputRounding.
  void round_inputs(int kind, int mantissa_bits, float least, float largest, float overflow, float scale, bool groups) {
    w_.inputs = {static_cast<InputScale>(kind), mantissa_bits, least, largest, overflow, scale, groups};
  }

  void run(uintptr_t x, int x_type, int64_t m, int64_t x_stride, uintptr_t y, int y_type, int64_t y_stride,
           int threads) const {
    nb::gil_scoped_release free;
    const CodeWeights* weights[] = {&w_};
    void* to[] = {reinterpret_cast<void*>(y)};
    code_linear({reinterpret_cast<const void*>(x), static_cast<DType>(x_type), m, x_stride, 1, weights, to, &y_stride,
                 static_cast<DType>(y_type)}, threads);
  }
};

}  // namespace

void bind_code_linear(nb::module_& m) {
  nb::class_<CodeWeight>(m, "CodeWeight")
      .def(nb::init<int64_t, int64_t, int64_t, int, int, const std::vector<float>&, int, int, float, float>())
      .def("nbytes", &CodeWeight::nbytes)
      .def("attach", &CodeWeight::attach)
      .def("pack", &CodeWeight::pack)
      .def("pack_words", &CodeWeight::pack_words)
      .def("unpack", &CodeWeight::unpack)
      .def("round_inputs", &CodeWeight::round_inputs)
      .def("gather", &CodeWeight::gather)
      .def("run", &CodeWeight::run)
      .def("weights_at", [](const CodeWeight& w) { return reinterpret_cast<uintptr_t>(&w.weights()); });
  m.def("rounds_inputs", [](int64_t m) { return kernels().input_bytes == 2 || m >= kernels().code_matrix_rows; },
        "Whether the level that runs rounds the inputs and tables of CodeWeight to bfloat16.");
}
