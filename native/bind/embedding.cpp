#include "embedding.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bind/bind.h"

namespace nb = nanobind;
using namespace bitgrain;

namespace {

// Rows of a packed matrix. Its memory is the caller's.
class EmbeddingRows {
 public:
  EmbeddingRows(int64_t n, int64_t k, int64_t group, int bits, const std::vector<float>& table, float outer) {
    e_.n = n, e_.k = k, e_.group = group, e_.words.bits = bits, e_.outer = outer;
    for (size_t i = 0; i < table.size() && i < 256; ++i) e_.table[i] = table[i];
  }
  EmbeddingRows(const EmbeddingRows&) = delete;

  void attach(uintptr_t words, int64_t stride, uintptr_t scale, int scale_type, uintptr_t zero, int zero_type,
              uintptr_t minimum, int minimum_type) {
    e_.words.rows = reinterpret_cast<const uint8_t*>(words), e_.words.stride = stride;
    e_.scale = reinterpret_cast<const void*>(scale), e_.scale_type = static_cast<DType>(scale_type);
    e_.zero = reinterpret_cast<const void*>(zero), e_.zero_type = static_cast<DType>(zero_type);
    e_.minimum = reinterpret_cast<const void*>(minimum), e_.minimum_type = static_cast<DType>(minimum_type);
  }

  int64_t run(uintptr_t ids, int64_t count, uintptr_t y, int y_type, int threads) const {
    nb::gil_scoped_release free;
    return look_up_rows(e_, reinterpret_cast<const int64_t*>(ids), count, reinterpret_cast<void*>(y),
                        static_cast<DType>(y_type), threads);
  }

 private:
  Embedding e_{};
};

}  // namespace

void bind_embedding(nb::module_& m) {
  nb::class_<EmbeddingRows>(m, "EmbeddingRows")
      .def(nb::init<int64_t, int64_t, int64_t, int, const std::vector<float>&, float>())
      .def("attach", &EmbeddingRows::attach)
      .def("run", &EmbeddingRows::run);
}
