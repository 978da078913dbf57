// Norms, gated activations and rotations of rows, see decoder/rows.h; computed in float32.
namespace bitgrain {
namespace BG_ISA {

BG_INLINE int64_t lanes(int64_t width, int64_t at) { return width - at < 16 ? width - at : 16; }

BG_INLINE F32 load_any(const void* x, DType type, int64_t at, int64_t count) {
  if (type == DType::f32) return load_elements<DType::f32>(x, at, count);
  return type == DType::bf16 ? load_elements<DType::bf16>(x, at, count) : load_elements<DType::f16>(x, at, count);
}

// x [width] to y; they may be the same.
BG_INLINE void normalize(const Norm& norm, const float* x, float* y) {
  const int64_t width = norm.width, whole = width / 16 * 16;
  const float of_width = 1.f / (float)width;
  float mean = 0.f;
  if (norm.centered) {
    F32 sum = zero_f();
    for (int64_t i = 0; i < width; i += 16) sum = add_f(sum, load_elements<DType::f32>(x, i, lanes(width, i)));
    mean = sum_f(sum) * of_width;
  }
  F32 squares = zero_f(), more = zero_f();
  int64_t i = 0;
  for (; i + 32 <= whole; i += 32) {
    const F32 a = sub_f(load_f(x + i), set_f(mean)), b = sub_f(load_f(x + i + 16), set_f(mean));
    squares = fma_f(a, a, squares), more = fma_f(b, b, more);
  }
  float tail = 0.f;
  if (i < whole) {
    const F32 a = sub_f(load_f(x + i), set_f(mean));
    squares = fma_f(a, a, squares), i += 16;
  }
  for (; i < width; ++i) tail += (x[i] - mean) * (x[i] - mean);
  const float variance = (sum_f(add_f(squares, more)) + tail) * of_width;
  const F32 factor = div_f(set_f(1.f), set_f(__builtin_sqrtf(variance + norm.eps)));
  for (i = 0; i < width; i += 16) {
    const int64_t count = lanes(width, i);
    F32 v = mul_f(sub_f(load_elements<DType::f32>(x, i, count), set_f(mean)), factor);
    if (norm.weight) v = mul_f(v, load_elements<DType::f32>(norm.weight, i, count));
    if (norm.bias) v = add_f(v, load_elements<DType::f32>(norm.bias, i, count));
    store_elements(y, DType::f32, i, count, v);
  }
}

static void norm_row(const void* context, int64_t row, float* to) {
  const NormRows& job = *(const NormRows*)context;
  const int64_t width = job.norm.width;
  const uint8_t* x = (const uint8_t*)job.x + row * job.stride * (int64_t)size_of(job.type);
  for (int64_t i = 0; i < width; i += 16) {
    store_elements(to, DType::f32, i, lanes(width, i), load_any(x, job.type, i, lanes(width, i)));
  }
  normalize(job.norm, to, to);
}

BG_INLINE F32 sigmoid_f(F32 x) {
  const F32 one = set_f(1.f);
  return div_f(one, add_f(one, exp_f(sub_f(zero_f(), x))));
}

// erf after Abramowitz and Stegun 7.1.26: off by at most 1.5e-7
BG_INLINE F32 erf_f(F32 x) {
  const F32 size = abs_f(x), one = set_f(1.f);
  const F32 t = div_f(one, fma_f(set_f(0.3275911f), size, one));
  F32 y = set_f(1.061405429f);
  y = fma_f(y, t, set_f(-1.453152027f));
  y = fma_f(y, t, set_f(1.421413741f));
  y = fma_f(y, t, set_f(-0.284496736f));
  y = fma_f(y, t, set_f(0.254829592f));
  y = fnma_f(mul_f(y, t), exp_f(sub_f(zero_f(), mul_f(x, x))), one);
  return mul_f(y, div_f(x, max_f(set_f(1e-30f), size)));  // its sign
}

BG_INLINE F32 activate(Act act, F32 x) {
  switch (act) {
    case Act::silu: return mul_f(x, sigmoid_f(x));
    case Act::gelu: return mul_f(mul_f(set_f(0.5f), x), add_f(set_f(1.f), erf_f(mul_f(x, set_f(0.70710678f)))));
    case Act::gelu_tanh: {  // (1 + tanh u) / 2 is the sigmoid of 2 u
      const F32 cubic = fma_f(mul_f(mul_f(x, x), x), set_f(0.044715f), x);
      return mul_f(x, sigmoid_f(mul_f(cubic, set_f(1.59576912f))));
    }
    case Act::relu: return max_f(zero_f(), x);
    default: {
      const F32 y = max_f(zero_f(), x);
      return mul_f(y, y);
    }
  }
}

template <DType T>
BG_INLINE void gated_row_of(const GatedRows& job, int64_t row, float* to) {
  const int64_t offset = row * job.stride;
  for (int64_t i = 0; i < job.width; i += 16) {
    const int64_t count = lanes(job.width, i);
    F32 v = activate(job.act, load_elements<T>(job.gate, offset + i, count));
    if (job.up) v = mul_f(v, load_elements<T>(job.up, offset + i, count));
    store_elements(to, DType::f32, i, count, v);
  }
}

static void gated_row(const void* context, int64_t row, float* to) {
  const GatedRows& job = *(const GatedRows*)context;
  if (job.type == DType::f32) gated_row_of<DType::f32>(job, row, to);
  else if (job.type == DType::bf16) gated_row_of<DType::bf16>(job, row, to);
  else gated_row_of<DType::f16>(job, row, to);
}

static void add_row(const void* x, DType x_type, int64_t x_at, const float* add, int64_t width, void* y, DType y_type,
                    int64_t y_at) {
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t count = lanes(width, i);
    F32 v = load_any(x, x_type, x_at + i, count);
    if (add) v = add_f(v, load_elements<DType::f32>(add, i, count));
    store_elements(y, y_type, y_at + i, count, v);
  }
}

// One head of kMaxHead features at most, in place.
BG_INLINE void rotate_head(const RotateRows& job, int64_t at, const Norm* norm, const float* cos, const float* sin) {
  alignas(64) float x[kMaxHead], y[kMaxHead];
  const int64_t width = job.head_dim, turned = job.rotary == Rotary::none ? 0 : job.rotary_dim, half = turned / 2;
  for (int64_t i = 0; i < width; i += 16) {
    store_elements(x, DType::f32, i, lanes(width, i), load_any(job.x, job.type, at + i, lanes(width, i)));
  }
  if (norm) normalize(*norm, x, x);
  if (job.rotary == Rotary::half) {
    for (int64_t i = 0; i < half; i += 16) {
      const int64_t count = lanes(half, i);
      const F32 a = load_elements<DType::f32>(x, i, count), b = load_elements<DType::f32>(x, half + i, count);
      const F32 low = mul_f(a, load_elements<DType::f32>(cos, i, count));
      const F32 high = mul_f(b, load_elements<DType::f32>(cos, half + i, count));
      store_elements(y, DType::f32, i, count, fnma_f(b, load_elements<DType::f32>(sin, i, count), low));
      store_elements(y, DType::f32, half + i, count, fma_f(a, load_elements<DType::f32>(sin, half + i, count), high));
    }
  } else {
    for (int64_t i = 0; i < turned; i += 2) {
      y[i] = x[i] * cos[i] - x[i + 1] * sin[i];
      y[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
    }
  }
  std::memcpy(y + turned, x + turned, (size_t)(width - turned) * sizeof(float));
  for (int64_t i = 0; i < width; i += 16) {
    store_elements(job.x, job.type, at + i, lanes(width, i), load_elements<DType::f32>(y, i, lanes(width, i)));
  }
}

static void rotate_rows(const RotateRows& job, int64_t first, int64_t last) {
  alignas(64) float cos[kMaxHead], sin[kMaxHead];
  for (int64_t row = first; row < last; ++row) {
    if (job.rotary != Rotary::none) {
      const int64_t at = row % job.cos_rows * job.rotary_dim;
      for (int64_t i = 0; i < job.rotary_dim; i += 16) {
        const int64_t count = lanes(job.rotary_dim, i);
        store_elements(cos, DType::f32, i, count, load_any(job.cos, job.cos_type, at + i, count));
        store_elements(sin, DType::f32, i, count, load_any(job.sin, job.cos_type, at + i, count));
      }
    }
    const int64_t at = row * job.stride;
    for (int64_t h = 0; h < job.q_heads; ++h) rotate_head(job, at + job.q_at + h * job.head_dim, job.q_norm, cos, sin);
    for (int64_t h = 0; h < job.k_heads; ++h) rotate_head(job, at + job.k_at + h * job.head_dim, job.k_norm, cos, sin);
  }
}

}  // namespace BG_ISA
}  // namespace bitgrain
