// e^x, to about 1 ulp: 2^n e^r with r within half of ln 2.
#pragma once

namespace bitgrain {
namespace BG_ISA {

// x at most 89; 0 below -104; NaN stays NaN.
BG_INLINE F32 exp_below_f(F32 x) {
  x = max_f(set_f(-104.f), x);  // in this order of operands NaN comes through
  const F32 n = to_float(round_to_int(mul_f(x, set_f(1.44269504f))));
  F32 r = fnma_f(n, set_f(0.693359375f), x);  // ln 2 in two parts, the first of few bits: n times it is exact
  r = fnma_f(n, set_f(-2.12194440e-4f), r);
  // (e^r - 1 - r) / r^2, the polynomial of least relative error of e^r (3e-9)
  F32 p = set_f(0.001381453988f);
  p = fma_f(p, r, set_f(0.008368745127f));
  p = fma_f(p, r, set_f(0.04166839079f));
  p = fma_f(p, r, set_f(0.166665204f));
  p = fma_f(p, r, set_f(0.4999999343f));
  return scale_f(add_f(fma_f(mul_f(r, r), p, r), set_f(1.f)), n);
}

// Inf above 89.
BG_INLINE F32 exp_f(F32 x) { return exp_below_f(min_f(set_f(89.f), x)); }

}  // namespace BG_ISA
}  // namespace bitgrain
