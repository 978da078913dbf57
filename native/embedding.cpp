#include "embedding.h"

#include "floats.h"
#include "pool.h"

namespace bitgrain {
namespace {

float number(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::f32:
    case DType::bf16:
    case DType::f16: return load_number(p, type, i);
    case DType::s8: return static_cast<const int8_t*>(p)[i];
    case DType::e8m0: return from_e8m0(static_cast<const uint8_t*>(p)[i]);
    case DType::e4m3: return from_e4m3(static_cast<const uint8_t*>(p)[i]);
    default: return static_cast<const uint8_t*>(p)[i];
  }
}

template <DType T>
void look_up_row(const Embedding& e, int64_t row, void* y, uint8_t* codes) {
  unpack_row(e.words, row, e.k, 0, codes);
  const int64_t groups = ceil_div(e.k, e.group);
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = number(e.scale, e.scale_type, row * groups + g);
    const float zero = e.zero ? number(e.zero, e.zero_type, row * groups + g) : 0.f;
    const int64_t last = (g + 1) * e.group < e.k ? (g + 1) * e.group : e.k;
    for (int64_t i = g * e.group; i < last; ++i) store_number(y, T, i, (e.table[codes[i]] - zero) * scale);
  }
}

}  // namespace

int64_t look_up_rows(const Embedding& e, const int64_t* ids, int64_t count, void* y, DType type, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= e.n) return i;
  }
  parallel_for(count < 8 ? 1 : threads, count, 4, [&](int64_t first, int64_t last) {
    static thread_local Scratch memory;
    uint8_t* codes = memory.get<uint8_t>(e.k);
    for (int64_t i = first; i < last; ++i) {
      void* to = static_cast<uint8_t*>(y) + i * e.k * static_cast<int64_t>(size_of(type));
      if (type == DType::f32) look_up_row<DType::f32>(e, ids[i], to, codes);
      else if (type == DType::bf16) look_up_row<DType::bf16>(e, ids[i], to, codes);
      else look_up_row<DType::f16>(e, ids[i], to, codes);
    }
  });
  return -1;
}

}  // namespace bitgrain
