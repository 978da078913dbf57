// bitgrain_native_tests [--isa NAME] [--seed N] [--seconds S] [--fork 0]: all checks once, then random shapes for S
// seconds. --fork 0: no forked children, which neither qemu nor the thread sanitizer stands.
#include <chrono>
#include <cstring>

#include "checks.h"

int main(int argc, char** argv) {
  const char* isa = nullptr;
  uint64_t seed = 1;
  double seconds = 0;
  bool forks = true;
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) fail(std::string(argv[i]) + " needs a value");
    if (std::strcmp(argv[i], "--isa") == 0) isa = argv[i + 1];
    else if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
    else if (std::strcmp(argv[i], "--seconds") == 0) seconds = std::atof(argv[i + 1]);
    else if (std::strcmp(argv[i], "--fork") == 0) forks = std::atoi(argv[i + 1]) != 0;
    else fail(std::string("unknown option ") + argv[i]);
  }
  const bitgrain::Kernels* all[8];
  const int count = bitgrain::list_kernels(all, 8);
  std::vector<const bitgrain::Kernels*> levels;
  for (int i = 0; i < count; ++i) {
    if (!isa || std::strcmp(isa, all[i]->name) == 0) levels.push_back(all[i]);
  }
  if (levels.empty()) fail(std::string("no level ") + isa + " here");
  std::string names;
  for (const bitgrain::Kernels* level : levels) names += std::string(" ") + level->name;
  check_vectors(levels, seed);
  for (const Check check : kChecks) check(levels, seed, 20);
  check_float8(levels, seed);
  check_pool(0.5, forks);
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (uint64_t next = seed; seconds > 0 && std::chrono::steady_clock::now() < until;) {
    std::printf("seed %llu\n", static_cast<unsigned long long>(++next)), std::fflush(stdout);
    for (const Check check : kChecks) check(levels, next, 40);
  }
  std::printf("all checks passed at:%s\n", names.c_str());
}
