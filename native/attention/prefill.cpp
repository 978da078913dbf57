#include "attention/prefill.h"

#include "kernels.h"
#include "pool.h"

namespace bitgrain {

void prefill_attention(const AttentionJob& job, const DenseTokens& past, int64_t window, int threads) {
  if (job.queries <= 0 || job.batch <= 0) return;
  static thread_local Scratch k_memory, v_memory;
  const Kernels& kernel = kernels();
  PrefillJob one{};
  one.job = &job, one.past = &past, one.window = window;
  const int64_t pairs = job.batch * job.groups, tokens = round_up(past.tokens, kKeysAtOnce);
  const bool matrix = kernel.attend_matrix && past.type == DType::bf16;
  one.k_steps = matrix ? ceil_div(job.k_size, 32) * 16 : kernel.prefill_steps(past.type, job.k_size);
  one.key_panels = tokens / 32;
  one.value_steps = matrix ? tokens / 2 : kernel.prefill_steps(past.type, tokens);
  one.k_bytes = one.key_panels * one.k_steps * 128;
  one.v_bytes = ceil_div(job.v_size, 32) * one.value_steps * 128;
  one.k = k_memory.get<uint8_t>(pairs * one.k_bytes);
  one.v = v_memory.get<uint8_t>(pairs * one.v_bytes);
  one.rows = matrix ? kernel.query_rows : kernel.single_rows;
  one.tiles = ceil_div(job.queries, one.rows);
  parallel_for(threads, pairs * one.key_panels, 4,
               [&](int64_t first, int64_t last) { (matrix ? kernel.pack_matrix : kernel.pack_past)(one, first, last); });
  parallel_for(threads, job.batch * job.heads * one.tiles, matrix ? 4 : 1,
               [&](int64_t first, int64_t last) { (matrix ? kernel.attend_matrix : kernel.attend_tiles)(one, first, last); });
}

}  // namespace bitgrain
