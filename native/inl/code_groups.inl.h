// What all products of looked-up weights share: codes and scales out of panels, sums into outputs.
namespace bitgrain {
namespace BG_ISA {

constexpr int kPairBytes = 2 * (int)kInputBytes;  // of one row's pair of inputs
constexpr int kWeightBytes = 16 * kPairBytes;     // of 16 columns' pair of weights

// Scales of 16 columns, and what is taken off for an input sum of 1.
struct GroupScales {
  F32 scale, shift;
};
BG_INLINE GroupScales group_scales(const CodeWeights& w, const uint8_t* at, int column) {
  const uint8_t* zeros = at + scales_bytes(w.scale_type);
  const F32 scale = load_any_scales(at, w.scale_type, column);
  if (w.zeros == Zeros::constant) return {scale, zero_f()};
  if (w.zeros == Zeros::minima) {
    return {scale, fma_f(set_f(w.zero), scale, load_scales(zeros, w.scale_type, column))};
  }
  const F32 zero = w.zeros == Zeros::codes ? to_float(load_u8_i(zeros + column))
                                           : load_f((const float*)zeros + column);
  return {scale, mul_f(zero, scale)};
}

// scale: of the row's inputs, where one scale is all they have.
BG_INLINE void store_columns(const CodePanelJob& job, int64_t row, int64_t column, F32 total, float scale) {
  const CodeWeights& w = *job.w;
  const int64_t left = w.n - column, count = left < 16 ? left : 16;
  if (count <= 0) return;
  const F32 bias = w.bias ? load_elements<DType::f32>(w.bias, column, count) : zero_f();
  store_elements(job.y, job.type, row * job.stride + column, count, fma_f(total, set_f(w.outer * scale), bias));
}

template <int FORM>
BG_INLINE int64_t chunks_in(const CodeWeights& w, int64_t s) {
  return ceil_div(features_of(w, s), chunk_features(form_bits(FORM)));
}

template <int FORM, int V>
BG_INLINE void load_codes(const uint8_t* p, I32 (&codes)[V][Looked<FORM>::kVectors]) {
  constexpr int kVectors = Looked<FORM>::kVectors;
  BG_UNROLL for (int v = 0; v < V; ++v) BG_UNROLL for (int i = 0; i < kVectors; ++i)
      codes[v][i] = as_lanes(load_b(p + 64 * (v * kVectors + i)));
}

template <int FORM, int I = 0, typename T>
BG_INLINE void store_chunk(const I32 (&codes)[2][Looked<FORM>::kVectors], const T& table, uint8_t* to) {
  BG_UNROLL for (int v = 0; v < 2; ++v) {
    store_pair(to + (2 * I + v) * kWeightBytes, Looked<FORM>::template step<I>(codes[v], table));
  }
  if constexpr (I + 1 < Looked<FORM>::kSteps) store_chunk<FORM, I + 1>(codes, table, to);
}

}  // namespace BG_ISA
}  // namespace bitgrain
