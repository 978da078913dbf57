// FP8 weights and inputs rounded to FP8: every level against plain scalars, to the bit, in memory with guarded ends.
#include <cmath>
#include <cstring>
#include <vector>

#include "checks.h"
#include "floats.h"
#include "guarded.h"
#include "kernels.h"
#include "linear/code_linear.h"

using namespace bitgrain;

namespace {

float number(CodeKind kind, int code) {
  return kind == CodeKind::e5m2 ? from_e5m2(uint8_t(code)) : from_e4m3(uint8_t(code));
}

// The nearest number of a format, by trying all; the even code where two are as near.
float nearest(CodeKind kind, float x, float largest) {
  const double size = std::fabs(x) < largest ? std::fabs(x) : largest;
  int best = 0;
  for (int code = 1; std::isfinite(number(kind, code)) && code < 128; ++code) {
    const double now = std::fabs(number(kind, code) - size), before = std::fabs(number(kind, best) - size);
    if (now < before || (now == before && code % 2 == 0)) best = code;
  }
  return std::copysign(number(kind, best), x);
}

class Weight {
 public:
  Weight(CodeKind kind, int64_t n, int64_t k, int64_t group, const std::vector<uint8_t>& codes, Edge edge) {
    w.n = n, w.k = k, w.group = group, w.bits = 8, w.kind = kind, w.scale_type = DType::f32, w.outer = 1.f;
    set_table(w, nullptr, 0);
    panels_ = new Guarded<uint8_t>(lay_out(w), edge, 0xa5);
    const std::vector<float> ones(size_t(n * w.spans), 1.f);
    const int64_t panels = ceil_div(n, kPanel);
    pack_panels(w, codes.data(), ones.data(), nullptr, panels_->data(), 0, panels);
    w.panels = panels_->data();
    std::vector<uint8_t> again(codes.size());
    unpack_panels(w, again.data(), nullptr, nullptr, 0, panels);
    if (again != codes) fail("FP8 codes: unpacked differs from packed");
  }
  Weight(const Weight&) = delete;
  ~Weight() { delete panels_; }

  void run(const float* x, int64_t m, float* y) const {
    const CodeWeights* weights[] = {&w};
    void* to[] = {y};
    code_linear({x, DType::f32, m, w.k, 1, weights, to, &w.n, DType::f32}, 2);
  }

  CodeWeights w{};

 private:
  Guarded<uint8_t>* panels_ = nullptr;
};

void expect(float found, float meant, const char* level, const std::string& what) {
  if (std::isnan(meant) ? !std::isnan(found) : found != meant) {
    fail(std::string(level) + ": " + what + " gives " + std::to_string(found) + ", not " + std::to_string(meant));
  }
}

void check_codes(const char* level, CodeKind kind, int64_t m, Edge edge) {
  std::vector<uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) codes[size_t(i)] = uint8_t(i);
  const Weight weight(kind, 256, 1, 1, codes, edge);
  Guarded<float> x(m, edge), y(256 * m, edge);
  for (int64_t r = 0; r < m; ++r) x[r] = 1.f;
  weight.run(x.data(), m, y.data());
  for (int64_t i = 0; i < 256 * m; ++i) {
    expect(y[i], number(kind, int(i % 256)), level, "code " + std::to_string(i % 256));
  }
}

// W = I: what comes out are the inputs, as they were rounded.
void check_inputs(const char* level, CodeKind kind, int64_t m, Edge edge, Random& random) {
  constexpr int64_t kSize = 45, kGroup = 16;
  std::vector<uint8_t> codes(kSize * kSize);
  for (int64_t i = 0; i < kSize; ++i) codes[size_t(i * kSize + i)] = kind == CodeKind::e5m2 ? 0x3c : 0x38;
  Weight weight(kind, kSize, kSize, kGroup, codes, edge);
  const bool wide = kind == CodeKind::e5m2;
  const float largest = wide ? 57344.f : 448.f, overflow = wide ? 61440.f : 464.f;
  weight.w.inputs = {InputScale::plain, wide ? 2 : 3, wide ? 0x1p-14f : 0x1p-6f, largest, overflow, 1.f, true};
  Guarded<float> x(kSize * m, edge), y(kSize * m, edge);
  for (int64_t i = 0; i < kSize * m; ++i) x[i] = std::ldexp(random.real(), int(random.within(-30, 4)));
  weight.run(x.data(), m, y.data());
  for (int64_t i = 0; i < kSize * m; ++i) {
    const int64_t row = i / kSize * kSize, first = row + i % kSize / kGroup * kGroup;
    float most = 0;
    for (int64_t j = first; j < first + kGroup && j < row + kSize; ++j) most = std::fmax(most, std::fabs(x[j]));
    const float step = most / largest;
    expect(y[i], nearest(kind, x[i] / step, largest) * step, level, "input " + std::to_string(x[i] / step));
  }
}

}  // namespace

void check_float8(const std::vector<const Kernels*>& levels, uint64_t seed) {
  Random random(seed);
  for (const Kernels* level : levels) {
    use_kernels(level->name);
    for (const CodeKind kind : {CodeKind::e4m3, CodeKind::e5m2}) {
      for (const int64_t m : {1, 2, 5, 13, 60}) {
        check_codes(level->name, kind, m, m % 2 ? Edge::end : Edge::start);
        check_inputs(level->name, kind, m, m % 2 ? Edge::end : Edge::start, random);
      }
    }
  }
}
