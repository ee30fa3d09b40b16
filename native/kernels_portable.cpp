// fp32 in plain C++ for any compiler and processor, four tokens in the lanes: compilers with vector types (GCC, Clang)
// get one per value, which they turn into SSE, NEON or what there is; the others loops over an array.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace {

struct Floats {
  using Number = float;
  static constexpr const char* kMultiplyAdd = "multiply, add";
  static constexpr std::size_t kLanes = 4, kVectors = 3, kRows = 4;
#if defined(__GNUC__)
  using Lanes = float __attribute__((vector_size(16)));
  using Bits = std::uint32_t __attribute__((vector_size(16)));
#else
  struct Lanes {
    float lane[kLanes];
    float& operator[](std::size_t i) { return lane[i]; }
    float operator[](std::size_t i) const { return lane[i]; }
  };
#endif
  Lanes x;

  // f of the lanes, all at once where the compiler has vectors
  template <class F, class... Vs>
  static Floats map(const F& f, const Vs&... v) {
#if defined(__GNUC__)
    return {f(v.x...)};
#else
    Floats r;
    for (std::size_t i = 0; i < kLanes; ++i) r.x[i] = f(v.x[i]...);
    return r;
#endif
  }
  static Floats zero() { return set(0.0f); }
  static Floats load(const float* p) {
    Floats r;
    std::memcpy(&r.x, p, sizeof r.x);
    return r;
  }
  static void store(float* p, Floats v) { std::memcpy(p, &v.x, sizeof v.x); }
  static Floats set(float s) {
    Floats r;
    for (std::size_t i = 0; i < kLanes; ++i) r.x[i] = s;
    return r;
  }
  // of the upper halves of the bits, as bfloat16
  static Floats upper(const std::uint32_t* bits) {
    const std::uint32_t kept = *bits & 0xFFFF0000u;
    float s;
    std::memcpy(&s, &kept, sizeof s);
    return set(s);
  }
  static Floats fma(Floats a, Floats b, Floats c) {
    return map([](auto p, auto q, auto r) { return p * q + r; }, a, b, c);
  }
  static Floats min(Floats a, Floats b) {
    return map([](auto p, auto q) { return p < q ? p : q; }, a, b);
  }
  static Floats max(Floats a, Floats b) {
    return map([](auto p, auto q) { return p > q ? p : q; }, a, b);
  }
  static Floats div(Floats a, Floats b) {
    return map([](auto p, auto q) { return p / q; }, a, b);
  }
  static Floats rsqrt(Floats a) {
    for (std::size_t i = 0; i < kLanes; ++i) a.x[i] = 1.0f / sqrtf(a.x[i]);
    return a;
  }
  // a * 2^n, with n in the low bits of `shifted`
  static Floats shift_add(Floats a, Floats shifted) {
#if defined(__GNUC__)
    return {reinterpret_cast<Lanes>(reinterpret_cast<Bits>(a.x) + (reinterpret_cast<Bits>(shifted.x) << 23))};
#else
    std::uint32_t bits[kLanes], n[kLanes];
    std::memcpy(bits, &a.x, sizeof bits);
    std::memcpy(n, &shifted.x, sizeof n);
    for (std::size_t i = 0; i < kLanes; ++i) bits[i] += n[i] << 23;
    std::memcpy(&a.x, bits, sizeof bits);
    return a;
#endif
  }
};
inline Floats operator+(Floats a, Floats b) {
  return Floats::map([](auto p, auto q) { return p + q; }, a, b);
}
inline Floats operator-(Floats a, Floats b) {
  return Floats::map([](auto p, auto q) { return p - q; }, a, b);
}
inline Floats operator*(Floats a, Floats b) {
  return Floats::map([](auto p, auto q) { return p * q; }, a, b);
}

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("portable");

}  // namespace

namespace sparsemae {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace sparsemae
