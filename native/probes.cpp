#include "probes.h"

#include <chrono>

#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

constexpr int64_t kReadBytes = 256 << 10;  // of an item
constexpr int64_t kRounds = 20000;         // of an item: some 0.1 ms to 0.5 ms
constexpr int64_t kItems = 64;             // of a thread

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double measure_peak(int64_t (*loop)(int64_t rounds), int threads) {
  const double began = now();
  const int64_t products = loop(1);
  parallel_for(threads, threads * kItems, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) loop(kRounds);
  });
  return static_cast<double>(products * kRounds * threads * kItems) / (now() - began);
}

}  // namespace

double measure_bandwidth(const uint8_t* memory, int64_t bytes, int threads) {
  const double began = now();
  parallel_for(threads, ceil_div(bytes, kReadBytes), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = i * kReadBytes;
      kernels().read_bytes(memory + at, bytes - at < kReadBytes ? bytes - at : kReadBytes);
    }
  });
  return static_cast<double>(bytes) / (now() - began);
}

double measure_int8_peak(int threads) { return measure_peak(kernels().int8_loop, threads); }

double measure_bf16_peak(int threads) { return measure_peak(kernels().bf16_loop, threads); }

}  // namespace bitgrain
