#include <nanobind/nanobind.h>

#include "bind/bind.h"
#include "solver/gram.h"

namespace nb = nanobind;
using namespace bitgrain;

void bind_solver(nb::module_& m) {
  m.def("add_gram", [](uintptr_t x, int type, int64_t tokens, int64_t k, int64_t stride, uintptr_t h, int threads) {
    nb::gil_scoped_release free;
    add_gram(reinterpret_cast<const void*>(x), static_cast<DType>(type), tokens, k, stride,
             reinterpret_cast<float*>(h), threads);
  });
  m.def("mirror", [](uintptr_t h, int64_t k, int threads) {
    nb::gil_scoped_release free;
    mirror(reinterpret_cast<float*>(h), k, threads);
  });
}
