#include "decoder/block.h"

#include "attention/decode.h"
#include "kernels.h"
#include "pool.h"

namespace bitgrain {
namespace {

// Fewer rows than this are done sooner than a second thread is there.
constexpr int64_t kRowsForThreads = 8;

int threads_for(int64_t rows, int threads) { return rows < kRowsForThreads ? 1 : threads; }

uint8_t* element(void* x, DType type, int64_t at) { return static_cast<uint8_t*>(x) + at * static_cast<int64_t>(size_of(type)); }

// Sums of products are added up in float32, whatever the type of x: two roundings fewer than layer by layer.
void add_to(const Products& products, const Rows& rows, int64_t m, float* y, int64_t width, int threads) {
  void* to[] = {y};
  products.run(rows, m, to, DType::f32, width, threads);
}

// Keys and values of the new tokens to where they are kept.
bool keep(const AttentionStage& attention, float* qkv, DType type, int64_t batch, int64_t tokens,
          const KeysValues& cache, int threads) {
  const int64_t size = attention.head_dim, width = attention.qkv_width, past = cache.tokens - tokens;
  if (cache.packed_keys) {
    const auto pack = [&](const PackedSide* side, int64_t at) {
      return pack_states({side, qkv + at, DType::f32, attention.kv_heads, {tokens * width, size, width},
                          cache.first + past, tokens}, threads);
    };
    return pack(cache.packed_keys, attention.at[1]) && pack(cache.packed_values, attention.at[2]);
  }
  for (int64_t row = 0; row < batch * tokens; ++row) {
    for (int64_t head = 0; head < attention.kv_heads; ++head) {
      const float* from = qkv + row * width + head * size;
      const auto place = [&](const int64_t* stride) {
        return row / tokens * stride[0] + head * stride[1] + (past + row % tokens) * size;
      };
      kernels().add_row(from, DType::f32, attention.at[1], nullptr, size, cache.keys, type, place(cache.k_stride));
      kernels().add_row(from, DType::f32, attention.at[2], nullptr, size, cache.values, type, place(cache.v_stride));
    }
  }
  return true;
}

}  // namespace

void start_attention(const AttentionStage& part, const void* x, DType type, int64_t m, const Positions& positions,
                     void* out, DType out_type, int threads) {
  const Kernels& kernel = kernels();
  const NormRows normed{part.norm, x, type, part.norm.width};
  const RowSource source{kernel.norm_row, &normed};
  void* to[3];
  for (int i = 0; i < 3; ++i) to[i] = element(out, out_type, part.joined == 1 ? 0 : part.at[i]);
  part.qkv->run({nullptr, DType::f32, part.norm.width, &source}, m, to, out_type, part.qkv_width, threads);

  const RotateRows rotate{out, out_type, part.qkv_width, part.at[0], part.at[1], part.heads, part.kv_heads,
                          part.head_dim, part.normed[0] ? &part.head_norm[0] : nullptr,
                          part.normed[1] ? &part.head_norm[1] : nullptr, part.rotary, positions.cos, positions.sin,
                          positions.type, positions.rows, positions.rotary_dim};
  if (part.rotary == Rotary::none && !part.normed[0] && !part.normed[1]) return;
  parallel_for(threads_for(m, threads), m, kRowsForThreads,
               [&](int64_t first, int64_t last) { kernel.rotate_rows(rotate, first, last); });
}

void finish_attention(const AttentionStage& part, const void* x, DType type, int64_t m, const void* attended,
                      DType attended_type, float* h, int threads) {
  const int64_t hidden = part.norm.width, width = part.heads * part.head_dim;
  const Kernels& kernel = kernels();
  static thread_local Scratch memory;
  float* out = memory.get<float>(m * hidden);
  add_to(*part.o, {attended, attended_type, width, nullptr}, m, out, hidden, threads);
  parallel_for(threads_for(m, threads), m, kRowsForThreads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernel.add_row(x, type, row * hidden, out + row * hidden, hidden, h, DType::f32, row * hidden);
    }
  });
}

void run_mlp(const MlpStage& part, const float* h, int64_t m, void* y, DType type, int threads) {
  const int64_t hidden = part.norm.width;
  const Kernels& kernel = kernels();
  static thread_local Scratch between_memory, out_memory;
  const NormRows normed{part.norm, h, DType::f32, hidden};
  const RowSource norm_source{kernel.norm_row, &normed};
  void* between = between_memory.get<uint8_t>(m * part.row_width * static_cast<int64_t>(size_of(type)));
  void* gate = element(between, type, part.gate_at);
  void* up = part.up_at < 0 ? nullptr : element(between, type, part.up_at);
  void* to[] = {part.joined == 1 ? between : gate, up};
  part.gate_up->run({nullptr, DType::f32, hidden, &norm_source}, m, to, type, part.row_width, threads);

  const GatedRows gated{gate, up, type, part.row_width, part.width, part.act};
  const RowSource gated_source{kernel.gated_row, &gated};
  float* out = out_memory.get<float>(m * hidden);
  add_to(*part.down, {nullptr, DType::f32, part.width, &gated_source}, m, out, hidden, threads);
  parallel_for(threads_for(m, threads), m, kRowsForThreads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernel.add_row(h, DType::f32, row * hidden, out + row * hidden, hidden, y, type, row * hidden);
    }
  });
}

void finish_block(const AttentionStage& attention, const MlpStage* mlp, const void* x, DType type, int64_t m,
                  const void* attended, DType attended_type, void* y, int threads) {
  static thread_local Scratch memory;
  const int64_t hidden = attention.norm.width;
  float* h = memory.get<float>(m * hidden);
  finish_attention(attention, x, type, m, attended, attended_type, h, threads);
  if (mlp) return run_mlp(*mlp, h, m, y, type, threads);
  for (int64_t row = 0; row < m; ++row) {
    kernels().add_row(h, DType::f32, row * hidden, nullptr, hidden, y, type, row * hidden);
  }
}

bool run_block(const AttentionStage& attention, const MlpStage* mlp, const void* x, DType type, int64_t batch,
               int64_t tokens, const Positions& positions, const KeysValues& cache, const Mask& mask, void* y,
               int threads) {
  static thread_local Scratch qkv_memory, attended_memory;
  const int64_t size = attention.head_dim, width = attention.qkv_width;
  float* qkv = qkv_memory.get<float>(batch * tokens * width);
  start_attention(attention, x, type, batch * tokens, positions, qkv, DType::f32, threads);
  if (!keep(attention, qkv, type, batch, tokens, cache, threads)) return false;

  const int64_t attended_width = attention.heads * size;
  float* attended = attended_memory.get<float>(batch * tokens * attended_width);
  AttentionJob job{};
  job.q = qkv + attention.at[0], job.q_type = DType::f32, job.planes = planes_of(type);
  job.q_stride[0] = tokens * width, job.q_stride[1] = size, job.q_stride[2] = width;
  job.batch = batch, job.heads = attention.heads, job.groups = attention.kv_heads, job.queries = tokens;
  job.k_size = job.v_size = size, job.scaling = attention.scale, job.causal = mask.kind == MaskKind::none;
  job.mask_kind = mask.kind, job.mask = mask.mask;
  for (int i = 0; i < 3; ++i) job.mask_stride[i] = mask.stride[i];
  job.out = attended;
  job.out_stride[0] = tokens * attended_width, job.out_stride[1] = size, job.out_stride[2] = attended_width;
  if (cache.packed_keys) {
    decode_attention(job, {cache.first, cache.tokens, *cache.packed_keys, *cache.packed_values}, DenseTokens{}, threads);
  } else {
    const DenseTokens dense{cache.tokens, type, cache.keys, cache.values, {cache.k_stride[0], cache.k_stride[1], size},
                            {cache.v_stride[0], cache.v_stride[1], size}};
    decode_attention(job, PackedTokens{}, dense, threads);
  }
  finish_block(attention, mlp, x, type, batch * tokens, attended, DType::f32, y, threads);
  return true;
}

}  // namespace bitgrain
