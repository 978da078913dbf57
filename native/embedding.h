// Rows of a packed matrix as floats: an embedding's look-up.
#pragma once
#include "common.h"
#include "linear/words.h"

namespace bitgrain {

struct Embedding {
  WordRows words;       // [n, k] unsigned codes
  int64_t n, k, group;  // group: neighbouring elements that share a scale; the last group of a row may be shorter
  float table[256];     // what each unsigned code is
  const void* scale;    // [n, groups]: f32, bf16, f16, E8M0, E4M3
  DType scale_type;
  float outer;          // what all scales are multiplied with
  const void* zero;     // [n, groups]: f32, bf16, f16, u8, s8; null: none
  DType zero_type;
  const void* minimum;  // [n, groups]: f32, bf16, f16, E4M3; null: none
  DType minimum_type;
};

// y [count, k] in f32, bf16 or f16: (table[code] - zero) * (scale * outer) - minimum * outer, each step rounded to
// float32, then to `type`. Returns where the first id is that is no row; -1: none, and only then y is written whole.
int64_t look_up_rows(const Embedding& e, const int64_t* ids, int64_t count, void* y, DType type, int threads);

}  // namespace bitgrain
