// Decoder blocks and stacks in guarded memory: every level beside the plain one, and the same bytes for all threads.
#include "decoder/stack.h"
#include "kernels.h"
#include "numbers.h"

using namespace bitgrain;

namespace {

// Integer weights [n, k] whose products are of about the size of their inputs.
class Linear {
 public:
  Linear(int64_t n, int64_t k, int bits, Edge edge, Random& random) {
    const int32_t lengths[] = {int32_t(k)};
    w_.n = n, w_.k = k, w_.bits = bits, w_.scale_type = DType::f32, w_.zeros = Zeros::constant;
    w_.zero = bits == 8 ? 0 : 1 << (bits - 1);
    w_.sums = bits == 8;
    panels_ = new Guarded<uint8_t>(lay_out(w_, lengths, 1, &span_), edge);
    spec_ = {0, 127.f, -127, 127, bits == 8 ? 128 : 0};
    span_.a_scale = 1.f, span_.a_zero = spec_.shift;
    std::vector<uint8_t> codes;
    for (int64_t i = 0; i < n * k; ++i) codes.push_back(uint8_t(random.next() & ((1u << bits) - 1)));
    const std::vector<float> scales(size_t(n), 2.f / (float(1 << bits) * std::sqrt(float(k))));
    const std::vector<float> zeros(size_t(n), float(w_.zero));
    pack_panels(w_, codes.data(), scales.data(), zeros.data(), panels_->data(), 0, ceil_div(n, kPanel));
    w_.panels = panels_->data();
  }
  Linear(const Linear&) = delete;
  ~Linear() { delete panels_; }
  const IntWeights* weights() const { return &w_; }
  const ActivationSpec& spec() const { return spec_; }

 private:
  IntWeights w_{};
  Span span_{};
  ActivationSpec spec_{};
  Guarded<uint8_t>* panels_;
};

using Members = std::vector<const IntWeights*>;

struct Block {
  Block(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t size, int64_t width, bool joined, bool gated,
        Edge edge, Random& random)
      : q((joined ? heads + 2 * kv_heads : heads) * size, hidden, 4, edge, random),
        k(kv_heads * size, hidden, 4, edge, random),
        v(kv_heads * size, hidden, 4, edge, random), o(hidden, heads * size, 8, edge, random),
        gate(width, hidden, 8, edge, random), up(width, hidden, 8, edge, random), down(hidden, width, 4, edge, random),
        qkv(joined ? Members{q.weights()} : Members{q.weights(), k.weights(), v.weights()}, q.spec()),
        o_products({o.weights()}, o.spec()),
        gate_up(gated ? Members{gate.weights(), up.weights()} : Members{gate.weights()}, gate.spec()),
        down_products({down.weights()}, down.spec()), weight(hidden, edge), head_weight(size, edge) {
    for (int64_t i = 0; i < hidden; ++i) weight[i] = 1 + random.real() / 4;
    for (int64_t i = 0; i < size; ++i) head_weight[i] = 1 + random.real() / 4;
    const Norm norm{hidden, weight.data(), nullptr, 1e-5f, int32_t(random.next() % 2)};
    const Norm head{size, head_weight.data(), nullptr, 1e-5f, 0};
    const bool normed = random.next() % 2;
    attention = {norm, &qkv, (heads + 2 * kv_heads) * size, {0, heads * size, (heads + kv_heads) * size}, joined, heads,
                 kv_heads, size, {normed, normed}, {head, head}, random.one_of({Rotary::none, Rotary::half}),
                 1.f / std::sqrt(float(size)), &o_products};
    mlp = {norm, &gate_up, width, 0, gated ? width : -1, gated ? 2 * width : width, 0, Act::silu, &down_products};
  }

  Linear q, k, v, o, gate, up, down;
  IntProducts qkv, o_products, gate_up, down_products;
  Guarded<float> weight, head_weight;
  AttentionStage attention{};
  MlpStage mlp{};
};

void check_case(Random& random, const std::vector<const Kernels*>& levels) {
  const int64_t kv_heads = random.within(1, 2), heads = kv_heads * random.within(1, 3), size = 2 * random.within(1, 20);
  const int64_t hidden = random.within(1, 90), width = random.within(1, 120);
  const int64_t batch = random.within(1, 2), tokens = random.within(1, 10);
  const int64_t past = random.within(0, 90), all = past + tokens, gap = random.within(0, 5);
  const Edge edge = any_edge(random);
  const DType type = any_float_type(random);
  const std::string shape = "decoder, hidden " + std::to_string(hidden) + ", heads " + std::to_string(heads) + " of " +
                            std::to_string(size) + ", batch " + std::to_string(batch) + ", tokens " +
                            std::to_string(tokens) + " behind " + std::to_string(past);
  const bool joined = random.next() % 2, gated = random.next() % 2, with_mlp = random.next() % 4;
  Block one(hidden, heads, kv_heads, size, width, joined, gated, edge, random);
  Block two(hidden, heads, kv_heads, size, width, joined, gated, edge, random);
  const std::vector<StackBlock> blocks = {{&one.attention, with_mlp ? &one.mlp : nullptr}, {&two.attention, &two.mlp}};
  const int64_t turned = size, m = batch * tokens;
  const int64_t head_elements = all * size + gap, room = batch * kv_heads * head_elements - gap;
  Numbers x(m * hidden, type, edge), cos(m * turned, type, edge), sin(m * turned, type, edge), old(room, type, edge);
  x.fill(random), cos.fill(random), sin.fill(random), old.fill(random);
  Guarded<uint8_t> seen(m * all, edge, 1);
  for (int64_t i = 0; i < m * all; ++i) seen[i] = i % all == 0 || random.next() % 2;
  const Mask mask = random.next() % 2 ? Mask{} : Mask{MaskKind::seen, seen.data(), {tokens * all, 0, all}};

  std::vector<float> plain;
  for (size_t l = levels.size(); l-- > 0;) {  // the plain level, which is the last, first
    use_kernels(levels[l]->name);
    const std::string what = std::string(levels[l]->name) + ": " + shape;
    std::vector<uint8_t> bytes;
    for (const int threads : {1, 3}) {
      Numbers keys(room, type, edge), values(room, type, edge), y(m * hidden, type, edge);
      Numbers more_keys(room, type, edge), more_values(room, type, edge);
      for (Numbers* one : {&keys, &values, &more_keys, &more_values}) std::memcpy(one->data(), old.data(), old.size());
      auto cache = [&](Numbers& k, Numbers& v) {
        return KeysValues{all, k.data(), v.data(), {kv_heads * head_elements, head_elements},
                          {kv_heads * head_elements, head_elements}, nullptr, nullptr, 0};
      };
      run_stack(blocks, x.data(), type, batch, tokens, {cos.data(), sin.data(), type, m, turned},
                {cache(keys, values), cache(more_keys, more_values)},
                mask, y.data(), threads);
      for (int64_t i = 0; i < room; ++i) {
        const bool written = i % head_elements / size >= past && i % head_elements < all * size;
        if (!written && (keys[i] != old[i] || more_values[i] != old[i])) fail(what + ": the past was written");
      }
      if (threads == 1) bytes.assign(y.bytes(), y.bytes() + y.size());
      else if (std::memcmp(bytes.data(), y.bytes(), y.size()) != 0) fail(what + ": threads change bytes");
      double most = 0;
      for (int64_t i = 0; i < y.count(); ++i) {
        if (!std::isfinite(y[i])) fail(what + ": not finite");
        if (plain.size() < size_t(y.count())) plain.push_back(y[i]);
        most = std::fmax(most, std::fabs(plain[size_t(i)]));
      }
      // a last bit of a norm may take an input of the next product to another code
      for (int64_t i = 0; i < y.count(); ++i) check_near(y[i], plain[size_t(i)], 0.05 * (most + 1), what);
    }
  }
}

}  // namespace

void check_decoder(const std::vector<const Kernels*>& levels, uint64_t seed, int64_t rounds) {
  Random random(seed);
  for (int64_t i = 0; i < 12 + rounds / 2; ++i) check_case(random, levels);
}
