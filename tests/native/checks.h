// What every native test uses: a generator, a failure that names the case, and the list of what runs.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"

// splitmix64 (Steele, Lea, Flood 2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t within(int64_t low, int64_t high) {  // both ends are drawn
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  float real() { return static_cast<float>(within(-1000000, 1000000)) * 1e-6f; }
  template <typename T>
  T one_of(std::initializer_list<T> all) {
    return all.begin()[within(0, static_cast<int64_t>(all.size()) - 1)];
  }

 private:
  uint64_t state_;
};

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Every family of kernels; rounds: how many random cases beside the fixed ones.
using Check = void (*)(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_int_linear(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_code_linear(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_embedding(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_attention(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_rows(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_decoder(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
void check_solver(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed, int64_t rounds);
constexpr Check kChecks[] = {check_int_linear, check_code_linear, check_embedding, check_attention,
                             check_rows,       check_decoder,     check_solver};

void check_float8(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed);
void check_vectors(const std::vector<const bitgrain::Kernels*>& levels, uint64_t seed);
void check_pool(double seconds, bool forks);
