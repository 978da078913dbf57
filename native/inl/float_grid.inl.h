// Rounding to float formats of a few bits, see InputRounding in linear/code_weights.h.
namespace bitgrain {
namespace BG_ISA {

// The nearest number of the format, ties to even; beyond its ends these.
BG_INLINE F32 round_to_format(const InputRounding& to, F32 x) {
  const F32 v = min_f(max_f(x, set_f(-to.largest)), set_f(to.largest));
  // the last bit of a sum with c is worth one step of the format at v
  const F32 c = mul_f(max_f(exponent_f(v), set_f(to.least)), set_f(1.5f * (float)(1 << (23 - to.mantissa_bits))));
  return sub_f(add_f(v, c), c);
}

// The scale of numbers whose largest magnitude is `most`.
BG_INLINE float input_scale(const InputRounding& to, float most) {
  if (to.kind == InputScale::fixed) return to.scale;
  const float plain = most / to.largest;
  if (to.kind == InputScale::plain) return plain > 0.f ? plain : 1.f;
  if (to.kind == InputScale::e8m0) {
    if (!(plain > 0.f)) return 1.f;
    int exponent, more;
    const float mantissa = __builtin_frexpf(plain, &exponent);
    (void)__builtin_frexpf(mantissa * to.largest / to.overflow, &more);
    exponent += more;
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    return __builtin_ldexpf(1.f, exponent);
  }
  const InputRounding e4m3{InputScale::none, 3, 0x1p-6f, 448.f};
  float found[16];
  store_f(found, round_to_format(e4m3, set_f(plain / to.scale)));
  if (!(plain > 0.f)) return to.scale;
  return (found[0] > 0.f ? found[0] : 0x1p-9f) * to.scale;
}

}  // namespace BG_ISA
}  // namespace bitgrain
