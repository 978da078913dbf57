#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <algorithm>

#include "attention/prefill.h"
#include "bind/bind.h"

namespace nb = nanobind;
using namespace bitgrain;

void bind_prefill(nb::module_& m) {
  using Three = std::array<int64_t, 3>;
  m.def("attend_prefill", [](uintptr_t q, int q_type, const Three& q_stride, const std::array<int64_t, 4>& shape,
                             int64_t k_size, int64_t v_size, float scaling, bool causal, int64_t window, uintptr_t out,
                             const Three& out_stride, int type, int64_t tokens, uintptr_t k, const Three& k_stride,
                             uintptr_t v, const Three& v_stride, int threads) {
    nb::gil_scoped_release free;
    AttentionJob job{};
    job.q = reinterpret_cast<const void*>(q), job.q_type = static_cast<DType>(q_type);
    job.batch = shape[0], job.heads = shape[1], job.groups = shape[2], job.queries = shape[3];
    job.k_size = k_size, job.v_size = v_size, job.scaling = scaling, job.causal = causal;
    job.out = reinterpret_cast<void*>(out);
    DenseTokens past{tokens, static_cast<DType>(type), reinterpret_cast<const void*>(k),
                     reinterpret_cast<const void*>(v), {}, {}};
    std::copy_n(q_stride.data(), 3, job.q_stride), std::copy_n(out_stride.data(), 3, job.out_stride);
    std::copy_n(k_stride.data(), 3, past.k_stride), std::copy_n(v_stride.data(), 3, past.v_stride);
    prefill_attention(job, past, window, threads);
  });
}
