// Norms, activations, rotations, sums and dense heads: every level against plain scalars.
#include "decoder/rows.h"

#include "decoder/dense_rows.h"
#include "decoder/module_norm.h"
#include "kernels.h"
#include "numbers.h"

using namespace bitgrain;

namespace {

// width numbers, normed as rows.h says
std::vector<double> normed(const Norm& norm, const std::vector<double>& x) {
  double mean = 0, squares = 0;
  const double width = double(norm.width);
  for (const double v : x) mean += norm.centered ? v / width : 0;
  for (const double v : x) squares += (v - mean) * (v - mean) / width;
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) {
    const double v = (x[i] - mean) / std::sqrt(squares + norm.eps) * (norm.weight ? norm.weight[i] : 1.);
    y.push_back(v + (norm.bias ? norm.bias[i] : 0.));
  }
  return y;
}

double activated(Act act, double x) {
  switch (act) {
    case Act::silu: return x / (1 + std::exp(-x));
    case Act::gelu: return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    case Act::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Act::relu: return std::fmax(x, 0.);
    default: return x > 0 ? x * x : 0;
  }
}

struct Weights {
  Weights(int64_t width, Edge edge, Random& random) : weight(width, edge), bias(width, edge) {
    for (int64_t i = 0; i < width; ++i) weight[i] = 1 + random.real() / 2, bias[i] = random.real();
    norm = {width, random.next() % 4 ? weight.data() : nullptr, random.next() % 2 ? bias.data() : nullptr, 1e-5f,
            int32_t(random.next() % 2)};
  }
  Guarded<float> weight, bias;
  Norm norm{};
};

void check_norm(Random& random, const std::string& name) {
  const int64_t width = random.within(1, 150), rows = random.within(0, 17), stride = width + random.within(0, 3);
  const Edge edge = any_edge(random);
  const Weights weights(width, edge, random);
  Numbers x(rows ? (rows - 1) * stride + width : 0, any_float_type(random), edge), y(rows * width, x.type(), edge);
  x.fill(random, 3.f);
  const NormRows job{weights.norm, x.data(), x.type(), stride};
  make_rows({kernels().norm_row, &job}, rows, width, y.data(), y.type(), int(random.within(1, 3)));
  const std::string what = name + ": norm of " + std::to_string(width);
  for (int64_t r = 0; r < rows; ++r) {
    Guarded<float> alone(width, edge);
    kernels().norm_row(&job, r, alone.data());
    std::vector<double> row;
    for (int64_t i = 0; i < width; ++i) row.push_back(x[r * stride + i]);
    const std::vector<double> meant = normed(weights.norm, row);
    for (int64_t i = 0; i < width; ++i) {
      const double one = meant[size_t(i)];
      // one of few numbers may be near the mean
      check_near(y[r * width + i], one, 5e-4 + rounding(one, y.type()), what);
      check_near(y[r * width + i], alone[i], rounding(one, y.type()), what);
    }
  }
}

void check_module_norm(Random& random, const std::string& name) {
  const int64_t width = random.within(1, 700), rows = random.within(0, 5);
  const Edge edge = any_edge(random);
  Numbers x(rows * width, any_float_type(random), edge), y(rows * width, x.type(), edge), gain(width, x.type(), edge);
  x.fill(random, 3.f), gain.fill(random);
  module_norm(x.data(), x.type(), rows, width, gain.data(), 1e-5f, random.one_of({4, 8, 16}), y.data());
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> row;
    for (int64_t i = 0; i < width; ++i) row.push_back(x[r * width + i]);
    const std::vector<double> meant = normed({width, nullptr, nullptr, 1e-5f, 0}, row);
    for (int64_t i = 0; i < width; ++i) {
      const double one = meant[size_t(i)] * gain[i];
      check_near(y[r * width + i], one, 5e-4 + 2 * rounding(one, y.type()), name + ": module norm");
    }
  }
}

void check_gated(Random& random, const std::string& name) {
  const int64_t width = random.within(1, 150), rows = random.within(0, 17), stride = width + random.within(0, 3);
  const Edge edge = any_edge(random);
  const int64_t count = rows ? (rows - 1) * stride + width : 0;
  Numbers gate(count, any_float_type(random), edge), up(count, gate.type(), edge), y(rows * width, gate.type(), edge);
  gate.fill(random, 6.f), up.fill(random);
  const bool gated = random.next() % 2;
  const Act act = random.one_of({Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu_squared});
  const GatedRows job{gate.data(), gated ? up.data() : nullptr, gate.type(), stride, width, act};
  make_rows({kernels().gated_row, &job}, rows, width, y.data(), y.type(), int(random.within(1, 3)));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const double meant = activated(act, gate[r * stride + i]) * (gated ? up[r * stride + i] : 1.);
      check_near(y[r * width + i], meant, 3e-6 + rounding(meant, y.type()), name + ": activation " +
                 std::to_string(int(act)));
    }
  }
}

void check_add(Random& random, const std::string& name) {
  const int64_t width = random.within(0, 100), x_at = random.within(0, 5), y_at = random.within(0, 5);
  const Edge edge = any_edge(random);
  Numbers x(x_at + width, any_float_type(random), edge), y(y_at + width, any_float_type(random), edge, 0x77);
  Numbers add(width, DType::f32, edge);
  x.fill(random), add.fill(random);
  const bool both = random.next() % 2;
  kernels().add_row(x.data(), x.type(), x_at, both ? (const float*)add.data() : nullptr, width, y.data(), y.type(),
                    y_at);
  check_untouched(y.bytes(), y_at * int64_t(size_of(y.type())), 0x77, name + ": sum of rows");
  for (int64_t i = 0; i < width; ++i) {
    const float meant = x[x_at + i] + (both ? add[i] : 0.f);
    check_near(y[y_at + i], meant, rounding(meant, y.type()), name + ": sum of rows");
  }
}

void check_rotate(Random& random, const std::string& name) {
  const int64_t size = random.within(1, 80), heads = random.within(0, 3), kv_heads = random.within(heads ? 0 : 1, 2);
  const int64_t rows = random.within(0, 10), before = random.within(0, 3), between = random.within(0, 3);
  const int64_t stride = before + heads * size + between + kv_heads * size + random.within(0, 3);
  const Edge edge = any_edge(random);
  const Rotary rotary = size < 2 ? Rotary::none : random.one_of({Rotary::none, Rotary::half, Rotary::neighbours});
  const int64_t turned = 2 * random.within(1, size < 2 ? 1 : size / 2), cos_rows = random.within(1, 5);
  Numbers x((rows ? rows - 1 : 0) * stride + (rows ? before + (heads + kv_heads) * size + between : 0),
            any_float_type(random), edge);
  Numbers cos(cos_rows * turned, any_float_type(random), edge), sin(cos_rows * turned, cos.type(), edge);
  x.fill(random, 3.f), cos.fill(random), sin.fill(random);
  const Weights q(size, edge, random), k(size, edge, random);
  const bool norms = random.next() % 2;
  const RotateRows job{x.data(), x.type(), stride, before, before + heads * size + between, heads, kv_heads, size,
                       norms ? &q.norm : nullptr, norms ? &k.norm : nullptr, rotary, cos.data(), sin.data(), cos.type(),
                       cos_rows, turned};
  std::vector<double> meant;
  for (int64_t i = 0; i < x.count(); ++i) meant.push_back(x[i]);
  std::vector<uint8_t> old(x.bytes(), x.bytes() + x.size());
  std::vector<bool> moved(meant.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      const int64_t at = r * stride + (h < heads ? before + h * size : job.k_at + (h - heads) * size);
      std::vector<double> head(meant.begin() + at, meant.begin() + at + size);
      if (norms) head = normed(h < heads ? q.norm : k.norm, head);
      for (int64_t i = 0; i < size; ++i) {
        double y = head[size_t(i)];
        if (rotary != Rotary::none && i < turned) {
          const int64_t half = turned / 2, c = r % cos_rows * turned + i;
          const bool first = rotary == Rotary::half ? i < half : i % 2 == 0;
          const int64_t other = rotary == Rotary::half ? (first ? i + half : i - half) : (first ? i + 1 : i - 1);
          y = y * cos[c] + (first ? -1 : 1) * head[size_t(other)] * sin[c];
        }
        meant[size_t(at + i)] = y, moved[size_t(at + i)] = true;
      }
    }
  }
  kernels().rotate_rows(job, 0, rows);
  const int64_t bytes = int64_t(size_of(x.type()));
  for (int64_t i = 0; i < x.count(); ++i) {
    const std::string what = name + ": rotation of " + std::to_string(size);
    if (moved[size_t(i)]) check_near(x[i], meant[size_t(i)], 1e-3 + rounding(meant[size_t(i)], x.type()), what);
    else if (std::memcmp(x.bytes() + i * bytes, &old[size_t(i * bytes)], size_t(bytes)) != 0) {
      fail(what + ": written beside heads");
    }
  }
}

void check_dense(Random& random, const std::string& name) {
  const int64_t n = random.within(1, 70), k = random.within(1, 150), m = random.within(0, 17);
  const int64_t gap = random.within(0, 3);
  const Edge edge = any_edge(random);
  Numbers w((n - 1) * (k + gap) + k, any_float_type(random), edge);
  Numbers x(m ? (m - 1) * (k + gap) + k : 0, any_float_type(random), edge);
  Numbers y(m * n, x.type(), edge), bias(n, DType::f32, edge);
  w.fill(random), x.fill(random), bias.fill(random);
  const bool add = random.next() % 2;
  const DenseWeights weight{w.data(), w.type(), n, k, k + gap, add ? (const float*)bias.data() : nullptr};
  const DenseWeights* weights[] = {&weight};
  void* to[] = {y.data()};
  dense_rows({x.data(), x.type(), m, k + gap, 1, weights, to, &n, y.type()}, int(random.within(1, 3)));
  const bool rounded = m > kExactRows && w.type() == DType::bf16 && kernels().input_bytes == 2;
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      double meant = add ? bias[c] : 0., size = std::fabs(meant);
      for (int64_t i = 0; i < k; ++i) {
        const double one = double(x[r * (k + gap) + i]) * w[c * (k + gap) + i];
        meant += one, size += std::fabs(one);
      }
      check_near(y[r * n + c], meant, (rounded ? 5e-3 : 1e-6) * size + rounding(meant, y.type()), name + ": dense rows");
    }
  }
}

void check_exp(Random& random, const std::string& name) {
  const int64_t count = random.within(0, 70);
  const Edge edge = any_edge(random);
  Numbers x(count, DType::f32, edge), y(count, DType::f32, edge);
  x.fill(random, random.one_of({1.f, 87.f}));
  kernels().exp_floats((const float*)x.data(), (float*)y.data(), count);
  for (int64_t i = 0; i < count; ++i) {
    check_near(y[i], std::exp(double(x[i])), 3e-7 * std::exp(double(x[i])), name + ": exp");
  }
}

}  // namespace

void check_rows(const std::vector<const Kernels*>& levels, uint64_t seed, int64_t rounds) {
  for (const Kernels* level : levels) {
    Random random(seed);
    use_kernels(level->name);
    for (int64_t i = 0; i < 30 + rounds; ++i) {
      for (const auto check : {check_norm, check_module_norm, check_gated, check_add, check_rotate, check_dense, check_exp}) {
        check(random, level->name);
      }
    }
  }
}
