// Each file of this folder adds the functions of one family of kernels.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

// What an address from Python points to.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_int_linear(nanobind::module_& m);
void bind_prefill(nanobind::module_& m);
void bind_code_linear(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_memory(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_solver(nanobind::module_& m);
void bind_probes(nanobind::module_& m);
void bind_embedding(nanobind::module_& m);
void bind_seen(nanobind::module_& m);
