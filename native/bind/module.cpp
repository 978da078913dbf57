// bitgrain._native: pointers as integers in, nothing of torch. Who calls checks shapes and dtypes first
// (src/bitgrain/kernels); nothing here is checked again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "kernels.h"

NB_MODULE(_native, m) {
  m.def("isa", [] { return std::string(bitgrain::kernels().name); }, "The instruction set that runs.");
  m.def("isas", [] {
    const bitgrain::Kernels* all[8];
    const int count = bitgrain::list_kernels(all, 8);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(all[i]->name);
    return names;
  }, "The instruction sets that were built and that this machine has, best first.");
  m.def("use_isa", [](const std::string& name) { return bitgrain::use_kernels(name.c_str()); },
        "Run another one from now on; False where it is not here.");
  bind_int_linear(m);
  bind_prefill(m);
  bind_code_linear(m);
  bind_decoder(m);
  bind_memory(m);
  bind_attention(m);
  bind_solver(m);
  bind_probes(m);
  bind_embedding(m);
  bind_seen(m);
}
