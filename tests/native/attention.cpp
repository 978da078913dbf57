// Attention over floats and over packed tokens, and many queries at once: every level against plain scalars.
#include "attention/decode.h"
#include "attention/prefill.h"
#include "kernels.h"
#include "numbers.h"

using namespace bitgrain;

namespace {

// One side of a packed past, and what it holds.
struct Side {
  Side(const PackedSide& shape, int64_t tiles, Edge edge)
      : codes(tiles * shape.pairs * tile_bytes(shape), edge, 0xa5), scales(tiles * shape.pairs * kBlock, edge),
        zeros(tiles * shape.pairs * kBlock, edge), side(shape) {
    side.codes = codes.data(), side.scales = scales.data(), side.zeros = zeros.data();
  }
  int64_t at(int64_t pair, int64_t token) const { return token / kBlock * side.pairs + pair; }
  int code(int64_t pair, int64_t token, int64_t channel) {  // as attention/packed.h has it
    const int64_t in_chunk = 32 / side.bits, t = token % kBlock;
    const int64_t lane = side.values ? channel % 16 : t % 16, f = side.values ? t % in_chunk : channel % in_chunk;
    const int64_t vector = side.values ? channel / 16 * (kBlock / in_chunk) + t / in_chunk
                                       : t / 16 * (side.size / in_chunk) + channel / in_chunk;
    const uint8_t byte = codes[at(pair, token) * tile_bytes(side) + vector * 64 + lane * 4 + f % 4];
    return byte >> f / 4 * side.bits & ((1 << side.bits) - 1);
  }
  float scale(int64_t pair, int64_t token) { return from_f16(scales[at(pair, token) * kBlock + token % kBlock]); }
  float zero(int64_t pair, int64_t token) { return from_f16(zeros[at(pair, token) * kBlock + token % kBlock]); }
  double number(int64_t pair, int64_t token, int64_t channel) {
    return (code(pair, token, channel) - double(zero(pair, token))) * scale(pair, token);
  }

  Guarded<uint8_t> codes;
  Guarded<uint16_t> scales, zeros;
  PackedSide side;
};

// Codes, scale and zero point of one token, as inl/kv_pack.inl.h promises them.
void check_token(Side& side, int64_t pair, int64_t token, const std::vector<float>& x, const std::string& what) {
  float low = 0, high = 0;
  for (const float v : x) low = -v > low ? -v : low, high = v > high ? v : high;
  const float most = float((1 << side.side.bits) - 1), ideal = (high + low) / most;
  float step = ideal == 0.f ? 1.f : from_f16(to_f16(ideal));
  if (step == 0.f) step = from_f16(1);
  const float zero = from_f16(to_f16(low / (ideal > 0.f ? ideal : 1.f) * (ideal > 0.f ? ideal / step : 1.f)));
  if (side.scale(pair, token) != step || side.zero(pair, token) != zero) fail(what + ": scale or zero point");
  for (size_t c = 0; c < x.size(); ++c) {
    float code = x[c] / step + zero;
    code = std::nearbyint(code < 0 ? 0 : code > most ? most : code);
    if (side.code(pair, token, int64_t(c)) != int(code)) fail(what + ": code of token " + std::to_string(token));
  }
}

// Random tokens into a side, through the level that runs; and out again.
void fill_side(Side& side, int64_t heads, int64_t first, int64_t tokens, Random& random, Edge edge,
               const std::string& what) {
  const int64_t size = side.side.size, gap = random.within(0, 3);
  const int64_t per_head = tokens * size + gap, count = side.side.pairs * per_head - gap;
  Numbers x(count, any_float_type(random), edge), back(count, x.type(), edge, 0x66);
  x.fill(random, random.one_of({1.f, 1e-6f, 1e3f}));
  StatesJob job{&side.side, x.data(), x.type(), heads, {heads * per_head, per_head, size}, first, tokens};
  const std::vector<uint8_t> before(side.codes.data(), side.codes.data() + side.codes.size());
  if (!pack_states(job, int(random.within(1, 3)))) fail(what + ": states are not packed");
  job.x = back.data();
  read_states(job, int(random.within(1, 3)));
  std::vector<float> row(static_cast<size_t>(size));
  for (int64_t pair = 0; pair < side.side.pairs; ++pair) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < size; ++c) {
        const int64_t at = pair * per_head + t * size + c;
        row[size_t(c)] = x[at];
        const int64_t token = first + t;
        Numbers meant(1, x.type(), edge);
        meant.set(0, (float(side.code(pair, token, c)) - side.zero(pair, token)) * side.scale(pair, token));
        if (back[at] != meant[0]) fail(what + ": states read differ");
      }
      check_token(side, pair, first + t, row, what);
    }
    const int64_t bytes = int64_t(size_of(x.type()));
    if (pair + 1 == side.side.pairs) continue;
    check_untouched(back.bytes() + (pair * per_head + tokens * size) * bytes, gap * bytes, 0x66, what);
  }
  // tokens before and behind keep their bits
  Side old(side.side, int64_t(side.codes.size()) / (side.side.pairs * tile_bytes(side.side)), edge);
  std::memcpy(old.codes.data(), before.data(), before.size());
  for (const int64_t token : {first - 1, first + tokens}) {
    if (token < 0 || token / kBlock != (token < first ? first : first + tokens - 1) / kBlock) continue;
    for (int64_t c = 0; c < size; ++c) {
      if (old.code(0, token, c) != side.code(0, token, c)) fail(what + ": a neighbouring token changed");
    }
  }
  if (tokens > 0) {
    x.set(random.within(0, tokens * size - 1), random.one_of({NAN, INFINITY}));
    job.x = x.data();
    Side other(side.side, int64_t(side.codes.size()) / (side.side.pairs * tile_bytes(side.side)), edge);
    job.side = &other.side;
    if (pack_states(job, 1)) fail(what + ": NaN is packed");
  }
}

struct Shape {
  int64_t batch, groups, shared, queries, k_size, v_size, packed, first, dense;
  int k_bits, v_bits;
  bool prefill;
  Edge edge;
};

std::string describe(const Shape& s) {
  return std::string(s.prefill ? "prefill" : "decode") + ", batch " + std::to_string(s.batch) + ", groups " +
         std::to_string(s.groups) + " of " + std::to_string(s.shared) + ", queries " + std::to_string(s.queries) +
         ", sizes " +
         std::to_string(s.k_size) + " " + std::to_string(s.v_size) + ", packed " + std::to_string(s.packed) + " from " +
         std::to_string(s.first) + " in " + std::to_string(s.k_bits) + " " + std::to_string(s.v_bits) +
         " bits, dense " +
         std::to_string(s.dense) + (s.edge == Edge::end ? ", end" : ", start");
}

void check_case(const Shape& s, Random& random, const std::vector<const Kernels*>& levels) {
  const int64_t heads = s.groups * s.shared, pairs = s.batch * s.groups, tokens = s.packed + s.dense;
  const int64_t tiles = ceil_div(s.first + s.packed, kBlock);
  const std::string shape = describe(s);
  Side k_side({s.k_size, s.k_bits, false, pairs, nullptr, nullptr, nullptr}, tiles, s.edge);
  Side v_side({s.v_size, s.v_bits, true, pairs, nullptr, nullptr, nullptr}, tiles, s.edge);
  if (s.packed) {
    use_kernels(levels[random.next() % levels.size()]->name);
    fill_side(k_side, s.groups, s.first, s.packed, random, s.edge, shape + ", keys");
    fill_side(v_side, s.groups, s.first, s.packed, random, s.edge, shape + ", values");
  }

  const DType type = any_float_type(random), past_type = s.prefill || random.next() % 2 ? type : any_float_type(random);
  const bool tokens_first = random.next() % 2;  // [batch, tokens, heads, size] in memory
  auto strides = [&](int64_t* stride, int64_t count, int64_t all_heads, int64_t size) {
    stride[0] = count * all_heads * size, stride[1] = tokens_first ? size : count * size;
    stride[2] = tokens_first ? all_heads * size : size;
  };
  AttentionJob job{};
  Numbers q(s.batch * heads * s.queries * s.k_size, type, s.edge);
  Numbers k(pairs * s.dense * s.k_size, past_type, s.edge), v(pairs * s.dense * s.v_size, past_type, s.edge);
  q.fill(random, 2.f), k.fill(random), v.fill(random);
  job.q = q.data(), job.q_type = type;
  strides(job.q_stride, s.queries, heads, s.k_size), strides(job.out_stride, s.queries, heads, s.v_size);
  job.batch = s.batch, job.heads = heads, job.groups = s.groups, job.queries = s.queries;
  job.k_size = s.k_size, job.v_size = s.v_size, job.scaling = 1.f / std::sqrt(float(s.k_size));
  job.causal = random.next() % 2;
  const int64_t window = s.prefill && job.causal && random.next() % 2 ? random.within(1, tokens) : 0;
  job.softcap = !s.prefill && random.next() % 3 == 0 ? 2.f : 0.f;
  Guarded<float> sinks(heads, s.edge);
  for (int64_t h = 0; h < heads; ++h) sinks[h] = random.real();
  job.sinks = !s.prefill && random.next() % 3 == 0 ? sinks.data() : nullptr;
  job.mask_kind = s.prefill ? MaskKind::none : random.one_of({MaskKind::none, MaskKind::seen, MaskKind::added});
  const bool shared_mask = random.next() % 2;  // by heads
  const int64_t mask_heads = shared_mask ? 1 : heads;
  job.mask_stride[0] = mask_heads * s.queries * tokens;
  job.mask_stride[1] = shared_mask ? 0 : s.queries * tokens, job.mask_stride[2] = tokens;
  const int64_t mask_count = s.batch * mask_heads * s.queries * tokens;
  Guarded<uint8_t> seen(job.mask_kind == MaskKind::seen ? mask_count : 0, s.edge);
  Guarded<float> added(job.mask_kind == MaskKind::added ? mask_count : 0, s.edge);
  for (int64_t i = 0; i < mask_count; ++i) {
    if (job.mask_kind == MaskKind::seen) seen[i] = random.next() % 4 != 0;
    if (job.mask_kind == MaskKind::added) added[i] = random.next() % 4 == 0 ? -INFINITY : random.real();
  }
  job.mask = job.mask_kind == MaskKind::seen ? (const void*)seen.data() : added.data();
  DenseTokens dense{s.dense, past_type, k.data(), v.data(), {}, {}};
  strides(dense.k_stride, s.dense, s.groups, s.k_size), strides(dense.v_stride, s.dense, s.groups, s.v_size);
  const PackedTokens past{s.first, s.packed, k_side.side, v_side.side};

  std::vector<double> meant(size_t(s.batch * heads * s.queries * s.v_size)), score(static_cast<size_t>(tokens));
  double q_most = 0, k_most = 0, v_most = 0;
  for (int64_t i = 0; i < q.count(); ++i) q_most = std::fmax(q_most, std::fabs(q[i]));
  auto element = [&](Numbers& x, const int64_t* stride, int64_t b, int64_t h, int64_t t, int64_t c) {
    return double(x[b * stride[0] + h * stride[1] + t * stride[2] + c]);
  };
  for (int64_t b = 0; b < s.batch; ++b) for (int64_t h = 0; h < heads; ++h) for (int64_t i = 0; i < s.queries; ++i) {
    const int64_t group = h / s.shared, pair = b * s.groups + group;
    double top = job.sinks ? sinks[h] : -INFINITY, total = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < s.k_size; ++c) {
        const double key = t < s.packed ? k_side.number(pair, s.first + t, c)
                                        : element(k, dense.k_stride, b, group, t - s.packed, c);
        sum += key * element(q, job.q_stride, b, h, i, c), size += std::fabs(key);
      }
      k_most = std::fmax(k_most, size);
      double x = sum * job.scaling;
      if (job.softcap != 0.f) x = std::tanh(x / job.softcap) * job.softcap;
      const int64_t at = b * job.mask_stride[0] + h * job.mask_stride[1] + i * job.mask_stride[2] + t;
      const int64_t last = tokens - s.queries + i;
      if (job.mask_kind == MaskKind::added) x += added[at];
      const bool unseen = job.mask_kind == MaskKind::seen && !seen[at];
      if (unseen || (job.causal && t > last) || (window && t <= last - window)) x = -INFINITY;
      score[size_t(t)] = x, top = std::fmax(top, x);
    }
    double* out = &meant[size_t(((b * heads + h) * s.queries + i) * s.v_size)];
    if (job.sinks) total += std::exp(sinks[h] - top);
    for (int64_t t = 0; t < tokens && top > -INFINITY; ++t) {
      const double weight = std::exp(score[size_t(t)] - top);
      total += weight;
      for (int64_t c = 0; c < s.v_size; ++c) {
        const double value = t < s.packed ? v_side.number(pair, s.first + t, c)
                                          : element(v, dense.v_stride, b, group, t - s.packed, c);
        out[c] += weight * value, v_most = std::fmax(v_most, std::fabs(value));
      }
    }
    for (int64_t c = 0; c < s.v_size && total > 0; ++c) out[c] /= total;
  }

  // queries and weights of packed tokens are rounded to whole numbers, those of pairs of bfloat16 to 8 bits
  const bool pairs_of_bf16 = s.prefill && past_type == DType::bf16;
  const double part = pairs_of_bf16 ? 1. / 256 : s.packed && type != DType::f32 ? 2e-5 : 1e-6;
  const double of_score = part * q_most * k_most * job.scaling + 1e-5;
  const double bound = v_most * (2.2 * of_score + part * (s.packed ? double(tokens) : 2.) + 1e-5);
  for (const Kernels* level : levels) {
    use_kernels(level->name);
    const std::string what = std::string(level->name) + ": " + shape;
    Numbers out(s.batch * heads * s.queries * s.v_size, type, s.edge, 0x77), again(out.count(), type, s.edge, 0x77);
    for (Numbers* to : {&out, &again}) {
      job.out = to->data();
      const int threads = to == &out ? 1 : int(random.within(2, 3));
      if (s.prefill) prefill_attention(job, dense, window, threads);
      else decode_attention(job, past, dense, threads);
    }
    if (std::memcmp(out.bytes(), again.bytes(), out.size()) != 0) fail(what + ": threads change bytes");
    for (int64_t b = 0; b < s.batch; ++b) for (int64_t h = 0; h < heads; ++h) for (int64_t i = 0; i < s.queries; ++i) {
      for (int64_t c = 0; c < s.v_size; ++c) {
        const double one = meant[size_t(((b * heads + h) * s.queries + i) * s.v_size + c)];
        check_near(element(out, job.out_stride, b, h, i, c), one, bound + rounding(one, type), what);
      }
    }
  }
}

Shape draw(Random& random, bool prefill, bool packed) {
  Shape s{};
  s.prefill = prefill, s.edge = any_edge(random);
  s.batch = random.within(1, 2), s.groups = random.within(1, 2), s.shared = random.within(1, 5);
  for (int64_t* size : {&s.k_size, &s.v_size}) {  // 256 is the most
    *size = random.next() % 8 == 0 ? 256 : packed ? 16 * random.within(1, 6) : random.within(1, 100);
  }
  s.k_bits = s.v_bits = random.one_of({8, 4, 2});
  s.packed = packed ? random.within(1, 150) : 0, s.first = packed ? random.within(0, 70) : 0;
  s.dense = random.within(packed ? 0 : 1, random.next() % 4 == 0 ? 300 : 40);
  s.queries = random.within(1, prefill ? 40 : 4);
  if (prefill && s.dense < s.queries) s.dense = s.queries;
  if (s.queries > s.packed + s.dense) s.queries = s.packed + s.dense;
  return s;
}

}  // namespace

void check_attention(const std::vector<const Kernels*>& levels, uint64_t seed, int64_t rounds) {
  Random random(seed);
  for (int64_t i = 0; i < 12 + rounds / 2; ++i) {
    check_case(draw(random, false, false), random, levels);
    check_case(draw(random, false, true), random, levels);
    check_case(draw(random, true, false), random, levels);
  }
}
