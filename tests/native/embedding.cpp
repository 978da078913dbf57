// Embeddings and densely packed rows: bit for bit what plain scalars give.
#include "embedding.h"

#include "numbers.h"

using namespace bitgrain;

namespace {

void check_case(Random& random) {
  const int bits = int(random.within(1, 8));
  const int64_t n = random.within(1, 20), k = random.within(1, 150), group = random.within(1, k);
  const int64_t groups = ceil_div(k, group);
  const int64_t row_bytes = ceil_div(k * bits, 8), stride = row_bytes + random.within(0, 3);
  const int64_t count = random.within(0, 20);
  const Edge edge = any_edge(random);
  const std::string what = "embedding, bits " + std::to_string(bits) + ", k " + std::to_string(k) + ", group " +
                           std::to_string(group) + ", ids " + std::to_string(count);
  Guarded<uint8_t> codes(n * k, edge), words((n - 1) * stride + row_bytes, edge, 0xff), back(k, edge);
  for (int64_t i = 0; i < n * k; ++i) codes[i] = uint8_t(random.within(0, (1 << bits) - 1));
  for (int64_t r = 0; r < n; ++r) pack_row(codes.data() + r * k, k, bits, words.data() + r * stride);
  for (int64_t r = 0; r < n; ++r) {
    const uint8_t offset = uint8_t(random.within(0, 128));
    unpack_row({words.data(), stride, bits}, r, k, offset, back.data());
    for (int64_t i = 0; i < k; ++i) {
      int code = 0;  // bits [i * bits, (i + 1) * bits) of the row
      for (int64_t b = 0; b < bits; ++b) {
        const int64_t at = i * bits + b;
        code |= (words[r * stride + at / 8] >> at % 8 & 1) << b;
      }
      if (code != codes[r * k + i] || back[i] != uint8_t(code - offset)) fail(what + ": packed rows");
    }
    if (r + 1 < n) check_untouched(words.data() + r * stride + row_bytes, stride - row_bytes, 0xff, what);
  }

  Embedding e{};
  e.words = {words.data(), stride, bits}, e.n = n, e.k = k, e.group = group;
  for (float& entry : e.table) entry = random.real() * 8;
  e.scale_type = random.one_of({DType::f32, DType::bf16, DType::f16, DType::e8m0, DType::e4m3});
  e.zero_type = random.one_of({DType::f32, DType::bf16, DType::f16, DType::u8, DType::s8});
  e.minimum_type = random.one_of({DType::f32, DType::bf16, DType::f16});
  const bool zeros = random.next() % 2, has_minima = random.next() % 2;
  Guarded<uint8_t> scale(n * groups * int64_t(size_of(e.scale_type)), edge);
  Guarded<uint8_t> zero(n * groups * int64_t(size_of(e.zero_type)), edge);
  Guarded<uint8_t> minimum(n * groups * int64_t(size_of(e.minimum_type)), edge);
  std::vector<float> scales, all_zeros, minima;
  for (int64_t i = 0; i < n * groups; ++i) {
    const uint8_t byte = uint8_t(random.within(100, 126)), zero_byte = uint8_t(random.next());
    if (size_of(e.scale_type) == 1) {
      scale[i] = byte;
      scales.push_back(e.scale_type == DType::e8m0 ? from_e8m0(byte) : from_e4m3(byte));
    } else {
      store_number(scale.data(), e.scale_type, i, random.real());
      scales.push_back(load_number(scale.data(), e.scale_type, i));
    }
    if (size_of(e.zero_type) == 1) {
      zero[i] = zero_byte;
      all_zeros.push_back(e.zero_type == DType::u8 ? float(zero_byte) : float(int8_t(zero_byte)));
    } else {
      store_number(zero.data(), e.zero_type, i, random.real());
      all_zeros.push_back(load_number(zero.data(), e.zero_type, i));
    }
    store_number(minimum.data(), e.minimum_type, i, random.real());
    minima.push_back(load_number(minimum.data(), e.minimum_type, i));
  }
  e.outer = random.one_of({1.f, 0.3f});
  e.scale = scale.data(), e.zero = zeros ? zero.data() : nullptr;
  e.minimum = has_minima ? minimum.data() : nullptr;

  Guarded<int64_t> ids(count, edge);
  for (int64_t i = 0; i < count; ++i) ids[i] = random.within(0, n - 1);
  Numbers y(count * k, any_float_type(random), edge), meant(k, y.type(), edge);
  if (look_up_rows(e, ids.data(), count, y.data(), y.type(), int(random.within(1, 3))) != -1) {
    fail(what + ": an id is none");
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = ids[r] * groups + i / group;
      const float number = e.table[codes[ids[r] * k + i]] - (zeros ? all_zeros[size_t(at)] : 0.f);
      const float scaled = number * (scales[size_t(at)] * e.outer);
      meant.set(i, has_minima ? scaled - minima[size_t(at)] * e.outer : scaled);
    }
    if (std::memcmp(meant.data(), y.bytes() + r * int64_t(meant.size()), meant.size()) != 0) {
      fail(what + ": another row");
    }
  }
  if (count > 0) {
    ids[count - 1] = random.one_of<int64_t>({-1, n});
    if (look_up_rows(e, ids.data(), count, y.data(), y.type(), 1) != count - 1) fail(what + ": a wrong id is not told");
  }
}

}  // namespace

void check_embedding(const std::vector<const Kernels*>&, uint64_t seed, int64_t rounds) {
  Random random(seed);
  for (int64_t i = 0; i < 40 + rounds; ++i) check_case(random);
}
