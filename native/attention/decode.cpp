#include "attention/decode.h"

#include <atomic>
#include <cmath>

#include "floats.h"
#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

int64_t offset(const int64_t* stride, int64_t row, int64_t head, int64_t query) {
  return row * stride[0] + head * stride[1] + query * stride[2];
}

// Merges the parts of one batch row and group, in the order of their tokens.
void merge(const AttentionJob& job, const float* parts, int64_t runs, int64_t row, int64_t group) {
  const int64_t shared = job.heads / job.groups, size = padded_size(job.v_size), all = padded_rows(job);
  float* sum = nullptr;
  static thread_local Scratch memory;
  sum = memory.get<float>(size);
  for (int64_t r = 0; r < shared * job.queries; ++r) {
    const int64_t head = group * shared + r / job.queries;
    float top = job.sinks ? job.sinks[head] : kUnseen;
    for (int64_t i = 0; i < runs; ++i) {
      const float one = parts[i * part_floats(job) + r];
      top = one > top || one != one ? one : top;
    }
    float total = job.sinks ? std::exp(job.sinks[head] - top) : 0.f;
    std::memset(sum, 0, sizeof(float) * static_cast<size_t>(size));
    for (int64_t i = 0; i < runs; ++i) {
      const float* part = parts + i * part_floats(job);
      if (part[r] <= kUnseen) continue;
      const float fade = std::exp(part[r] - top);
      for (int64_t lane = 0; lane < 16; ++lane) total += fade * part[all + 16 * r + lane];
      const float* from = part + 17 * all + r * size;
      for (int64_t c = 0; c < size; ++c) sum[c] += fade * from[c];
    }
    const float by = total == 0.f ? 0.f : 1.f / total;
    const int64_t to = offset(job.out_stride, row, head, r % job.queries);
    for (int64_t c = 0; c < job.v_size; ++c) store_number(job.out, job.q_type, to + c, sum[c] * by);
  }
}

}  // namespace

void decode_attention(const AttentionJob& job, const PackedTokens& past, const DenseTokens& dense, int threads) {
  static thread_local Scratch parts_memory;
  const Kernels& kernel = kernels();
  // runs of packed tokens begin where tiles do
  const int64_t ahead = past.first % kBlock, pairs = job.batch * job.groups;
  const int64_t packed_runs = past.tokens ? ceil_div(ahead + past.tokens, kRun) : 0;
  const int64_t runs = packed_runs + ceil_div(dense.tokens, kRun), items = pairs * runs;
  float* parts = parts_memory.get<float>(items * part_floats(job));
  const int64_t rows = padded_rows(job), q_floats = rows * padded_size(job.k_size);
  const int64_t q_bytes = rows * kMostPlanes * kMostChannels;
  const int64_t grain = items / (8 * threads) < 1 ? 1 : items / (8 * threads);
  parallel_for(threads, items, grain, [&](int64_t first, int64_t last) {
    static thread_local Scratch own;
    float* memory = own.get<float>(q_floats + kMostRows * kBlock + rows + rows * kMostPlanes + ceil_div(q_bytes, 4));
    AttentionPart part{};
    part.q = memory, part.scores = part.q + q_floats, part.q_steps = part.scores + kMostRows * kBlock;
    part.q_sums = reinterpret_cast<int32_t*>(part.q_steps + rows);
    part.q_bytes = reinterpret_cast<int8_t*>(part.q_sums + rows * kMostPlanes);
    part.tokens = past.tokens + dense.tokens;
    int64_t loaded = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t pair = item / runs, run = item % runs;
      part.row = pair / job.groups, part.group = pair % job.groups;
      part.top = parts + item * part_floats(job), part.total = part.top + rows, part.sum = part.total + 16 * rows;
      if (pair != loaded) kernel.load_queries(job, part, packed_runs > 0);
      loaded = pair;
      if (run < packed_runs) {
        const int64_t begin = past.first - ahead + run * kRun, end = past.first + past.tokens;
        part.position = 0, part.first = begin > past.first ? begin : past.first;
        part.last = begin + kRun < end ? begin + kRun : end;
        kernel.attend_packed(job, past, part);
      } else {
        part.position = past.tokens, part.first = (run - packed_runs) * kRun;
        part.last = part.first + kRun < dense.tokens ? part.first + kRun : dense.tokens;
        kernel.attend_dense(job, dense, part);
      }
    }
  });
  parallel_for(items * part_floats(job) < 1 << 15 ? 1 : threads, pairs, 1, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) {
      merge(job, parts + pair * runs * part_floats(job), runs, pair / job.groups, pair % job.groups);
    }
  });
}

bool pack_states(const StatesJob& job, int threads) {
  const Kernels& kernel = kernels();
  std::atomic<bool> good{true};
  parallel_for(job.tokens < 16 ? 1 : threads, job.side->pairs, 1, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) {
      if (!kernel.pack_states(job, pair)) good = false;
    }
  });
  return good;
}

void read_states(const StatesJob& job, int threads) {
  const Kernels& kernel = kernels();
  parallel_for(job.tokens < 16 ? 1 : threads, job.side->pairs, 1, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) kernel.read_states(job, pair);
  });
}

}  // namespace bitgrain
