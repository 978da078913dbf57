// Every vector name of every level against simd/portable.h, which says what they mean.
#include "vectors.h"

#include <cmath>
#include <cstring>

#include "checks.h"

namespace bitgrain {
#define BITGRAIN_DUMP(ISA)                              \
  namespace ISA {                                       \
  int dump_vectors(const VectorInputs&, VectorResult*); \
  }
BITGRAIN_DUMP(portable)
BITGRAIN_DUMP(avx2)
BITGRAIN_DUMP(avxvnni)
BITGRAIN_DUMP(avx512vnni)
BITGRAIN_DUMP(avx512bf16)
BITGRAIN_DUMP(amx)
BITGRAIN_DUMP(neon)
}  // namespace bitgrain

namespace {

using namespace bitgrain;

const struct {
  const char* name;
  DumpVectors dump;
} kDumps[] = {
#if BITGRAIN_HAS_AVX2
    {"avx2", avx2::dump_vectors},
#endif
#if BITGRAIN_HAS_AVXVNNI
    {"avxvnni", avxvnni::dump_vectors},
#endif
#if BITGRAIN_HAS_AVX512VNNI
    {"avx512vnni", avx512vnni::dump_vectors},
#endif
#if BITGRAIN_HAS_AVX512BF16
    {"avx512bf16", avx512bf16::dump_vectors},
#endif
#if BITGRAIN_HAS_AMX
    {"amx", amx::dump_vectors},
#endif
#if BITGRAIN_HAS_NEON
    {"neon", neon::dump_vectors},
#endif
    {"portable", portable::dump_vectors},
};

float any_float(Random& random) {
  const uint32_t bits = static_cast<uint32_t>(random.next());
  float x;
  std::memcpy(&x, &bits, 4);
  switch (random.next() % 4) {
    case 0: return x;  // any bits: subnormals, NaN
    case 1:
      return random.one_of({0.f, -0.f, 0.5f, 1.5f, 2.5f, -3.5f, INFINITY, -INFINITY, NAN, 65504.f, 65520.f, 3e-8f});
    case 2: return static_cast<float>(random.within(-100000, 100000)) * 0.0625f;
    default: return random.real() * 1e10f;
  }
}

bool same(const VectorResult& one, const VectorResult& two) {
  if (std::memcmp(one.lanes, two.lanes, 64) == 0) return true;
  if (!one.floats) return false;
  float x[16], y[16];
  std::memcpy(x, one.lanes, 64), std::memcpy(y, two.lanes, 64);
  for (int i = 0; i < 16; ++i) {
    if (std::memcmp(&x[i], &y[i], 4) != 0 && !(std::isnan(x[i]) && std::isnan(y[i]))) return false;
  }
  return true;
}

}  // namespace

void check_vectors(const std::vector<const Kernels*>& levels, uint64_t seed) {
  Random random(seed);
  static VectorResult meant[kMostResults], found[kMostResults];
  for (int round = 0; round < 2000; ++round) {
    VectorInputs in;
    for (int i = 0; i < 16; ++i) {
      in.a[i] = any_float(random), in.b[i] = any_float(random);
      in.i[i] = static_cast<int32_t>(random.next() >> (random.next() % 32));
      in.j[i] = static_cast<int32_t>(random.next() >> (random.next() % 32));
      for (int s = 0; s < 3; ++s) in.small[s][i] = static_cast<int32_t>(random.within(-1000, 1000));
    }
    const bool extreme = random.next() % 4 == 0;
    for (auto& row : in.bytes) {
      for (uint8_t& byte : row) {
        byte = extreme ? random.one_of<uint8_t>({0, 127, 128, 255}) : static_cast<uint8_t>(random.next());
      }
    }
    const int count = portable::dump_vectors(in, meant);
    for (const Kernels* level : levels) {
      for (const auto& one : kDumps) {
        if (std::strcmp(one.name, level->name) != 0) continue;
        one.dump(in, found);
        for (int i = 0; i < count; ++i) {
          if (same(meant[i], found[i])) continue;
          fail(std::string(level->name) + ": " + meant[i].name + " differs from portable");
        }
      }
    }
  }
}
