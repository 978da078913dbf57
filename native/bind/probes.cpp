#include "probes.h"

#include <nanobind/nanobind.h>

#include "bind/bind.h"

namespace nb = nanobind;
using namespace bitgrain;

void bind_probes(nb::module_& m) {
  m.def("measure_bandwidth", [](uintptr_t memory, int64_t bytes, int threads) {
    nb::gil_scoped_release free;
    return measure_bandwidth(reinterpret_cast<const uint8_t*>(memory), bytes, threads);
  });
  m.def("measure_int8_peak", &measure_int8_peak, nb::call_guard<nb::gil_scoped_release>());
  m.def("measure_bf16_peak", &measure_bf16_peak, nb::call_guard<nb::gil_scoped_release>());
}
