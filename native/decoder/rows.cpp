#include "kernels.h"
#include "pool.h"

namespace bitgrain {

void make_rows(const RowSource& source, int64_t m, int64_t width, void* y, DType type, int threads) {
  const Kernels& kernel = kernels();
  parallel_for(m < 8 ? 1 : threads, m, 8, [&](int64_t first, int64_t last) {
    static thread_local Scratch memory;
    float* made = memory.get<float>(width);
    for (int64_t row = first; row < last; ++row) {
      float* to = type == DType::f32 ? static_cast<float*>(y) + row * width : made;
      source.make(source.context, row, to);
      if (to == made) kernel.add_row(made, DType::f32, 0, nullptr, width, y, type, row * width);
    }
  });
}

}  // namespace bitgrain
