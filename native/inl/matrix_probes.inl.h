// Loops that do nothing but multiply on the matrix unit: see probes.h.
namespace bitgrain {
namespace BG_ISA {

template <MatrixKind KIND>
BG_INLINE int64_t matrix_loop(int64_t rounds, int64_t features) {
  alignas(64) static const uint8_t operands[1024] = {1, 2, 3};
  const MatrixUnit unit;
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  load_tile<4>(operands, 64), load_tile<5>(operands, 64), load_tile<6>(operands, 64), load_tile<7>(operands, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    multiply_tiles<KIND, 0, 4, 6>(), multiply_tiles<KIND, 1, 4, 7>();
    multiply_tiles<KIND, 2, 5, 6>(), multiply_tiles<KIND, 3, 5, 7>();
  }
  return rounds * 4 * 16 * 16 * features;
}

static int64_t int8_matrix_loop(int64_t rounds) { return matrix_loop<MatrixKind::signed_signed>(rounds, 64); }
static int64_t bf16_matrix_loop(int64_t rounds) { return matrix_loop<MatrixKind::bf16>(rounds, 32); }

}  // namespace BG_ISA
}  // namespace bitgrain
