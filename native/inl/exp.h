// e^x and what is made of it.
#pragma once

namespace bitgrain {
namespace BG_ISA {

// Relative error below 2^-22; x is held within -87 .. 88, NaN stays.
BG_INLINE F32 exp_f(F32 x) {
  x = min_f(set_f(88.f), max_f(set_f(-87.f), x));
  const I32 n = round_to_int(mul_f(x, set_f(1.44269504f)));
  const F32 whole = to_float(n);
  F32 r = fnma_f(whole, set_f(0.693359375f), x);  // ln 2 in two parts, the first one exact in few bits
  r = fnma_f(whole, set_f(-2.12194440e-4f), r);
  F32 y = set_f(1.f / 720.f);
  y = fma_f(y, r, set_f(1.f / 120.f));
  y = fma_f(y, r, set_f(1.f / 24.f));
  y = fma_f(y, r, set_f(1.f / 6.f));
  y = fma_f(y, r, set_f(0.5f));
  y = fma_f(y, r, set_f(1.f));
  y = fma_f(y, r, set_f(1.f));
  return mul_f(y, as_float(mul_i(add_i(n, set_i(127)), set_i(1 << 23))));
}

BG_INLINE F32 sigmoid_f(F32 x) {
  const F32 one = set_f(1.f);
  return div_f(one, add_f(one, exp_f(sub_f(zero_f(), x))));
}

}  // namespace BG_ISA
}  // namespace bitgrain
