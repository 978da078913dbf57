#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bind/bind.h"
#include "decoder/module_norm.h"
#include "decoder/stack.h"
#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

// A cache as Python tells of it: whether it is packed, tokens, the addresses of keys and values, and their strides of
// batch and head; of packed ones the first token in their memory.
constexpr size_t kCacheNumbers = 8;

KeysValues cache_of(const int64_t* one) {
  KeysValues cache{};
  cache.tokens = one[1];
  void *keys = at<void>((uintptr_t)one[2]), *values = at<void>((uintptr_t)one[3]);
  if (one[0]) {
    cache.packed_keys = static_cast<const PackedSide*>(keys), cache.packed_values = static_cast<const PackedSide*>(values);
    cache.first = one[4];
  } else {
    cache.keys = keys, cache.values = values;
    for (int i = 0; i < 2; ++i) cache.k_stride[i] = one[4 + i], cache.v_stride[i] = one[6 + i];
  }
  return cache;
}

template <typename T>
std::vector<const T*> all_at(const std::vector<uintptr_t>& addresses) {
  std::vector<const T*> all;
  for (uintptr_t one : addresses) all.push_back(at<T>(one));
  return all;
}

// A dense weight; its memory is the caller's.
class DenseWeight {
 public:
  DenseWeight(uintptr_t w, int type, int64_t n, int64_t k, int64_t stride, uintptr_t bias)
      : w_{at<void>(w), DType(type), n, k, stride, at<float>(bias)} {}

  void run(uintptr_t x, int x_type, int64_t m, int64_t x_stride, uintptr_t y, int y_type, int64_t y_stride,
           int threads) const {
    nb::gil_scoped_release free;
    const DenseWeights* weights[] = {&w_};
    void* to[] = {at<void>(y)};
    dense_rows({at<void>(x), DType(x_type), m, x_stride, 1, weights, to, &y_stride, DType(y_type)}, threads);
  }

  const DenseWeights& weights() const { return w_; }

 private:
  DenseWeights w_;
};

// A decoder block; what it points to is held by its owner in Python.
class DecoderBlock {
 public:
  void set_attention(const Norm& norm, const Products& qkv, int64_t qkv_width, const std::vector<int64_t>& columns,
                     int64_t joined, int64_t heads, int64_t kv_heads, int64_t head_dim, const Norm* q_norm,
                     const Norm* k_norm, int rotary, float scale, const Products& o) {
    attention_ = {norm, &qkv, qkv_width, {columns[0], columns[1], columns[2]}, joined, heads, kv_heads, head_dim,
                  {q_norm != nullptr, k_norm != nullptr}, {q_norm ? *q_norm : Norm{}, k_norm ? *k_norm : Norm{}},
                  static_cast<Rotary>(rotary), scale, &o};
  }

  void set_mlp(const Norm& norm, const Products& gate_up, int64_t width, int64_t gate_at, int64_t up_at,
               int64_t row_width, int64_t joined, int act, const Products& down) {
    mlp_ = {norm, &gate_up, width, gate_at, up_at, row_width, joined, static_cast<Act>(act), &down};
    has_mlp_ = true;
  }

  void start(uintptr_t x, int type, int64_t m, uintptr_t cos, uintptr_t sin, int cos_type, int64_t cos_rows,
             int64_t rotary_dim, uintptr_t out, int threads) const {
    nb::gil_scoped_release free;
    start_attention(attention_, at<void>(x), DType(type), m,
                    {at<void>(cos), at<void>(sin), DType(cos_type), cos_rows, rotary_dim}, at<void>(out), DType(type),
                    threads);
  }

  void finish(uintptr_t x, int type, int64_t m, uintptr_t attended, uintptr_t y, int threads) const {
    nb::gil_scoped_release free;
    finish_block(attention_, mlp(), at<void>(x), DType(type), m, at<void>(attended), DType(type), at<void>(y), threads);
  }

  bool run(uintptr_t x, int type, int64_t batch, int64_t tokens, uintptr_t cos, uintptr_t sin, int cos_type,
           int64_t cos_rows, int64_t rotary_dim, const std::vector<int64_t>& cache, int mask_kind, uintptr_t mask,
           int64_t mask_0, int64_t mask_1, int64_t mask_2, uintptr_t y, int threads) const {
    nb::gil_scoped_release free;
    return run_block(attention_, mlp(), at<void>(x), DType(type), batch, tokens,
                     {at<void>(cos), at<void>(sin), DType(cos_type), cos_rows, rotary_dim}, cache_of(cache.data()),
                     {MaskKind(mask_kind), at<void>(mask), {mask_0, mask_1, mask_2}}, at<void>(y), threads);
  }

 private:
  friend class DecoderStack;

  const MlpStage* mlp() const { return has_mlp_ ? &mlp_ : nullptr; }

  AttentionStage attention_{};
  MlpStage mlp_{};
  bool has_mlp_ = false;
};

// Several of them; their owner in Python holds them.
class DecoderStack {
 public:
  explicit DecoderStack(const std::vector<const DecoderBlock*>& blocks) {
    for (const DecoderBlock* one : blocks) blocks_.push_back({&one->attention_, one->mlp()});
  }

  // caches: where the numbers of each block's lie, one behind the other
  bool run(uintptr_t x, int type, int64_t batch, int64_t tokens, uintptr_t cos, uintptr_t sin, int cos_type,
           int64_t cos_rows, int64_t rotary_dim, uintptr_t caches, uintptr_t y, int threads) const {
    nb::gil_scoped_release free;
    std::vector<KeysValues> all;
    for (size_t i = 0; i < blocks_.size(); ++i) all.push_back(cache_of(at<int64_t>(caches) + kCacheNumbers * i));
    return run_stack(blocks_, at<void>(x), DType(type), batch, tokens,
                     {at<void>(cos), at<void>(sin), DType(cos_type), cos_rows, rotary_dim}, all, Mask{}, at<void>(y),
                     threads);
  }

 private:
  std::vector<StackBlock> blocks_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Norm>(m, "Norm")
      .def("__init__", [](Norm* self, int64_t width, uintptr_t weight, uintptr_t bias, float eps, bool centered) {
        new (self) Norm{width, at<float>(weight), at<float>(bias), eps, centered};
      });
  nb::class_<Products>(m, "Products");
  nb::class_<IntProducts, Products>(m, "IntProducts")
      .def("__init__", [](IntProducts* self, const std::vector<uintptr_t>& weights, uintptr_t spec) {
        new (self) IntProducts(all_at<IntWeights>(weights), *at<ActivationSpec>(spec));
      });
  nb::class_<CodeProducts, Products>(m, "CodeProducts")
      .def("__init__", [](CodeProducts* self, const std::vector<uintptr_t>& weights) {
        new (self) CodeProducts(all_at<CodeWeights>(weights));
      });
  nb::class_<DenseWeight>(m, "DenseWeight")
      .def(nb::init<uintptr_t, int, int64_t, int64_t, int64_t, uintptr_t>())
      .def("run", &DenseWeight::run)
      .def("weights_at", [](const DenseWeight& w) { return reinterpret_cast<uintptr_t>(&w.weights()); });
  nb::class_<DenseProducts, Products>(m, "DenseProducts")
      .def("__init__", [](DenseProducts* self, const std::vector<uintptr_t>& weights) {
        new (self) DenseProducts(all_at<DenseWeights>(weights));
      });
  nb::class_<MixedProducts, Products>(m, "MixedProducts")
      .def(nb::init<int64_t, std::vector<const Products*>, std::vector<std::vector<int>>>());
  nb::class_<DecoderBlock>(m, "DecoderBlock")
      .def(nb::init<>())
      .def("set_attention", &DecoderBlock::set_attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg())
      .def("set_mlp", &DecoderBlock::set_mlp)
      .def("start", &DecoderBlock::start)
      .def("finish", &DecoderBlock::finish)
      .def("run", &DecoderBlock::run);
  nb::class_<DecoderStack>(m, "DecoderStack")
      .def(nb::init<const std::vector<const DecoderBlock*>&>())
      .def("run", &DecoderStack::run);

  m.def("norm_rows", [](const Norm& norm, uintptr_t x, int type, int64_t count, int64_t stride, uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    const NormRows rows{norm, at<void>(x), DType(type), stride};
    make_rows({kernels().norm_row, &rows}, count, norm.width, at<void>(y), DType(type), threads);
  });
  m.def("module_norm", [](uintptr_t x, int type, int64_t rows, int64_t width, uintptr_t weight, float eps, int lanes,
                          uintptr_t y) {
    nb::gil_scoped_release free;
    module_norm(at<void>(x), DType(type), rows, width, at<void>(weight), eps, lanes, at<void>(y));
  });
  m.def("gated_rows", [](uintptr_t gate, uintptr_t up, int type, int64_t count, int64_t stride, int64_t width, int act,
                         uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    const GatedRows rows{at<void>(gate), at<void>(up), DType(type), stride, width, static_cast<Act>(act)};
    make_rows({kernels().gated_row, &rows}, count, width, at<void>(y), DType(type), threads);
  });
  m.def("rotate_rows", [](uintptr_t x, int type, int64_t count, int64_t stride, int64_t heads, int64_t head_dim,
                          const Norm* norm, int rotary, uintptr_t cos, uintptr_t sin, int cos_type, int64_t cos_rows,
                          int64_t rotary_dim, int threads) {
    nb::gil_scoped_release free;
    const RotateRows rows{at<void>(x), DType(type), stride, 0, 0, heads, 0, head_dim, norm, nullptr,
                          static_cast<Rotary>(rotary), at<void>(cos), at<void>(sin), DType(cos_type), cos_rows, rotary_dim};
    parallel_for(threads, count, 8, [&](int64_t first, int64_t last) { kernels().rotate_rows(rows, first, last); });
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
     nb::arg(), nb::arg(), nb::arg(), nb::arg());
}
