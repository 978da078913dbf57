// A thread pool for kernels of microseconds.
//
// Work is a count of items; threads claim runs of `grain` items until none is left, and the caller works along. A
// caller never waits for a thread that has claimed nothing: with a busy process beside it, a thread that does not get
// a core costs nothing, where a barrier (OpenMP) would cost a time slice at each call.
#pragma once
#include <cstdint>

namespace bitgrain {

// work(context, first, last): items [first, last); called from several threads at once.
using Work = void (*)(const void* context, int64_t first, int64_t last);

// Runs `count` items on up to `threads` threads (the caller is one of them). Called while the pool is busy with another
// caller's work, it does everything on the calling thread.
void run_parallel(int threads, int64_t count, int64_t grain, Work work, const void* context);

template <typename F>
void parallel_for(int threads, int64_t count, int64_t grain, const F& f) {
  run_parallel(
      threads, count, grain,
      [](const void* context, int64_t first, int64_t last) { (*static_cast<const F*>(context))(first, last); }, &f);
}

}  // namespace bitgrain
