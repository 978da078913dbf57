// Codes of weights to numbers: a step is a pair of features of 16 columns; layout in linear/code_weights.h.
namespace bitgrain {
namespace BG_ISA {

#if BG_HAS_BF16_DOT

constexpr int64_t kInputBytes = 2;      // inputs are rounded to bfloat16
constexpr int64_t kPackedRows = 1 << 30;  // looking up hides behind the products of a few rows
using Pair = Bytes;
using Numbers = Bytes;  // a table of 32 words
struct Magnitudes {     // of FP8: their low and high bytes
  Bytes low[2], high[2];
};

BG_INLINE Numbers numbers_of(const CodeWeights& w) { return load_b((const uint8_t*)w.words); }
BG_INLINE void add_product(F32& sum, const Pair& w, const uint8_t* x) { dot2(sum, w, repeat4(x)); }
BG_INLINE Pair load_pair(const uint8_t* p) { return load_b(p); }
BG_INLINE void store_pair(uint8_t* p, const Pair& x) { store_i(p, x); }

template <int SHIFT>
BG_INLINE Pair pair_at(const Numbers& table, I32 codes) {
  if constexpr (SHIFT == 0) return look_up_words(table, codes);
  else return look_up_words(table, shift_right_w<SHIFT>(codes));
}
BG_INLINE Pair pair_of(F32 even, F32 odd) {  // numbers that bfloat16 has
  return or_i(shift_right_i<16>(as_int(even)), as_int(odd));
}

#else

constexpr int64_t kInputBytes = 4;
constexpr int64_t kPackedRows = kGroupedRows;
struct Pair {
  F32 even, odd;
};
using Numbers = Table;

BG_INLINE Numbers numbers_of(const CodeWeights& w) { return load_table(w.table); }
BG_INLINE void add_product(F32& sum, const Pair& w, const uint8_t* x) {
  float even, odd;
  std::memcpy(&even, x, 4), std::memcpy(&odd, x + 4, 4);
  sum = fma_f(w.odd, set_f(odd), fma_f(w.even, set_f(even), sum));
}
BG_INLINE Pair load_pair(const uint8_t* p) { return {load_f((const float*)p), load_f((const float*)p + 16)}; }
BG_INLINE void store_pair(uint8_t* p, const Pair& x) {
  store_f((float*)p, x.even), store_f((float*)p + 16, x.odd);
}

template <int SHIFT>
BG_INLINE Pair pair_at(const Numbers& table, I32 codes) {
  if constexpr (SHIFT == 0) return {look_up(table, codes), look_up(table, shift_right_i<16>(codes))};
  else return {look_up(table, shift_right_i<SHIFT>(codes)), look_up(table, shift_right_i<16 + SHIFT>(codes))};
}
BG_INLINE Pair pair_of(F32 even, F32 odd) { return {even, odd}; }

#endif

// Forms of codes: their bits, or one of these for FP8.
constexpr int kE4M3 = 80;
#if BG_HAS_BF16_DOT
constexpr int kE5M2 = kE4M3;  // one code for both: they differ in their tables only
#else
constexpr int kE5M2 = 81;
#endif
constexpr int form_bits(int form) { return form < 8 ? form : 8; }

// A chunk of one half panel is kVectors registers of codes and kSteps pairs of features; `step` gives one pair.
template <int FORM>
struct Looked {  // 4 and 2 bits
  static constexpr int BITS = FORM, kSteps = 16 / BITS, kVectors = 1;
  BG_INLINE Numbers load(const CodeWeights& w) { return numbers_of(w); }
  template <int I>
  BG_INLINE Pair step(const I32* x, const Numbers& table) {
    return pair_at<BITS * I>(table, x[0]);
  }
};

template <>
struct Looked<3> {
  static constexpr int kSteps = 16, kVectors = 3;
  BG_INLINE Numbers load(const CodeWeights& w) { return numbers_of(w); }
  template <int I>
  BG_INLINE Pair step(const I32* x, const Numbers& table) {
    if constexpr (I < 15) return pair_at<3 * (I % 5)>(table, x[I / 5]);
    const I32 bit = set_i(0x00010001);
    I32 last = and_i(shift_right_i<15>(x[0]), bit);
    last = or_i(last, shift_left_i<1>(and_i(shift_right_i<15>(x[1]), bit)));
    return pair_at<0>(table, or_i(last, shift_left_i<2>(and_i(shift_right_i<15>(x[2]), bit))));
  }
};

template <>
struct Looked<8> {
  static constexpr int kSteps = 2, kVectors = 1;
  BG_INLINE Numbers load(const CodeWeights& w) { return numbers_of(w); }
  template <int I>
  BG_INLINE Pair step(const I32* x, const Numbers&) {
    const I32 even = shift_left_i<24 - 8 * I>(x[0]), odd = I ? x[0] : shift_left_i<8>(x[0]);
    return pair_of(to_float(shift_right_signed_i<24>(even)), to_float(shift_right_signed_i<24>(odd)));
  }
};

#if BG_HAS_BF16_DOT

// FP8: products take subnormal numbers of bfloat16 for 0, so that moving the fields to their places would lose the
// smallest ones; magnitudes are looked up, a byte at a time.
template <>
struct Looked<kE4M3> {
  static constexpr int kSteps = 2, kVectors = 1;
  BG_INLINE Magnitudes load(const CodeWeights& w) {
    return {{load_b(w.low), load_b(w.low + 64)}, {load_b(w.high), load_b(w.high + 64)}};
  }
  template <int I>
  BG_INLINE Pair step(const I32* x, const Magnitudes& of) {
    const Bytes low = look_up_bytes(of.low[0], of.low[1], x[0]);
    const Bytes high = and_or(x[0], set_i((int32_t)0x80808080), look_up_bytes(of.high[0], of.high[1], x[0]));
    if constexpr (I == 0) return and_or(low, set_i(0x00ff00ff), shift_left_w<8>(high));
    else return and_or(high, set_i((int32_t)0xff00ff00), shift_right_w<8>(low));
  }
};

#else

// The number whose code is the low byte of each lane. No step meets a subnormal float32: threads may take those for 0.
template <int MANTISSA, int BIAS, int TOP>  // TOP: the largest number's magnitude
BG_INLINE F32 from_float8(I32 code) {
  const I32 magnitude = and_i(code, set_i(0x7f)), fields = shift_left_i<23 - MANTISSA>(magnitude);
  const F32 steps = to_float(magnitude), smallest = set_f(1.f / (1 << (BIAS + MANTISSA - 1)));
  F32 x = as_float(add_i(fields, set_i((127 - BIAS) << 23)));
  x = select_greater(set_f(1 << MANTISSA), steps, mul_f(steps, smallest), x);
  x = select_greater(steps, set_f(TOP), as_float(or_i(fields, set_i(0x7f800000))), x);  // Inf, NaN
  return as_float(or_i(as_int(x), shift_left_i<24>(and_i(code, set_i(0x80)))));
}

template <int MANTISSA, int BIAS, int TOP>
struct LookedFloat8 {
  static constexpr int kSteps = 2, kVectors = 1;
  BG_INLINE Numbers load(const CodeWeights& w) { return numbers_of(w); }
  template <int I>
  BG_INLINE Pair step(const I32* x, const Numbers&) {
    const I32 even = I ? shift_right_i<8>(x[0]) : x[0], odd = shift_right_i<16 + 8 * I>(x[0]);
    return {from_float8<MANTISSA, BIAS, TOP>(even), from_float8<MANTISSA, BIAS, TOP>(odd)};
  }
};
template <>
struct Looked<kE4M3> : LookedFloat8<3, 7, 0x7e> {};
template <>
struct Looked<kE5M2> : LookedFloat8<2, 15, 0x7b> {};

#endif

// 8-bit integers for few rows, where converting would take longer than a second product: with the low 7 bits as the
// mantissa 128 + low, with the sign -128 or -256; together they are the code.
template <int I>
struct Split;

#if BG_HAS_BF16_DOT
constexpr bool kSplits = true;
template <int I>
struct Split {
  BG_INLINE I32 bytes(const I32* x) { return I ? shift_right_w<8>(x[0]) : x[0]; }
  BG_INLINE Pair low(const I32* x) { return and_or(bytes(x), set_i(0x007f007f), set_i(0x43004300)); }
  BG_INLINE Pair sign(const I32* x) { return and_or(bytes(x), set_i(0x00800080), set_i((int32_t)0xc300c300)); }
};
#else
constexpr bool kSplits = false;
#endif

// 16 scales as floats.
BG_INLINE F32 load_any_scales(const uint8_t* p, DType type, int64_t column) {
  if (type == DType::e8m0) {  // the exponent alone; 0 is 2**-127, which is subnormal
    return as_float(max_i(shift_left_i<23>(load_u8_i(p + column)), set_i(0x00400000)));
  }
  if (type == DType::e4m3) {  // exponent and mantissa in their places, then the exponents' biases
    const I32 x = load_u8_i(p + column);
    const I32 magnitude = shift_left_i<20>(and_i(x, set_i(0x7f))), sign = shift_left_i<24>(and_i(x, set_i(0x80)));
    return mul_f(as_float(or_i(magnitude, sign)), set_f(0x1p120f));
  }
  return load_scales(p, type, column);
}

}  // namespace BG_ISA
}  // namespace bitgrain
