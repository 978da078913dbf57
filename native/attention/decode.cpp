#include <cmath>

#include "attention/attention.h"
#include "floats.h"
#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

float load(const void* p, DType type, int64_t at) {
  if (type == DType::f32) return static_cast<const float*>(p)[at];
  const uint16_t half = static_cast<const uint16_t*>(p)[at];
  return type == DType::bf16 ? from_bf16(half) : from_f16(half);
}

void store(void* p, DType type, int64_t at, float x) {
  if (type == DType::f32) static_cast<float*>(p)[at] = x;
  else static_cast<uint16_t*>(p)[at] = type == DType::bf16 ? to_bf16(x) : to_f16(x);
}

int64_t offset(const int64_t* stride, int64_t row, int64_t head, int64_t query) {
  return row * stride[0] + head * stride[1] + query * stride[2];
}

void load_queries(const AttentionJob& job, const AttentionPart& part) {
  const int64_t shared = job.heads / job.groups, size = padded_size(job.k_size), rows = shared * job.queries;
  std::memset(part.q, 0, sizeof(float) * static_cast<size_t>(padded_rows(job) * size));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = offset(job.q_stride, part.row, part.group * shared + r / job.queries, r % job.queries);
    for (int64_t i = 0; i < job.k_size; ++i) part.q[r * size + i] = load(job.q, job.q_type, at + i);
  }
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
      total += fade * part[all + r];
      const float* from = part + 2 * all + r * size;
      for (int64_t c = 0; c < size; ++c) sum[c] += fade * from[c];
    }
    const float by = total == 0.f ? 0.f : 1.f / total;
    const int64_t to = offset(job.out_stride, row, head, r % job.queries);
    for (int64_t c = 0; c < job.v_size; ++c) store(job.out, job.q_type, to + c, sum[c] * by);
  }
}

}  // namespace

void decode_attention(const AttentionJob& job, const DenseTokens& dense, int threads) {
  static thread_local Scratch parts_memory;
  const Kernels& kernel = kernels();
  const int64_t pairs = job.batch * job.groups, runs = ceil_div(dense.tokens, kRun);
  float* parts = parts_memory.get<float>(pairs * runs * part_floats(job));
  parallel_for(threads, pairs * runs, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch own;
    const int64_t rows = padded_rows(job), q_floats = rows * padded_size(job.k_size);
    float* memory = own.get<float>(q_floats + kMostRows * kBlock);
    int64_t loaded = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t pair = item / runs, run = item % runs;
      AttentionPart part{};
      part.row = pair / job.groups, part.group = pair % job.groups;
      part.first = run * kRun, part.last = part.first + kRun < dense.tokens ? part.first + kRun : dense.tokens;
      part.tokens = dense.tokens;
      part.top = parts + item * part_floats(job), part.total = part.top + rows, part.sum = part.total + rows;
      part.q = memory, part.scores = memory + q_floats;
      if (pair != loaded) load_queries(job, part), loaded = pair;
      kernel.attend_dense(job, dense, part);
    }
  });
  parallel_for(pairs * runs * part_floats(job) < 1 << 15 ? 1 : threads, pairs, 1, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) {
      merge(job, parts + pair * runs * part_floats(job), runs, pair / job.groups, pair % job.groups);
    }
  });
}

}  // namespace bitgrain
