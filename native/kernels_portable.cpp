// fp32 in plain C++ for any compiler and processor: eight lanes in an array, left to the compiler to vectorise.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace {

struct V {
  static constexpr std::size_t kLanes = 8;
  float x[kLanes];

  template <class F>
  static V make(F f) {
    V r;
    for (std::size_t i = 0; i < kLanes; ++i) r.x[i] = f(i);
    return r;
  }
  static V load(const float* p) {
    V r;
    std::memcpy(r.x, p, sizeof r.x);
    return r;
  }
  static void store(float* p, V v) { std::memcpy(p, v.x, sizeof v.x); }
  static V set(float s) {
    return make([=](std::size_t) { return s; });
  }
  static V fma(V a, V b, V c) {
    return make([&](std::size_t i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static V max(V a, V b) {
    return make([&](std::size_t i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static V div(V a, V b) {
    return make([&](std::size_t i) { return a.x[i] / b.x[i]; });
  }
  static V rsqrt(V a) {
    return make([&](std::size_t i) { return 1.0f / sqrtf(a.x[i]); });
  }
  // a * 2^n, with n in the low bits of `shifted`
  static V shift_add(V a, V shifted) {
    std::uint32_t bits[kLanes], n[kLanes];
    std::memcpy(bits, a.x, sizeof bits);
    std::memcpy(n, shifted.x, sizeof n);
    for (std::size_t i = 0; i < kLanes; ++i) bits[i] += n[i] << 23;
    std::memcpy(a.x, bits, sizeof bits);
    return a;
  }
};
inline V operator+(V a, V b) {
  return V::make([&](std::size_t i) { return a.x[i] + b.x[i]; });
}
inline V operator-(V a, V b) {
  return V::make([&](std::size_t i) { return a.x[i] - b.x[i]; });
}
inline V operator*(V a, V b) {
  return V::make([&](std::size_t i) { return a.x[i] * b.x[i]; });
}

#include "lane_kernels.h"

constexpr sparsemae::Kernels kTable = lanes::table("portable");

}  // namespace

namespace sparsemae {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace sparsemae
