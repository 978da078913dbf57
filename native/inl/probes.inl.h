// Loops that do nothing but read, or nothing but multiply: see probes.h.
namespace bitgrain {
namespace BG_ISA {

// So many sums that each instruction is done before its sum is needed again.
constexpr int kProbeSums = kSingleRows * kSingleVectors <= 16 ? kSingleRows * kSingleVectors : 16;
constexpr int64_t kProbeAhead = 4096;  // bytes; hardware alone does not fetch far enough

static void read_bytes(const uint8_t* p, int64_t bytes) {
  I32 a = zero_i(), b = a, c = a, d = a;
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    BG_UNROLL for (int line = 0; line < 4; ++line) prefetch(p + i + kProbeAhead + 64 * line);
    a = add_i(a, load_i(p + i)), b = add_i(b, load_i(p + i + 64));
    c = add_i(c, load_i(p + i + 128)), d = add_i(d, load_i(p + i + 192));
  }
  volatile int32_t seen = sum_i(add_i(add_i(a, b), add_i(c, d)));
  (void)seen;
}

// Operands change behind the compiler's back in each round, or it would multiply once and scale.
static int64_t int8_loop(int64_t rounds) {
  alignas(64) uint8_t operands[128] = {1, 2, 3};
  I32 sums[kProbeSums];
  BG_UNROLL for (int i = 0; i < kProbeSums; ++i) sums[i] = set_i(i);  // alike, they would be computed once
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+m"(operands));
    const Bytes u = load_b(operands), s = load_b(operands + 64);
    BG_UNROLL for (int i = 0; i < kProbeSums; ++i) dot4(sums[i], u, s);
  }
  volatile int32_t seen = 0;
  BG_UNROLL for (int i = 0; i < kProbeSums; ++i) seen = seen + sum_i(sums[i]);
  return rounds * kProbeSums * 64;
}

static int64_t bf16_loop(int64_t rounds) {
  alignas(64) float operands[32] = {1, 2, 3};
  F32 sums[kProbeSums];
  BG_UNROLL for (int i = 0; i < kProbeSums; ++i) sums[i] = set_f((float)i);
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+m"(operands));
#if BG_HAS_BF16_DOT
    const Bytes a = load_b((const uint8_t*)operands), b = load_b((const uint8_t*)(operands + 16));
    BG_UNROLL for (int i = 0; i < kProbeSums; ++i) dot2(sums[i], a, b);
#else
    const F32 a = load_f(operands), b = load_f(operands + 16);
    BG_UNROLL for (int i = 0; i < kProbeSums; ++i) sums[i] = fma_f(a, b, sums[i]);
#endif
  }
  volatile float seen = 0;
  BG_UNROLL for (int i = 0; i < kProbeSums; ++i) seen = seen + sum_f(sums[i]);
  return rounds * kProbeSums * (BG_HAS_BF16_DOT ? 32 : 16);
}

}  // namespace BG_ISA
}  // namespace bitgrain
