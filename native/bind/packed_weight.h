// What Python holds of packed weights, whatever their panels. The memory of panels and bias is the caller's.
#pragma once
#include <nanobind/nanobind.h>

#include "linear/panels.h"
#include "pool.h"

namespace bitgrain {

// W: IntWeights or CodeWeights; Scale: the elements of scales as its packers take them, void for bytes.
template <typename W, typename Scale>
class PackedWeight {
 public:
  PackedWeight() = default;
  PackedWeight(const PackedWeight&) = delete;

  int64_t nbytes() const { return nbytes_; }

  void attach(uintptr_t panels, uintptr_t bias) {
    w_.panels = reinterpret_cast<const uint8_t*>(panels), w_.bias = reinterpret_cast<const float*>(bias);
  }

  void pack(uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t panels, int threads) const {
    pack_from(reinterpret_cast<const uint8_t*>(codes), scale, zero, panels, threads);
  }

  // words: rows of `stride` bytes, each a stream of codes of `bits` bits
  void pack_words(uintptr_t words, int64_t stride, int bits, uintptr_t scale, uintptr_t zero, uintptr_t panels,
                  int threads) const {
    pack_from(WordRows{reinterpret_cast<const uint8_t*>(words), stride, bits}, scale, zero, panels, threads);
  }

  void unpack(uintptr_t codes, uintptr_t scale, uintptr_t zero, int threads) const {
    for_all_panels(threads, [&](int64_t first, int64_t last) {
      unpack_panels(w_, reinterpret_cast<uint8_t*>(codes), reinterpret_cast<Scale*>(scale),
                    reinterpret_cast<float*>(zero), first, last);
    });
  }

  // rows `ids` of the weight; the place of the first that there is not, or -1
  int64_t gather(uintptr_t ids, int64_t count, uintptr_t y, int y_type, int threads) const {
    nanobind::gil_scoped_release free;
    return gather_rows(w_, reinterpret_cast<const int64_t*>(ids), count, reinterpret_cast<void*>(y),
                       static_cast<DType>(y_type), threads);
  }

  const W& weights() const { return w_; }

 protected:
  template <typename F>
  void for_all_panels(int threads, const F& f) const {
    nanobind::gil_scoped_release free;
    parallel_for(threads, panels_of(w_.n), 1, f);
  }

  W w_{};
  int64_t nbytes_ = 0;

 private:
  template <typename Codes>
  void pack_from(const Codes& codes, uintptr_t scale, uintptr_t zero, uintptr_t panels, int threads) const {
    for_all_panels(threads, [&](int64_t first, int64_t last) {
      pack_panels(w_, codes, reinterpret_cast<const Scale*>(scale), reinterpret_cast<const float*>(zero),
                  reinterpret_cast<uint8_t*>(panels), first, last);
    });
  }
};

}  // namespace bitgrain
