// One query of each head against a cache of keys and values in float32, bfloat16 or float16.
namespace bitgrain {
namespace BG_ISA {

template <DType T>
static void attend_head(const PlainAttention& job, int64_t item) {
  const int64_t batch = item / job.kv_heads, head = item % job.kv_heads, group = job.heads / job.kv_heads;
  const int64_t width = job.head_dim, n = job.tokens, vectors = ceil_div(width, 16);
  const int64_t from = batch * job.batch_stride + head * job.head_stride;
  const float* q = job.q + batch * job.q_stride + head * group * width;
  float* y = job.y + (batch * job.heads + head * group) * width;
  for (int64_t t = 0; t < n; ++t) {
    F32 k[kMaxHead / 16];
    for (int64_t i = 0; i < vectors; ++i) k[i] = load_elements<T>(job.keys, from + t * width + 16 * i, lanes(width, 16 * i));
    for (int64_t g = 0; g < group; ++g) {
      F32 sum = zero_f();
      for (int64_t i = 0; i < vectors; ++i) {
        sum = fma_f(k[i], load_elements<DType::f32>(q, g * width + 16 * i, lanes(width, 16 * i)), sum);
      }
      job.scores[g * n + t] = sum_f(sum) * job.scale;
    }
  }
  for (int64_t g = 0; g < group; ++g) {
    float* p = job.scores + g * n;
    float most = p[0], total = 0.f;
    for (int64_t t = 1; t < n; ++t) most = p[t] > most ? p[t] : most;
    F32 sum = zero_f();
    for (int64_t t = 0; t < n; t += 16) {
      const int64_t count = lanes(n, t);
      const F32 e = exp_f(sub_f(load_elements<DType::f32>(p, t, count), set_f(most)));
      store_elements(p, DType::f32, t, count, e);
      if (count == 16) sum = add_f(sum, e);
      else for (int64_t i = t; i < n; ++i) total += p[i];
    }
    total += sum_f(sum);
    F32 out[kMaxHead / 16];
    for (int64_t i = 0; i < vectors; ++i) out[i] = zero_f();
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < vectors; ++i) {
        out[i] = fma_f(set_f(p[t]), load_elements<T>(job.values, from + t * width + 16 * i, lanes(width, 16 * i)), out[i]);
      }
    }
    for (int64_t i = 0; i < vectors; ++i) {
      store_elements(y, DType::f32, g * width + 16 * i, lanes(width, 16 * i), div_f(out[i], set_f(total)));
    }
  }
}

// Items: the heads of keys of all sequences.
static void attend(const PlainAttention& job, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    if (job.type == DType::f32) attend_head<DType::f32>(job, item);
    else if (job.type == DType::bf16) attend_head<DType::bf16>(job, item);
    else attend_head<DType::f16>(job, item);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
