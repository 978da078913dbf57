// Compiled once for each level, as the kernels are.
#if defined(BITGRAIN_LEVEL_AVX2)
#define BITGRAIN_AVX_VNNI 0
#include "simd/avx2.h"
#elif defined(BITGRAIN_LEVEL_AVXVNNI)
#define BITGRAIN_AVX_VNNI 1
#include "simd/avx2.h"
#elif defined(BITGRAIN_LEVEL_AVX512VNNI)
#define BITGRAIN_AVX512_BF16 0
#include "simd/avx512.h"
#elif defined(BITGRAIN_LEVEL_AVX512BF16) || defined(BITGRAIN_LEVEL_AMX)
#define BITGRAIN_AVX512_BF16 1
#include "simd/avx512.h"
#elif defined(BITGRAIN_LEVEL_NEON)
#include "simd/neon.h"
#else
#include "simd/portable.h"
#endif

#include "vectors.h"

namespace bitgrain {
namespace BG_ISA {

int dump_vectors(const VectorInputs& in, VectorResult* out) {
  int count = 0;
  auto ints = [&](const char* name, I32 x) {
    out[count].name = name, out[count].floats = false, store_i(out[count++].lanes, x);
  };
  auto floats = [&](const char* name, F32 x) {
    out[count].name = name, out[count].floats = true, store_f((float*)out[count++].lanes, x);
  };
  auto bytes = [&](const char* name, Bytes x) {  // each byte by its product with 1
    alignas(64) uint8_t one[64], found[64];
    alignas(64) int32_t four[16];
    for (int byte = 0; byte < 4; ++byte) {
      std::memset(one, 0, 64);
      for (int lane = 0; lane < 16; ++lane) one[4 * lane + byte] = 1;
      I32 sum = zero_i();
      dot4(sum, x, load_b(one));
      store_i(four, sum);
      for (int lane = 0; lane < 16; ++lane) found[4 * lane + byte] = (uint8_t)four[lane];
    }
    ints(name, load_i(found));
  };
  const F32 a = load_f(in.a), b = load_f(in.b);
  const I32 i = load_i(in.i), j = load_i(in.j);
  const F32 x = to_float(load_i(in.small[0])), y = to_float(load_i(in.small[1])), z = to_float(load_i(in.small[2]));
  const I32 start = load_i(in.small[0]);
  const Bytes p = load_b(in.bytes[0]), q = load_b(in.bytes[1]);

  ints("set_i", set_i(in.i[3]));
  ints("add_i", add_i(i, j));
  ints("mul_i", mul_i(i, j));
  ints("min_i", min_i(i, j));
  ints("max_i", max_i(i, j));
  ints("sum_i", set_i(sum_i(start)));
  ints("load_u8_i", load_u8_i(in.bytes[0] + 1));
  ints("load_s8_i", load_s8_i(in.bytes[0] + 1));
  alignas(64) uint8_t low[64] = {};
  store_low_bytes(low, i);
  ints("store_low_bytes", load_i(low));

  floats("set_f", set_f(in.a[3]));
  floats("add_f", add_f(a, b));
  floats("sub_f", sub_f(a, b));
  floats("mul_f", mul_f(a, b));
  floats("div_f", div_f(a, b));
  floats("min_f", min_f(a, b));
  floats("max_f", max_f(a, b));
  floats("abs_f", abs_f(a));
  floats("fma_f", fma_f(x, y, z));
  floats("fnma_f", fnma_f(x, y, z));
  floats("max_of_f", set_f(max_of_f(x)));
  floats("sum_f", set_f(sum_f(x)));
  F32 rows[16];
  for (int r = 0; r < 16; ++r) rows[r] = add_f(x, set_f((float)(r * r)));
  floats("sums_f", sums_f(rows));
  floats("round_f", round_f(a));
  floats("exponent_f", exponent_f(a));
  floats("select_greater", select_greater(a, b, x, y));
  const I32 powers = max_i(min_i(start, set_i(254)), set_i(-252));
  floats("scale_f", scale_f(to_float(load_i(in.small[1])), to_float(powers)));
  const F64 wide = add_d(add_d(add_d(zero_d(), x), y), z);
  floats("sum_d", set_f((float)sum_d(wide)));
  floats("to_float", to_float(i));
  ints("round_to_int", round_to_int(a));
  floats("load_f16", load_f16(in.bytes[0]));
  floats("load_bf16", load_bf16(in.bytes[0]));
  alignas(64) uint8_t half[64] = {};
  store_f16(half, a);
  floats("store_f16", load_f16(half));
  store_bf16(half, a);
  floats("store_bf16", load_bf16(half));

  bytes("load_b", p);
  bytes("repeat4", repeat4(in.bytes[0] + 4));
  bytes("and_b", and_b(p, 0x35));
  bytes("or_b", or_b(p, q));
  bytes("shift_right_b", and_b(shift_right_b<3>(p), 31));
  bytes("shift_left_b", and_b(shift_left_b<2>(p), 0xfc));
  I32 sum = start;
  dot4(sum, p, q);
  ints("dot4", sum);
  sum = start;
  I32 all = zero_i();
  dot4_shifted(sum, p, q), sum4(all, q);
  ints("dot4_shifted", add_i(sum, mul_i(all, set_i(kDotShift))));
  sum = start;
  const Bytes codes[2] = {and_b(p, 15), and_b(load_b(in.bytes[2]), 15)}, others[2] = {q, load_b(in.bytes[3])};
  dot4_small<2>(sum, codes, others);
  ints("dot4_small", sum);

  ints("and_i", and_i(i, j));
  ints("or_i", or_i(i, j));
  ints("shift_left_i", shift_left_i<5>(i));
  ints("shift_right_i", shift_right_i<5>(i));
  ints("shift_right_signed_i", shift_right_signed_i<5>(i));
  ints("as_lanes", as_lanes(p));
  floats("as_float", as_float(i));
  ints("as_int", as_int(as_float(i)));
  floats("look_up", look_up(load_table(in.a), i));
  return count;
}

}  // namespace BG_ISA
}  // namespace bitgrain
