// Products with weights that are looked up: every level against plain scalars, in memory whose ends are guarded.
#include "linear/code_linear.h"

#include "kernels.h"
#include "numbers.h"

using namespace bitgrain;

namespace {

struct Case {
  int bits;
  int64_t n, k, group, m;
  DType x_type, scale_type;
  Zeros zeros;
  bool bias;
  int64_t gap;  // elements between rows
  int threads;
  Edge edge;
};

std::string describe(const Case& c) {
  return "code_linear, bits " + std::to_string(c.bits) + ", m " + std::to_string(c.m) + ", n " + std::to_string(c.n) +
         ", k " + std::to_string(c.k) + ", group " + std::to_string(c.group) + ", x " + std::to_string(int(c.x_type)) +
         ", scales " + std::to_string(int(c.scale_type)) + ", zeros " + std::to_string(int(c.zeros)) + ", gap " +
         std::to_string(c.gap) + ", threads " + std::to_string(c.threads) + (c.edge == Edge::end ? ", end" : ", start");
}

float scale_at(const uint8_t* scales, DType type, int64_t i) {
  if (type == DType::e8m0) return from_e8m0(scales[i]);
  return type == DType::e4m3 ? from_e4m3(scales[i]) : load_number(scales, type, i);
}

float stored_as(float value, DType type) {
  uint8_t bytes[4];
  store_number(bytes, type, 0, value);
  return load_number(bytes, type, 0);
}

class Layer {
 public:
  Layer(const Case& c, Random& random)
      : c_(c), groups_(ceil_div(c.k, c.group)), codes_(c.n * c.k, c.edge),
        scales_(c.n * groups_ * int64_t(size_of(c.scale_type)), c.edge), zeros_(c.n * groups_, c.edge),
        bias_(c.n, c.edge), table_(16) {
    w_.n = c.n, w_.k = c.k, w_.group = c.group, w_.bits = c.bits, w_.scale_type = c.scale_type, w_.zeros = c.zeros;
    w_.kind = c.bits == 8 ? CodeKind::integers : CodeKind::table;
    w_.outer = random.one_of({1.f, 0.25f});
    w_.zero = c.zeros == Zeros::minima ? random.one_of({0.f, -16.f, -128.f}) : 0.f;
    for (float& entry : table_) entry = random.real() * 4;
    const int64_t entries = random.within(2, int64_t{1} << (c.bits < 4 ? c.bits : 4));
    if (c.bits < 8) set_table(w_, table_.data(), entries);
    for (int64_t i = 0; i < c.n * c.k; ++i) codes_[i] = uint8_t(random.within(0, c.bits == 8 ? 255 : entries - 1));
    for (int64_t i = 0; i < c.n * groups_; ++i) {
      const int64_t byte = c.scale_type == DType::e8m0 ? random.within(120, 130) : random.within(1, 0x7e);
      if (size_of(c.scale_type) == 1) scales_[i] = uint8_t(byte);
      else store_number(scales_.data(), c.scale_type, i, 0.1f + std::fabs(random.real()));
      zeros_[i] = c.zeros == Zeros::codes ? float(random.within(0, 15)) : random.real() * 4;
      if (c.zeros == Zeros::minima) zeros_[i] = stored_as(zeros_[i], c.scale_type);
    }
    for (int64_t i = 0; i < c.n; ++i) bias_[i] = random.real();
    panels_ = new Guarded<uint8_t>(lay_out(w_), c.edge, 0xa5);
    pack_panels(w_, codes_.data(), scales_.data(), zeros_.data(), panels_->data(), 0, ceil_div(c.n, kPanel));
    w_.panels = panels_->data(), w_.bias = c.bias ? bias_.data() : nullptr;
    check_unpack();
    check_rows(random);
  }
  Layer(const Layer&) = delete;
  ~Layer() { delete panels_; }

  const CodeWeights& weights() const { return w_; }

  // One output of a row x [k]; and what its error may be. rounded: inputs and tables are rounded to bfloat16.
  double output(const std::vector<float>& x, int64_t column, bool rounded, double* bound) {
    double y = 0, size = 0;
    for (int64_t i = 0; i < c_.k; ++i) {
      const int64_t index = column * groups_ + i / c_.group;
      const uint8_t code = codes_[column * c_.k + i];
      double number = int8_t(code), most = rounded ? 512 : std::fabs(number);  // in two parts, the larger of them
      if (c_.bits < 8) {
        number = rounded ? from_bf16(to_bf16(table_[code])) : table_[code];
        most = std::fabs(number);
      }
      const double scale = double(scale_at(scales_.data(), c_.scale_type, index)) * w_.outer;
      const bool minima = c_.zeros == Zeros::minima;
      const double zero = c_.zeros == Zeros::constant ? 0. : minima ? w_.zero : zeros_[index];
      const double minimum = minima ? double(zeros_[index]) * w_.outer : 0.;
      const double value = rounded ? from_bf16(to_bf16(x[size_t(i)])) : x[size_t(i)];
      y += value * ((number - zero) * scale - minimum);
      size += std::fabs(value) * ((most + std::fabs(zero)) * scale + std::fabs(minimum));
    }
    *bound = double(c_.group + groups_ + 8) * std::ldexp(size, -23);
    return y + (c_.bias ? bias_[column] : 0.f);
  }

 private:
  void check_unpack() {
    Guarded<uint8_t> codes(c_.n * c_.k, c_.edge), scales(int64_t(scales_.size()), c_.edge);
    Guarded<float> zeros(c_.n * groups_, c_.edge);
    unpack_panels(w_, codes.data(), scales.data(), zeros.data(), 0, ceil_div(c_.n, kPanel));
    if (std::memcmp(codes.data(), codes_.data(), codes.size()) ||
        std::memcmp(scales.data(), scales_.data(), scales.size()) ||
        (c_.zeros != Zeros::constant && std::memcmp(zeros.data(), zeros_.data(), zeros.size()))) {
      fail("unpacked differs from packed: " + describe(c_));
    }
  }

  // Rows as an embedding looks them up: each step rounded to float32.
  void check_rows(Random& random) {
    const int64_t count = random.within(0, 9);
    Guarded<int64_t> ids(count, c_.edge);
    for (int64_t i = 0; i < count; ++i) ids[i] = random.within(0, c_.n - 1);
    Numbers y(count * c_.k, any_float_type(random), c_.edge), meant(c_.k, y.type(), c_.edge);
    if (gather_rows(w_, ids.data(), count, y.data(), y.type(), int(random.within(1, 3))) != -1) {
      fail("rows: an id is none: " + describe(c_));
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < c_.k; ++i) {
        const int64_t at = ids[r] * groups_ + i / c_.group;
        const uint8_t code = codes_[ids[r] * c_.k + i];
        const float number = c_.bits == 8 ? float(int8_t(code)) : w_.table[code];
        const bool minima = c_.zeros == Zeros::minima;
        const float zero = c_.zeros == Zeros::constant ? 0.f : minima ? w_.zero : zeros_[at];
        const float scaled = (number - zero) * (load_any(scales_.data(), c_.scale_type, at) * w_.outer);
        meant.set(i, minima ? scaled - zeros_[at] * w_.outer : scaled);
      }
      if (std::memcmp(meant.data(), y.bytes() + r * int64_t(meant.size()), meant.size()) != 0) {
        fail("rows out of panels: " + describe(c_));
      }
    }
    if (count > 0) {
      ids[count - 1] = random.one_of<int64_t>({-1, c_.n});
      if (gather_rows(w_, ids.data(), count, y.data(), y.type(), 1) != count - 1) fail("rows: a wrong id is not told");
    }
  }

  const Case& c_;
  int64_t groups_;
  CodeWeights w_{};
  Guarded<uint8_t> codes_, scales_;
  Guarded<float> zeros_, bias_;
  std::vector<float> table_;
  Guarded<uint8_t>* panels_ = nullptr;
};

// Both kernels on buffers that hold exactly what the layout says. unpacked: a panel is looked up once for all rows.
void run_kernels(const Case& c, const CodeWeights& w, Numbers& x, Numbers& y, bool unpacked) {
  const Kernels& kernel = kernels();
  const int64_t rows = unpacked ? kernel.single_rows : kernel.grouped_rows, tiles = ceil_div(c.m, rows);
  Guarded<uint8_t> inputs(c.m * w.steps * 2 * kernel.input_bytes, c.edge, 0x5a);
  Guarded<float> sums(c.m * w.spans, c.edge), totals(c.m * kPanel, c.edge);
  const bool zeros = w.zeros != Zeros::constant;
  InputJob job{};
  job.x = x.data(), job.type = c.x_type, job.m = c.m, job.stride = c.k + c.gap, job.w = &w, job.rows = rows;
  job.row_bytes = w.steps * 2 * kernel.input_bytes, job.tiles = inputs.data(), job.sums = zeros ? sums.data() : nullptr;
  kernel.arrange_inputs(job, 0, tiles);
  kernel.code_panels({&w, inputs.data(), zeros ? sums.data() : nullptr, nullptr, c.m, rows, job.row_bytes, 0, tiles,
                      unpacked ? totals.data() : nullptr, y.data(), c.x_type, c.n + c.gap},
                     0, ceil_div(c.n, kPanel));
}

// The same on the matrix unit.
void run_matrix(const Case& c, const CodeWeights& w, Numbers& x, Numbers& y) {
  const Kernels& kernel = kernels();
  const int64_t tiles = ceil_div(c.m, kMatrixTile), rows = tiles * kMatrixTile;
  Guarded<uint8_t> inputs(rows * matrix_row_bytes(w), c.edge, 0x5a);
  Guarded<float> sums(rows * w.spans, c.edge), totals(rows * kPanel, c.edge);
  const bool zeros = w.zeros != Zeros::constant;
  InputJob job{};
  job.x = x.data(), job.type = c.x_type, job.m = c.m, job.stride = c.k + c.gap, job.w = &w, job.rows = kMatrixTile;
  job.row_bytes = matrix_row_bytes(w), job.tiles = inputs.data(), job.sums = zeros ? sums.data() : nullptr;
  kernel.arrange_matrix(job, 0, tiles);
  kernel.code_matrix({&w, inputs.data(), job.sums, nullptr, c.m, kMatrixTile, job.row_bytes, 0, tiles, totals.data(),
                      y.data(), c.x_type, c.n + c.gap},
                     0, ceil_div(c.n, kPanel));
}

// rounded: inputs and table were rounded to bfloat16.
void check_output(const Case& c, Layer& layer, Numbers& x, Numbers& y, bool rounded, const std::string& what) {
  const int64_t size = int64_t(size_of(c.x_type)), stride = c.n + c.gap;
  std::vector<float> row(static_cast<size_t>(c.k));
  for (int64_t r = 0; r < c.m; ++r) {
    for (int64_t i = 0; i < c.k; ++i) row[size_t(i)] = x[r * (c.k + c.gap) + i];
    for (int64_t i = 0; i < c.n; ++i) {
      double bound, meant = layer.output(row, i, rounded, &bound);
      check_near(y[r * stride + i], meant, bound + rounding(meant, c.x_type), what);
    }
    if (r + 1 < c.m) check_untouched(y.bytes() + (r * stride + c.n) * size, c.gap * size, 0x77, what);
  }
}

void check_case(const Case& c, Random& random, const std::vector<const Kernels*>& levels) {
  Layer layer(c, random);
  auto elements = [&](int64_t width) { return c.m == 0 ? 0 : (c.m - 1) * (width + c.gap) + width; };
  Numbers x(elements(c.k), c.x_type, c.edge);
  x.fill(random);
  const CodeWeights* weights[] = {&layer.weights(), &layer.weights()};
  for (const Kernels* level : levels) {
    use_kernels(level->name);
    const std::string what = std::string(level->name) + ": " + describe(c);
    Numbers first(elements(c.n), c.x_type, c.edge, 0x77), second(elements(c.n), c.x_type, c.edge, 0x77);
    Numbers alone(elements(c.n), c.x_type, c.edge, 0x77);
    void* both[] = {first.data(), second.data()};
    void* one[] = {alone.data()};
    const int64_t strides[] = {c.n + c.gap, c.n + c.gap};
    code_linear({x.data(), c.x_type, c.m, c.k + c.gap, 2, weights, both, strides, c.x_type}, c.threads);
    code_linear({x.data(), c.x_type, c.m, c.k + c.gap, 1, weights, one, strides, c.x_type}, 1);
    if (c.m == 0) continue;
    const bool narrow = level->input_bytes == 2;
    check_output(c, layer, x, alone, narrow || uses_matrix(*level, layer.weights(), c.m), what);
    if (std::memcmp(alone.bytes(), first.bytes(), first.size()) ||
        std::memcmp(alone.bytes(), second.bytes(), second.size())) {
      fail(what + ": threads or fused weights change bytes");
    }
    for (const bool unpacked : {false, true}) {
      Numbers y(elements(c.n), c.x_type, c.edge, 0x77);
      run_kernels(c, layer.weights(), x, y, unpacked);
      check_output(c, layer, x, y, narrow, what + (unpacked ? ", unpacked" : ", from panels"));
    }
    if (!level->code_matrix) continue;
    Numbers y(elements(c.n), c.x_type, c.edge, 0x77);
    run_matrix(c, layer.weights(), x, y);
    check_output(c, layer, x, y, true, what + ", on the matrix unit");
  }
}

Case draw(Random& random, int bits, int64_t n, int64_t m) {
  Case c{};
  c.bits = bits, c.n = n, c.m = m, c.k = random.within(1, 200);
  c.group = random.within(1, 3) == 1 ? c.k : random.within(1, 130);
  c.x_type = any_float_type(random);
  c.scale_type = random.one_of({DType::f32, DType::bf16, DType::f16, DType::e8m0, DType::e4m3});
  c.zeros = random.one_of({Zeros::constant, Zeros::codes, Zeros::real, Zeros::minima});
  if (c.zeros == Zeros::minima) c.scale_type = random.one_of({DType::f32, DType::bf16, DType::f16});
  if (c.x_type == DType::f16 && c.scale_type == DType::e4m3) c.scale_type = DType::f16;  // sums stay below 65504
  c.bias = random.next() % 2, c.gap = random.within(0, 3);
  c.threads = int(random.within(1, 3)), c.edge = any_edge(random);
  return c;
}

}  // namespace

void check_code_linear(const std::vector<const Kernels*>& levels, uint64_t seed, int64_t rounds) {
  Random random(seed);
  for (const int bits : {2, 3, 4, 8}) {
    for (int64_t m = 0; m <= 17; ++m) {
      check_case(draw(random, bits, random.one_of<int64_t>({1, 16, 31, 33, 65}), m), random, levels);
    }
    check_case(draw(random, bits, 33, random.within(49, 130)), random, levels);  // where panels are unpacked once
  }
  for (int64_t i = 0; i < rounds; ++i) {
    const int bits = random.one_of({2, 3, 4, 8});
    check_case(draw(random, bits, random.within(1, 100), random.within(0, 30)), random, levels);
  }
}
