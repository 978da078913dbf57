#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitgrain {
namespace {

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a worker looks for more work before it sleeps: longer than the gap between two layers of a decoder, short
// enough not to take a core from others.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr int kLooks = 64;       // between two looks at the clock
constexpr int kPatience = 2000;  // of a caller whose work is done, about 30 us, before it sleeps

class Pool {
 public:
  void run(int threads, int64_t count, int64_t grain, Work work, const void* context) {
    const int64_t chunks = (count + grain - 1) / grain;
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads <= 1 || chunks > kMostChunks || !caller_.try_lock()) {
      work(context, 0, count);
      return;
    }
    std::lock_guard<std::mutex> hold(caller_, std::adopt_lock);
    start(threads - 1);
    work_ = work, context_ = context, count_ = count, grain_ = grain;
    done_.store(0, std::memory_order_relaxed);
    threads_.store(threads, std::memory_order_relaxed);
    const uint64_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < threads; ++i) {
      const int64_t first = chunks * i / threads, last = chunks * (i + 1) / threads;
      lanes_[i].last = last;
      lanes_[i].ticket.store(epoch << kBits | static_cast<uint64_t>(last - first), std::memory_order_release);
    }
    epoch_.store(epoch, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake();
    take(epoch, 0);
    for (int look = 0; done_.load(std::memory_order_acquire) < chunks; ++look) {
      if (look < kPatience) {
        pause_cpu();
        continue;
      }
      // a worker lost its core in the middle of a chunk: asleep, this thread leaves it another one, where spinning or
      // yielding would keep it waiting for a whole time slice
      std::unique_lock<std::mutex> lock(sleep_);
      asleep_.store(true, std::memory_order_seq_cst);
      finished_.wait(lock, [&] { return done_.load(std::memory_order_seq_cst) >= chunks; });
      asleep_.store(false, std::memory_order_relaxed);
    }
  }

  // After fork() the child has no workers.
  void forget() {
    workers_ = 0;
    new (&caller_) std::mutex();
    new (&sleep_) std::mutex();
    new (&call_) std::condition_variable();
    new (&finished_) std::condition_variable();
    sleepers_.store(0), asleep_.store(false);
  }

 private:
  static constexpr int kMostThreads = 128;
  static constexpr int kBits = 24;  // of the chunks that are left; above them the epoch
  static constexpr int64_t kMostChunks = (int64_t{1} << kBits) - 1;

  // Each thread has neighbouring chunks of its own, so that it reads memory in order; one that is done helps the others.
  struct alignas(64) Lane {
    std::atomic<uint64_t> ticket{0};
    int64_t last = 0;
  };

  void start(int wanted) {
    for (; workers_ < wanted; ++workers_) std::thread([this, index = workers_ + 1] { serve(index); }).detach();
  }

  // Claims chunks of this epoch until none is left. A claim that succeeds pins the job: the caller cannot return before
  // `done_` has counted it.
  void take(uint64_t epoch, int own) {
    const int threads = threads_.load(std::memory_order_relaxed);
    for (int i = 0; i < threads; ++i) {
      Lane& lane = lanes_[(own + i) % threads];
      uint64_t seen = lane.ticket.load(std::memory_order_acquire);
      while (seen >> kBits == epoch && (seen & kMostChunks) != 0) {
        if (!lane.ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
        const int64_t chunks = (count_ + grain_ - 1) / grain_;
        const int64_t first = (lane.last - static_cast<int64_t>(seen & kMostChunks)) * grain_;
        work_(context_, first, first + grain_ < count_ ? first + grain_ : count_);
        if (done_.fetch_add(1, std::memory_order_seq_cst) + 1 == chunks && asleep_.load(std::memory_order_seq_cst)) {
          { std::lock_guard<std::mutex> lock(sleep_); }
          finished_.notify_one();
        }
        seen = lane.ticket.load(std::memory_order_acquire);
      }
    }
  }

  void serve(int index) {
    uint64_t last = 0;
    for (;;) {
      const uint64_t epoch = epoch_.load(std::memory_order_acquire);
      if (epoch != last) {
        last = epoch;
        if (index < threads_.load(std::memory_order_relaxed)) take(epoch, index);
        continue;
      }
      const auto until = std::chrono::steady_clock::now() + kSpin;
      bool found = false;
      while (!found && std::chrono::steady_clock::now() < until) {
        for (int look = 0; look < kLooks && !found; ++look) {
          pause_cpu();
          found = epoch_.load(std::memory_order_acquire) != last;
        }
      }
      if (found) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      call_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != last; });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void wake() {
    { std::lock_guard<std::mutex> lock(sleep_); }
    call_.notify_all();
  }

  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> threads_{0};
  Lane lanes_[kMostThreads];
  Work work_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  std::mutex caller_, sleep_;
  std::condition_variable call_, finished_;
  std::atomic<bool> asleep_{false};  // the caller
  int workers_ = 0;
};

Pool& pool() {
  static Pool* the_pool = [] {
    auto* made = new Pool;  // never destroyed: detached workers may outlive main()
    pthread_atfork(nullptr, nullptr, [] { pool().forget(); });
    return made;
  }();
  return *the_pool;
}

}  // namespace

void run_parallel(int threads, int64_t count, int64_t grain, Work work, const void* context) {
  if (count <= 0) return;
  pool().run(threads, count, grain < 1 ? 1 : grain, work, context);
}

}  // namespace bitgrain
