// The thread pool under stress: every item runs once, whoever calls, however small the job.
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "checks.h"

using namespace bitgrain;

namespace {

// One job whose items leave their marks, which need no atomics: an item that two threads run is a race.
void run_one(Random& random, std::vector<int64_t>& marks) {
  const int64_t count = random.within(0, static_cast<int64_t>(marks.size())), grain = random.within(1, 9);
  const int threads = static_cast<int>(random.within(1, 5));
  const int64_t mark = static_cast<int64_t>(random.next() >> 1);
  parallel_for(threads, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) marks[static_cast<size_t>(i)] += mark + i;
  });
  for (int64_t i = 0; i < count; ++i) {
    if (marks[static_cast<size_t>(i)] != mark + i) fail("pool: item " + std::to_string(i) + " did not run once");
    marks[static_cast<size_t>(i)] = 0;
  }
}

void run_many(uint64_t seed, double seconds) {
  Random random(seed);
  std::vector<int64_t> marks(200);
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < until) {
    for (int i = 0; i < 50; ++i) run_one(random, marks);
    if (random.next() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random.within(1, 400)));
  }
}

void in_child(double seconds) {
  const pid_t child = fork();
  if (child < 0) fail("pool: no fork");
  if (child == 0) {
    run_many(3, seconds);
    _exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) fail("pool: a forked child failed");
}

}  // namespace

void check_pool(double seconds, bool forks) {
  run_many(1, seconds);
  std::vector<std::thread> callers;
  for (uint64_t i = 0; i < 4; ++i) callers.emplace_back([=] { run_many(10 + i, seconds); });
  for (std::thread& caller : callers) caller.join();
  parallel_for(2, 8, 1, [](int64_t, int64_t) {  // from inside a job
    parallel_for(2, 8, 1, [](int64_t, int64_t) {});
  });
  for (int i = 0; forks && i < 3; ++i) {
    run_many(20, seconds / 8);
    in_child(seconds / 8);
  }
}
