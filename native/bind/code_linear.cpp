#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bind/bind.h"
#include "kernels.h"
#include "linear/code_linear.h"
#include "pool.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

// Weights that are looked up in a table. The memory of panels and bias is the caller's.
class CodeWeight {
 public:
  CodeWeight(int64_t n, int64_t k, int64_t group, int bits, const std::vector<float>& table, int scale_type, int zeros,
             float outer) {
    w_.n = n, w_.k = k, w_.group = group, w_.bits = bits, w_.outer = outer;
    w_.scale_type = static_cast<DType>(scale_type), w_.zeros = static_cast<Zeros>(zeros);
    set_table(w_, table.data(), static_cast<int64_t>(table.size()));
    nbytes_ = lay_out(w_);
  }
  CodeWeight(const CodeWeight&) = delete;

  int64_t nbytes() const { return nbytes_; }

  void attach(uintptr_t panels, uintptr_t bias) {
    w_.panels = reinterpret_cast<const uint8_t*>(panels), w_.bias = reinterpret_cast<const float*>(bias);
  }

  void pack(uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t panels, int threads) const {
    pack_from(reinterpret_cast<const uint8_t*>(codes), scale, zero, panels, threads);
  }

  // words: rows of `stride` bytes, each a stream of codes of `bits` bits
  void pack_words(uintptr_t words, int64_t stride, int bits, uintptr_t scale, uintptr_t zero, uintptr_t panels,
                  int threads) const {
    pack_from(WordRows{reinterpret_cast<const uint8_t*>(words), stride, bits}, scale, zero, panels, threads);
  }

  void unpack(uintptr_t codes, uintptr_t scale, uintptr_t zero, int threads) const {
    nb::gil_scoped_release free;
    parallel_for(threads, ceil_div(w_.n, kPanel), 1, [&](int64_t first, int64_t last) {
      unpack_panels(w_, reinterpret_cast<uint8_t*>(codes), reinterpret_cast<void*>(scale),
                    reinterpret_cast<float*>(zero), first, last);
    });
  }

  void run(uintptr_t x, int x_type, int64_t m, int64_t x_stride, uintptr_t y, int y_type, int64_t y_stride,
           int threads) const {
    nb::gil_scoped_release free;
    const CodeWeights* weights[] = {&w_};
    void* to[] = {reinterpret_cast<void*>(y)};
    code_linear({reinterpret_cast<const void*>(x), static_cast<DType>(x_type), m, x_stride, 1, weights, to, &y_stride,
                 static_cast<DType>(y_type)}, threads);
  }

 private:
  template <typename Codes>
  void pack_from(const Codes& codes, uintptr_t scale, uintptr_t zero, uintptr_t panels, int threads) const {
    nb::gil_scoped_release free;
    parallel_for(threads, ceil_div(w_.n, kPanel), 1, [&](int64_t first, int64_t last) {
      pack_panels(w_, codes, reinterpret_cast<const void*>(scale), reinterpret_cast<const float*>(zero),
                  reinterpret_cast<uint8_t*>(panels), first, last);
    });
  }

  CodeWeights w_{};
  int64_t nbytes_ = 0;
};

}  // namespace

void bind_code_linear(nb::module_& m) {
  nb::class_<CodeWeight>(m, "CodeWeight")
      .def(nb::init<int64_t, int64_t, int64_t, int, const std::vector<float>&, int, int, float>())
      .def("nbytes", &CodeWeight::nbytes)
      .def("attach", &CodeWeight::attach)
      .def("pack", &CodeWeight::pack)
      .def("pack_words", &CodeWeight::pack_words)
      .def("unpack", &CodeWeight::unpack)
      .def("run", &CodeWeight::run);
  m.def("rounds_inputs", [] { return kernels().input_bytes == 2; },
        "Whether the level that runs rounds the inputs and tables of CodeWeight to bfloat16.");
}
