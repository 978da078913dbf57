#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include "attention/decode.h"
#include "bind/bind.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

using Three = std::array<int64_t, 3>;

void copy(const Three& from, int64_t* to) { std::memcpy(to, from.data(), sizeof(Three)); }

// Queries, options and result of one call.
AttentionJob job_of(uintptr_t q, int type, const Three& q_stride, const std::array<int64_t, 4>& shape, int64_t k_size,
                    int64_t v_size, float scaling, float softcap, bool causal, int mask_kind, uintptr_t mask,
                    const Three& mask_stride, uintptr_t sinks, uintptr_t out, const Three& out_stride) {
  AttentionJob job{};
  job.q = at<void>(q), job.q_type = static_cast<DType>(type), job.planes = planes_of(job.q_type);
  job.batch = shape[0], job.heads = shape[1], job.groups = shape[2], job.queries = shape[3];
  job.k_size = k_size, job.v_size = v_size, job.scaling = scaling, job.softcap = softcap, job.causal = causal;
  job.mask_kind = static_cast<MaskKind>(mask_kind), job.mask = at<void>(mask), job.sinks = at<float>(sinks);
  job.out = at<void>(out);
  copy(q_stride, job.q_stride), copy(mask_stride, job.mask_stride), copy(out_stride, job.out_stride);
  return job;
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<AttentionJob>(m, "AttentionJob").def_static("of", &job_of);
  m.def("attend_dense", [](const AttentionJob& job, int type, int64_t tokens, uintptr_t k, const Three& k_stride,
                           uintptr_t v, const Three& v_stride, int threads) {
    nb::gil_scoped_release free;
    DenseTokens dense{};
    dense.type = static_cast<DType>(type), dense.tokens = tokens, dense.k = at<void>(k), dense.v = at<void>(v);
    copy(k_stride, dense.k_stride), copy(v_stride, dense.v_stride);
    decode_attention(job, PackedTokens{}, dense, threads);
  });
  nb::class_<PackedSide>(m, "PackedSide")
      .def("__init__", [](PackedSide* side, int64_t size, int bits, bool values, int64_t pairs) {
        new (side) PackedSide{size, bits, values, pairs, nullptr, nullptr, nullptr};
      })
      .def("attach", [](PackedSide& side, uintptr_t codes, uintptr_t scales, uintptr_t zeros) {
        side.codes = at<uint8_t>(codes), side.scales = at<uint16_t>(scales), side.zeros = at<uint16_t>(zeros);
      })
      .def("at", [](const PackedSide& side) { return reinterpret_cast<uintptr_t>(&side); })
      .def("pack", [](const PackedSide& side, uintptr_t x, int type, int64_t heads, const Three& stride, int64_t first,
                      int64_t tokens, int threads) {
        nb::gil_scoped_release free;
        return pack_states({&side, at<void>(x), static_cast<DType>(type), heads, {stride[0], stride[1], stride[2]},
                            first, tokens}, threads);
      })
      .def("read", [](const PackedSide& side, uintptr_t x, int type, int64_t heads, const Three& stride, int64_t first,
                      int64_t tokens, int threads) {
        nb::gil_scoped_release free;
        read_states({&side, at<void>(x), static_cast<DType>(type), heads, {stride[0], stride[1], stride[2]}, first,
                     tokens}, threads);
      });
  m.def("attend_packed", [](const AttentionJob& job, const PackedSide& k, const PackedSide& v, int64_t first,
                            int64_t tokens, int threads) {
    nb::gil_scoped_release free;
    decode_attention(job, {first, tokens, k, v}, DenseTokens{}, threads);
  });
  m.def("exp_floats", [](uintptr_t x, uintptr_t y, int64_t count) {
    kernels().exp_floats(at<float>(x), at<float>(y), count);
  });
}
