// Which instruction set runs: the best that was built and that the processor (and the system) has.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace bitgrain {

#define BG_LEVEL(ISA)              \
  namespace ISA {                  \
  extern const Kernels kKernels;   \
  }
BG_LEVEL(portable)
BG_LEVEL(avx2)
BG_LEVEL(avxvnni)
BG_LEVEL(avx512vnni)
BG_LEVEL(avx512bf16)
BG_LEVEL(neon)

namespace amx {
const Kernels& kernels();
}

namespace {

struct Cpu {
  bool intel = false, avx2 = false, avxvnni = false, avx512vnni = false, avx512bf16 = false, amx = false, neon = false;

  Cpu() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    intel = __builtin_cpu_is("intel");
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && bit(1, 0, 'c', 29);
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    // the compiler's names know about registers that the system saves; single bits count only beside them
    avxvnni = avx2 && bit(7, 1, 'a', 4);
    avx512vnni = avx2 && avx512 && bit(7, 0, 'c', 11);
    avx512bf16 = avx512vnni && bit(7, 1, 'a', 5) && bit(7, 0, 'c', 1);
    amx = avx512bf16 && bit(7, 0, 'd', 22) && bit(7, 0, 'd', 24) && bit(7, 0, 'd', 25) && may_use_tiles();
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned long caps = getauxval(AT_HWCAP);
    neon = (caps & HWCAP_ASIMDDP) && (caps & HWCAP_FPHP) && (caps & HWCAP_ASIMDHP);
#elif defined(__aarch64__)
    neon = true;  // Apple's cores all have them
#endif
  }

#if defined(__x86_64__)
  static bool bit(unsigned leaf, unsigned sub, char which, int index) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(leaf, sub, &a, &b, &c, &d)) return false;
    const unsigned value = which == 'a' ? a : which == 'b' ? b : which == 'c' ? c : d;
    return value >> index & 1;
  }

  // Linux saves tiles only for a process that has asked.
  static bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, the feature's number in XCR0
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
    return false;
#endif
  }
#endif
};

}  // namespace

int list_kernels(const Kernels** found, int room) {
  static const Cpu cpu;
  int count = 0;
  [[maybe_unused]] auto add = [&](bool has, const Kernels& one) {
    if (has && count < room) found[count++] = &one;
  };
#if BITGRAIN_HAS_AMX
  if (cpu.amx) add(true, amx::kernels());  // its table is made by code of that level
#endif
#if BITGRAIN_HAS_AVX512VNNI
  // Intel's vdpbf16ps is slower than float32
  add(cpu.avx512vnni && cpu.intel, avx512vnni::kKernels);
#endif
#if BITGRAIN_HAS_AVX512BF16
  add(cpu.avx512bf16, avx512bf16::kKernels);
#endif
#if BITGRAIN_HAS_AVX512VNNI
  add(cpu.avx512vnni && !cpu.intel, avx512vnni::kKernels);
#endif
#if BITGRAIN_HAS_AVXVNNI
  add(cpu.avxvnni, avxvnni::kKernels);
#endif
#if BITGRAIN_HAS_AVX2
  add(cpu.avx2, avx2::kKernels);
#endif
#if BITGRAIN_HAS_NEON
  add(cpu.neon, neon::kKernels);
#endif
  add(true, portable::kKernels);
  return count;
}

namespace {

const Kernels* named(const char* name) {
  const Kernels* all[8];
  const int count = list_kernels(all, 8);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(all[i]->name, name) == 0) return all[i];
  }
  return nullptr;
}

const Kernels* choose() {
  // a wrong name is reported by Python when it imports the module, which compares name and choice
  if (const char* wanted = std::getenv("BITGRAIN_ISA")) {
    if (const Kernels* one = named(wanted)) return one;
  }
  const Kernels* all[8];
  list_kernels(all, 8);
  return all[0];
}

const Kernels*& current() {
  static const Kernels* one = choose();
  return one;
}

}  // namespace

const Kernels& kernels() { return *current(); }

bool use_kernels(const char* name) {
  const Kernels* one = named(name);
  if (one) current() = one;
  return one != nullptr;
}

}  // namespace bitgrain
