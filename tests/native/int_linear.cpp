// int8 products: every level against plain scalars, in memory whose ends are guarded.
#include <cmath>
#include <vector>

#include "checks.h"
#include "floats.h"
#include "guarded.h"
#include "kernels.h"

using namespace bitgrain;

namespace {

struct Case {
  int bits;
  int64_t n, m;
  std::vector<int32_t> lengths;
  DType x_type, scale_type;
  Zeros zeros;
  bool fixed;
  int low, high;
  bool bias;
  int64_t gap;  // elements between rows
  int threads;
  Edge edge;
};

std::string describe(const Case& c) {
  std::string text = "bits " + std::to_string(c.bits) + ", m " + std::to_string(c.m) + ", n " + std::to_string(c.n);
  text += ", spans";
  for (const int32_t length : c.lengths) text += " " + std::to_string(length);
  return text + ", x " + std::to_string(int(c.x_type)) + ", scales " + std::to_string(int(c.scale_type)) + ", zeros " +
         std::to_string(int(c.zeros)) + (c.fixed ? ", static " : ", dynamic ") + std::to_string(c.low) + ".." +
         std::to_string(c.high) + ", bias " + std::to_string(c.bias) + ", gap " + std::to_string(c.gap) +
         ", threads " + std::to_string(c.threads) + (c.edge == Edge::end ? ", end" : ", start");
}

float load(const uint8_t* p, DType type) {
  float whole;
  uint16_t half;
  if (type == DType::f32) return std::memcpy(&whole, p, 4), whole;
  std::memcpy(&half, p, 2);
  return type == DType::bf16 ? from_bf16(half) : from_f16(half);
}
void store(uint8_t* p, DType type, float value) {
  if (type == DType::f32) {
    std::memcpy(p, &value, 4);
  } else {
    const uint16_t half = type == DType::bf16 ? to_bf16(value) : to_f16(value);
    std::memcpy(p, &half, 2);
  }
}
float rounded(float value, DType type) {
  uint8_t part[4];
  store(part, type, value);
  return load(part, type);
}

// A case with its data: codes, scales and zeros as they were meant, and the packed weight.
class Layer {
 public:
  Layer(const Case& c, Random& random)
      : c_(c), k_(0), spans_(c.lengths.size()), bias_(c.bias ? c.n : 0, c.edge) {
    for (const int32_t length : c.lengths) k_ += length;
    const int64_t count = int64_t(spans_.size());
    shift_ = c.bits == 8 ? (c.low < 0 ? 128 : 0) : (c.high > 127 ? -128 : 0);
    w_.n = c.n, w_.bits = c.bits, w_.scale_type = c.scale_type, w_.zeros = c.zeros;
    const bool far = random.next() % 4 == 0;  // zero points that no code comes near
    w_.zero = c.zeros == Zeros::constant || c.zeros == Zeros::minima ? int32_t(far ? random.within(-20, 300) : random.within(0, 15)) : 0;
    w_.sums = shift_ != 0 || c.fixed;
    const int64_t bytes = lay_out(w_, c.lengths.data(), int32_t(count), spans_.data());
    spec_ = {c.fixed, 127.f, c.low, c.high, shift_};
    for (Span& span : spans_) {
      span.a_scale = c.fixed ? 0.01f + 0.01f * std::fabs(random.real()) : 1.f;
      span.a_zero = shift_ + (c.fixed ? int32_t(random.within(c.low, c.high)) : 0);
    }
    codes_.resize(size_t(c.n * k_)), scale_.resize(size_t(c.n * count)), zero_.resize(size_t(c.n * count));
    // at times all codes are extreme, where sums of 16 bits would overflow
    const uint64_t kind = random.next() % 4;
    const int top = (1 << c.bits) - 1;
    for (uint8_t& code : codes_) {
      const int most = c.bits < 8 ? top : kind == 0 ? 128 : 127;
      code = uint8_t(kind < 2 ? most : random.within(0, top));
    }
    for (float& s : scale_) s = rounded(0.1f + std::fabs(random.real()), c.scale_type);
    for (float& z : zero_) {
      z = c.zeros == Zeros::codes ? float(random.within(0, far ? 255 : 15)) : random.real() * 8;
      if (c.zeros == Zeros::minima) z = rounded(z, c.scale_type);
    }
    panels_ = new Guarded<uint8_t>(bytes, c.edge, 0xa5);
    pack_panels(w_, codes_.data(), scale_.data(), zero_.data(), panels_->data(), 0, ceil_div(c.n, kPanel));
    w_.panels = panels_->data();
    for (int64_t i = 0; c.bias && i < c.n; ++i) bias_[i] = random.real();
    w_.bias = c.bias ? bias_.data() : nullptr;
    check_unpack();
  }
  Layer(const Layer&) = delete;
  ~Layer() { delete panels_; }

  const IntWeights& weights() const { return w_; }
  const ActivationSpec& spec() const { return spec_; }
  int64_t k() const { return k_; }

  // One row: stored bytes [k], its scale.
  float quantize(const float* x, int32_t* stored) const {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < k_; ++i) {
      finite &= std::isfinite(x[i]);
      if (std::fabs(x[i]) > largest) largest = std::fabs(x[i]);
    }
    const float row = c_.fixed ? 1.f : largest > 0 ? largest / spec_.divisor : 1.f;
    for (const Span& span : spans_) {
      for (int64_t i = span.first; i < span.first + span.count; ++i) {
        float v = x[i] / (c_.fixed ? span.a_scale : row) + float(span.a_zero - shift_);
        v = v > float(c_.low) ? v : float(c_.low), v = v < float(c_.high) ? v : float(c_.high);
        stored[i] = int32_t(std::nearbyint(v)) + shift_;
      }
    }
    return finite ? row : NAN;
  }

  // y of one output, and what its error may be.
  double output(const int32_t* stored, float row, int64_t column, double* bound) const {
    double y = 0, size = 0;
    for (size_t s = 0; s < spans_.size(); ++s) {
      const Span& span = spans_[s];
      const size_t index = size_t(column) * spans_.size() + s;
      const bool minima = c_.zeros == Zeros::minima;
      const double zero = c_.zeros == Zeros::constant || minima ? w_.zero : zero_[index];
      const double minimum = minima ? double(zero_[index]) * span.a_scale : 0.;
      const double scale = double(scale_[index]) * span.a_scale;
      for (int64_t i = span.first; i < span.first + span.count; ++i) {
        const uint8_t byte = codes_[size_t(column * k_ + i)];
        const double code = c_.bits == 8 ? double(int8_t(byte)) : byte, x = stored[i] - span.a_zero;
        y += x * ((code - zero) * scale - minimum);
        size += std::fabs(x) * ((std::fabs(code) + std::fabs(zero)) * scale + std::fabs(minimum));
      }
    }
    *bound = double(spans_.size() + 4) * std::ldexp(size * row, -23);
    if (c_.bias) *bound += std::ldexp(std::fabs(w_.bias[column]), -23);
    return y * row + (c_.bias ? w_.bias[column] : 0.f);
  }

 private:
  void check_unpack() const {
    std::vector<uint8_t> codes(codes_.size());
    std::vector<float> scale(scale_.size()), zero(zero_.size());
    unpack_panels(w_, codes.data(), scale.data(), zero.data(), 0, ceil_div(c_.n, kPanel));
    if (codes != codes_ || scale != scale_ || (c_.zeros != Zeros::constant && zero != zero_)) {
      fail("unpacked differs from packed: " + describe(c_));
    }
  }

  const Case& c_;
  int64_t k_;
  int32_t shift_;
  IntWeights w_{};
  ActivationSpec spec_{};
  std::vector<Span> spans_;
  std::vector<uint8_t> codes_;
  std::vector<float> scale_, zero_;
  Guarded<uint8_t>* panels_ = nullptr;
  Guarded<float> bias_;
};

// Both kernels on buffers that hold exactly what the layout says.
void run_kernels(const Case& c, const Layer& layer, const uint8_t* x, uint8_t* y, int64_t x_stride, int64_t y_stride,
                 const std::vector<int32_t>& stored) {
  const IntWeights& w = layer.weights();
  const int64_t rows = has_one_span(w) ? kernels().single_rows : kernels().grouped_rows;
  const int64_t tiles = ceil_div(c.m, rows);
  Guarded<uint8_t> bytes(c.m * 4 * w.steps, c.edge, 0x5a);
  Guarded<int32_t> sums(c.m * w.spans, c.edge);
  Guarded<float> scales(c.m, c.edge);
  ActivationJob acts{};
  acts.x = x, acts.type = c.x_type, acts.m = c.m, acts.stride = x_stride, acts.spec = layer.spec(), acts.w = &w;
  acts.rows = rows, acts.row_bytes = 4 * w.steps, acts.bytes = bytes.data(), acts.sums = sums.data(), acts.scales = scales.data();
  acts.sum_factor = w.zeros == Zeros::constant ? -w.zero : 1;
  kernels().quantize_tiles(acts, 0, tiles);
  for (int64_t row = 0; row < c.m; ++row) {
    const int64_t tile = row / rows, height = rows_of_tile(c.m, rows, tile), r = row % rows;
    for (int32_t s = 0; s < w.spans; ++s) {
      const Span& span = w.span[s];
      const uint8_t* at = bytes.data() + tile * rows * 4 * w.steps + span.step * height * 4 + r * 4;
      for (int64_t f = 0; f < span.chunks * chunk_features(w.bits); ++f) {
        const int32_t meant = f < span.count ? stored[size_t(row * layer.k() + span.first + f)] : span.a_zero;
        if (at[f / 4 * height * 4 + f % 4] != uint8_t(meant)) {
          fail(std::string(kernels().name) + ": input " + std::to_string(f) + " of row " + std::to_string(row) + ": " +
               describe(c));
        }
      }
    }
  }
  const IntPanelJob job{&w, bytes.data(), sums.data(), scales.data(), c.m, rows, 4 * w.steps, 0, tiles, y, c.x_type,
                        y_stride};
  kernels().int_panels(job, 0, ceil_div(c.n, kPanel));
}

// The same on the matrix unit.
void run_matrix(const Case& c, const Layer& layer, const uint8_t* x, uint8_t* y, int64_t x_stride, int64_t y_stride) {
  const IntWeights& w = layer.weights();
  const int64_t tiles = ceil_div(c.m, kMatrixTile), rows = tiles * kMatrixTile, row_bytes = matrix_row_bytes(w);
  Guarded<uint8_t> bytes(rows * row_bytes, c.edge, 0x5a);
  Guarded<int32_t> sums(rows * w.spans, c.edge), partial(rows * kPanel, c.edge);
  Guarded<float> scales(c.m, c.edge), totals(rows * kPanel, c.edge);
  ActivationJob acts{};
  acts.x = x, acts.type = c.x_type, acts.m = c.m, acts.stride = x_stride, acts.spec = layer.spec(), acts.w = &w;
  acts.rows = kMatrixTile, acts.row_bytes = row_bytes, acts.bytes = bytes.data(), acts.sums = sums.data();
  acts.scales = scales.data(), acts.sum_factor = w.zeros == Zeros::constant ? -w.zero : 1;
  kernels().quantize_matrix(acts, 0, tiles);
  IntPanelJob job{&w, bytes.data(), sums.data(), scales.data(), c.m, kMatrixTile, row_bytes, 0, tiles, y, c.x_type,
                  y_stride};
  job.totals = totals.data(), job.partial = partial.data();
  kernels().int_matrix(job, 0, ceil_div(c.n, kPanel));
}

// Row r of the outputs, of inputs that were stored so.
void check_row(const Case& c, const Layer& layer, const int32_t* stored, float scale, int64_t r,
               Guarded<uint8_t>& y, int64_t y_stride) {
  const int64_t size = int64_t(size_of(c.x_type));
  for (int64_t i = 0; i < y_stride && r * y_stride + i < int64_t(y.size()) / size; ++i) {
    const uint8_t* at = y.data() + (r * y_stride + i) * size;
    if (i >= c.n) {
      for (int64_t b = 0; b < size; ++b) {
        if (at[b] != 0x77) fail("written between rows: " + describe(c));
      }
      continue;
    }
    const double found = load(at, c.x_type);
    double bound, meant = layer.output(stored, scale, i, &bound);
    if (std::isnan(meant) && std::isnan(found)) continue;
    if (c.x_type != DType::f32) bound += std::fabs(meant) * (c.x_type == DType::bf16 ? 1. / 256 : 1. / 2048) + 1e-7;
    if (c.x_type == DType::f16 && std::fabs(meant) + bound >= 65504) continue;  // may round to Inf
    if (!(std::fabs(found - meant) <= bound)) {
      fail(std::string(kernels().name) + ": y[" + std::to_string(r) + "][" + std::to_string(i) + "] = " +
           std::to_string(found) + ", not " + std::to_string(meant) + ": " + describe(c));
    }
  }
}

void check_case(const Case& c, uint64_t seed, const std::vector<const Kernels*>& levels) {
  Random random(seed);
  const Layer layer(c, random);
  const int64_t k = layer.k(), size = int64_t(size_of(c.x_type)), x_stride = k + c.gap, y_stride = c.n + c.gap;
  auto elements = [&](int64_t width, int64_t stride) { return c.m == 0 ? 0 : ((c.m - 1) * stride + width) * size; };
  Guarded<uint8_t> x(elements(k, x_stride), c.edge);
  std::vector<float> row(static_cast<size_t>(k));
  std::vector<int32_t> stored(static_cast<size_t>(c.m * k));
  std::vector<float> scales(static_cast<size_t>(c.m));
  for (int64_t r = 0; r < c.m; ++r) {
    const bool broken = random.next() % 16 == 0, still = random.next() % 16 == 0;
    for (int64_t i = 0; i < k; ++i) {
      float value = still ? 0.f : random.real() * 3;
      if (broken && random.next() % 3 == 0) value = random.one_of({NAN, INFINITY, -INFINITY});
      store(x.data() + (r * x_stride + i) * size, c.x_type, value);
      row[size_t(i)] = load(x.data() + (r * x_stride + i) * size, c.x_type);
    }
    scales[size_t(r)] = layer.quantize(row.data(), stored.data() + r * k);
  }
  const IntWeights* weights[] = {&layer.weights(), &layer.weights()};
  for (const Kernels* level : levels) {
    use_kernels(level->name);
    Guarded<uint8_t> y(elements(c.n, y_stride), c.edge, 0x77), first(elements(c.n, y_stride), c.edge, 0x77),
        second(elements(c.n, y_stride), c.edge, 0x77);
    if (c.m > 0) run_kernels(c, layer, x.data(), y.data(), x_stride, y_stride, stored);
    void* outputs[] = {first.data(), second.data()};
    const int64_t strides[] = {y_stride, y_stride};
    int_linear({x.data(), c.x_type, c.m, x_stride, layer.spec(), 2, weights, outputs, strides, c.x_type}, c.threads);
    Guarded<uint8_t> z(elements(c.n, y_stride), c.edge, 0x77);  // of the matrix unit
    const bool unit = level->int_matrix && fits_matrix(layer.weights());
    if (c.m > 0 && unit) run_matrix(c, layer, x.data(), z.data(), x_stride, y_stride);
    auto& used = uses_matrix(*level, layer.weights(), c.m) ? z : y;
    if (c.m > 0 &&
        (std::memcmp(used.data(), first.data(), y.size()) || std::memcmp(used.data(), second.data(), y.size()))) {
      fail(std::string(level->name) + ": threads or fused weights change bytes: " + describe(c));
    }
    for (int64_t i = 0; i < (unit ? 2 : 1) * c.m; ++i) {
      check_row(c, layer, stored.data() + i % c.m * k, scales[size_t(i % c.m)], i % c.m, i < c.m ? y : z, y_stride);
    }
  }
}

Case draw(Random& random, int64_t n, int64_t m, const std::vector<int32_t>& lengths) {
  Case c{};
  c.n = n, c.m = m, c.lengths = lengths;
  c.bits = random.one_of({2, 3, 4, 8});
  c.x_type = random.one_of({DType::f32, DType::bf16, DType::f16});
  c.scale_type = random.one_of({DType::f32, DType::bf16, DType::f16});
  c.zeros = random.one_of({Zeros::constant, Zeros::codes, Zeros::real, Zeros::minima});
  c.fixed = random.next() % 3 == 0;
  c.low = -127, c.high = 127;
  if (c.fixed) {
    const uint64_t range = random.next() % 3;
    c.low = range == 0 ? -128 : range == 1 ? 0 : -8, c.high = range == 0 ? 127 : range == 1 ? 255 : 7;
  }
  c.bias = random.next() % 2, c.gap = random.within(0, 3), c.threads = int(random.within(1, 3));
  c.edge = random.one_of({Edge::end, Edge::end, Edge::start});
  return c;
}

}  // namespace

void check_int_linear(const std::vector<const Kernels*>& levels, uint64_t seed, int64_t rounds) {
  Random random(seed);
  for (int64_t m = 0; m <= 17; ++m) {
    for (const int64_t n : {1, 16, 31, 33, 64, 65}) {
      check_case(draw(random, n, m, {int32_t(random.within(1, 70))}), random.next(), levels);
      const std::vector<int32_t> lengths = {int32_t(random.within(1, 40)), int32_t(random.within(1, 70)), 64};
      check_case(draw(random, n, m, lengths), random.next(), levels);
    }
  }
  check_case(draw(random, 33, 512, {65}), random.next(), levels);
  check_case(draw(random, 17, 512, {32, 32}), random.next(), levels);
  check_case(draw(random, 5, 3, {4096}), random.next(), levels);
  for (int64_t i = 0; i < rounds; ++i) {
    std::vector<int32_t> lengths;
    for (int64_t s = random.within(1, 5); s > 0; --s) lengths.push_back(int32_t(random.within(1, 150)));
    check_case(draw(random, random.within(1, 100), random.within(0, 40), lengths), random.next(), levels);
  }
}
