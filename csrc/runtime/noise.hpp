// Standard normal noise, the same as torch.randn draws on the CPU from a generator with this seed (to an ulp: the
// libraries' logarithms and cosines differ by that), so that a picture does not depend on what restores it.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace dtpm {

class Noise {
 public:
  explicit Noise(uint64_t seed) : engine_(static_cast<uint32_t>(seed)) {}

  void fill(float* to, size_t size) {
    if (size < 16) {
      for (size_t i = 0; i < size; ++i) to[i] = static_cast<float>(one());
      return;
    }
    for (size_t i = 0; i < size; ++i) to[i] = uniform();
    for (size_t i = 0; i + 15 < size; i += 16) sixteen(to + i);
    if (size % 16 != 0) {  // the last sixteen are drawn anew, as one block
      float* last = to + size - 16;
      for (int i = 0; i < 16; ++i) last[i] = uniform();
      sixteen(last);
    }
  }

 private:
  float uniform() { return static_cast<float>(engine_() & ((1u << 24) - 1)) * 0x1p-24f; }

  double uniform53() {
    const uint64_t high = engine_(), low = engine_();
    return static_cast<double>(((high << 32) | low) & ((uint64_t(1) << 53) - 1)) * 0x1p-53;
  }

  // Box and Muller's transform of eight pairs of uniform numbers.
  static void sixteen(float* v) {
    for (int i = 0; i < 8; ++i) {
      const float radius = std::sqrt(-2 * std::log(1 - v[i])), angle = 2 * float(M_PI) * v[i + 8];
      v[i] = radius * std::cos(angle), v[i + 8] = radius * std::sin(angle);
    }
  }

  // One number, in double; the second one of a pair waits.
  double one() {
    if (waiting_) return waiting_ = false, second_;
    const double angle = 2 * M_PI * uniform53(), radius = std::sqrt(-2 * std::log1p(-uniform53()));
    second_ = radius * std::sin(angle), waiting_ = true;
    return radius * std::cos(angle);
  }

  std::mt19937 engine_;
  bool waiting_ = false;
  double second_ = 0;
};

}  // namespace dtpm
