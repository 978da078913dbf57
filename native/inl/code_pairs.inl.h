// Codes of weights to numbers: a step is a pair of features of 16 columns; layout in linear/code_weights.h.
namespace bitgrain {
namespace BG_ISA {

#if BG_HAS_BF16_DOT

constexpr int64_t kInputBytes = 2;      // inputs are rounded to bfloat16
constexpr int64_t kPackedRows = 1 << 30;  // looking up hides behind the products of a few rows
using Pair = Bytes;
using Numbers = Bytes;  // a table of 32 words

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

BG_INLINE I32 load_codes(const uint8_t* p) { return as_lanes(load_b(p)); }

// unpack: the chunk of one half panel at p as kSteps pairs.
template <int BITS>
struct Looked;

template <>
struct Looked<4> {
  static constexpr int kSteps = 4, kVectors = 1;
  BG_INLINE void unpack(const uint8_t* p, const Numbers& table, Pair* w) {
    const I32 x = load_codes(p);
    w[0] = pair_at<0>(table, x);
    w[1] = pair_at<4>(table, x);
    w[2] = pair_at<8>(table, x);
    w[3] = pair_at<12>(table, x);
  }
};

template <>
struct Looked<2> {
  static constexpr int kSteps = 8, kVectors = 1;
  BG_INLINE void unpack(const uint8_t* p, const Numbers& table, Pair* w) {
    const I32 x = load_codes(p);
    w[0] = pair_at<0>(table, x);
    w[1] = pair_at<2>(table, x);
    w[2] = pair_at<4>(table, x);
    w[3] = pair_at<6>(table, x);
    w[4] = pair_at<8>(table, x);
    w[5] = pair_at<10>(table, x);
    w[6] = pair_at<12>(table, x);
    w[7] = pair_at<14>(table, x);
  }
};

template <>
struct Looked<3> {
  static constexpr int kSteps = 16, kVectors = 3;
  BG_INLINE void unpack(const uint8_t* p, const Numbers& table, Pair* w) {
    const I32 low = set_i(0x00010001);
    I32 last = zero_i();
    BG_UNROLL for (int v = 0; v < 3; ++v) {
      const I32 x = load_codes(p + 64 * v);
      w[5 * v] = pair_at<0>(table, x);
      w[5 * v + 1] = pair_at<3>(table, x);
      w[5 * v + 2] = pair_at<6>(table, x);
      w[5 * v + 3] = pair_at<9>(table, x);
      w[5 * v + 4] = pair_at<12>(table, x);
      const I32 bit = and_i(shift_right_i<15>(x), low);
      last = v == 0 ? bit : v == 1 ? or_i(last, shift_left_i<1>(bit)) : or_i(last, shift_left_i<2>(bit));
    }
    w[15] = pair_at<0>(table, last);
  }
};

template <>
struct Looked<8> {
  static constexpr int kSteps = 2, kVectors = 1;
  BG_INLINE void unpack(const uint8_t* p, const Numbers&, Pair* w) {
    const I32 x = load_codes(p);
    w[0] = pair_of(to_float(shift_right_signed_i<24>(shift_left_i<24>(x))),
                   to_float(shift_right_signed_i<24>(shift_left_i<8>(x))));
    w[1] = pair_of(to_float(shift_right_signed_i<24>(shift_left_i<16>(x))), to_float(shift_right_signed_i<24>(x)));
  }
};

// Integers without a look-up, for few rows: the bits of a code are the last ones of a bfloat16 number's 7 bits of
// mantissa (or of those before), so that the number is the code and an offset. The offsets' share of a sum is taken off
// again; it costs a few bits of 24, where inputs have 8.
template <int BITS>
struct Counted {
  static constexpr bool kThere = false;
};

constexpr float kOffsets[3][32] = {
#define BG_REPEAT4(...) __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__
    {BG_REPEAT4(128, 128, 16, 16, 16, 16, 16, 16)},
    {128, 128, 16, 16, 128, 128, 16, 16, 128, 128, 128, 128, 16, 16, 128, 128,
     16, 16, 128, 128, 128, 128, 16, 16, 128, 128, 16, 16, 128, 128, 128, 128},
    {128, 128, 32, 32, 8, 8, 128, 128, 32, 32, 8, 8, 32, 32, 8, 8,
     128, 128, 32, 32, 8, 8, 128, 128, 32, 32, 8, 8, 32, 32, 8, 8},
#undef BG_REPEAT4
};
BG_INLINE const float* offsets_of(int bits) { return kOffsets[4 - (bits < 2 || bits > 4 ? 4 : bits)]; }

#if BG_HAS_BF16_DOT

// The `BITS` bits of each word from bit AT on, behind a shift by AT - TO: 2**(7 - TO) + code.
template <int BITS, int AT, int TO>
BG_INLINE Pair counted(I32 x) {
  if constexpr (AT > TO) x = shift_right_w<AT - TO>(x);
  return and_or(x, set_i((((1 << BITS) - 1) << TO) * 0x00010001), set_i(((127 + 7 - TO) << 7) * 0x00010001));
}

template <>
struct Counted<4> {
  static constexpr bool kThere = true;
  BG_INLINE void unpack(const uint8_t* p, Pair* w) {
    const I32 x = load_codes(p);
    w[0] = counted<4, 0, 0>(x);
    w[1] = counted<4, 4, 3>(x);
    w[2] = counted<4, 8, 3>(x);
    w[3] = counted<4, 12, 3>(x);
  }
};

template <>
struct Counted<2> {
  static constexpr bool kThere = true;
  BG_INLINE void unpack(const uint8_t* p, Pair* w) {
    const I32 x = load_codes(p), y = shift_right_w<6>(x), z = shift_right_w<10>(x);
    w[0] = counted<2, 0, 0>(x);
    w[1] = counted<2, 2, 2>(x);
    w[2] = counted<2, 4, 4>(x);
    w[3] = counted<2, 0, 0>(y);
    w[4] = counted<2, 2, 2>(y);
    w[5] = counted<2, 4, 4>(y);
    w[6] = counted<2, 2, 2>(z);
    w[7] = counted<2, 4, 4>(z);
  }
};

template <>
struct Counted<3> {
  static constexpr bool kThere = true;
  BG_INLINE void unpack(const uint8_t* p, Pair* w) {
    I32 last = zero_i();
    BG_UNROLL for (int v = 0; v < 3; ++v) {
      const I32 x = load_codes(p + 64 * v), y = shift_right_w<6>(x), z = shift_right_w<12>(x);
      w[5 * v] = counted<3, 0, 0>(x);
      w[5 * v + 1] = counted<3, 3, 3>(x);
      w[5 * v + 2] = counted<3, 0, 0>(y);
      w[5 * v + 3] = counted<3, 3, 3>(y);
      w[5 * v + 4] = counted<3, 0, 0>(z);
      if (v == 0) last = and_or(shift_right_w<3>(z), set_i(0x00010001), set_i(0x43004300));
      if (v == 1) last = and_or(shift_right_w<2>(z), set_i(0x00020002), last);
      if (v == 2) last = and_or(shift_right_w<1>(z), set_i(0x00040004), last);
    }
    w[15] = last;
  }
};

// 128 + the low 7 bits, and -128 or -256: their products are added one behind the other.
template <>
struct Counted<8> {
  static constexpr bool kThere = true;
  BG_INLINE void unpack(const uint8_t* p, Pair* w) {
    const I32 x = load_codes(p), y = shift_right_w<8>(x);
    w[0] = and_or(x, set_i(0x007f007f), set_i(0x43004300));
    w[1] = and_or(y, set_i(0x007f007f), set_i(0x43004300));
    w[2] = and_or(x, set_i(0x00800080), set_i((int32_t)0xc300c300));
    w[3] = and_or(y, set_i(0x00800080), set_i((int32_t)0xc300c300));
  }
};

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
