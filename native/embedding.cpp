#include "embedding.h"

#include "linear/gather.h"

namespace bitgrain {

int64_t look_up_rows(const Embedding& e, const int64_t* ids, int64_t count, void* y, DType type, int threads) {
  const int64_t groups = ceil_div(e.k, e.group);
  return gather(e.n, e.k, e.table, ids, count, y, type, threads, [&](int64_t row, uint8_t* codes, const auto& f) {
    unpack_row(e.words, row, e.k, 0, codes);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * e.group, at = row * groups + g;
      f(first, e.k - first < e.group ? e.k - first : e.group,
        Step{load_any(e.scale, e.scale_type, at) * e.outer, e.zero ? load_any(e.zero, e.zero_type, at) : 0.f,
             e.minimum ? load_any(e.minimum, e.minimum_type, at) * e.outer : 0.f});
    }
  });
}

}  // namespace bitgrain
