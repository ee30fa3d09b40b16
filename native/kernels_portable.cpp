// fp32 in the vector types of GCC and Clang, four tokens in the lanes, for any processor: the compiler makes SSE, NEON
// or WebAssembly's instructions of them.
#include <cmath>
#include <cstring>

#if defined(__wasm_relaxed_simd__)
#include <wasm_simd128.h>
#endif

#include "kernels.h"

namespace {

struct Floats {
  using Number = float;
  using Lanes = float __attribute__((vector_size(16)));
  using Bits = std::uint32_t __attribute__((vector_size(16)));
  static constexpr const char* kMultiplyAdd = "multiply, add";
#if defined(__wasm__)
  static constexpr std::size_t kLanes = 4, kVectors = 6, kRows = 2;
#else
  static constexpr std::size_t kLanes = 4, kVectors = 3, kRows = 4;
#endif
  Lanes x;

  static Floats zero() { return set(0.0f); }
  static Floats load(const float* p) {
    Floats r;
    std::memcpy(&r.x, p, sizeof r.x);
    return r;
  }
  static void store(float* p, Floats v) { std::memcpy(p, &v.x, sizeof v.x); }
  static Floats set(float s) { return {Lanes{s, s, s, s}}; }
  // of the upper halves of the bits, as bfloat16
  static Floats upper(const std::uint32_t* bits) {
    const std::uint32_t kept = *bits & 0xFFFF0000u;
    float s;
    std::memcpy(&s, &kept, sizeof s);
    return set(s);
  }
  static Floats fma(Floats a, Floats b, Floats c) {
#if defined(__wasm_relaxed_simd__)
    return {reinterpret_cast<Lanes>(wasm_f32x4_relaxed_madd((v128_t)a.x, (v128_t)b.x, (v128_t)c.x))};
#else
    return {a.x * b.x + c.x};
#endif
  }
  static Floats min(Floats a, Floats b) { return {a.x < b.x ? a.x : b.x}; }
  static Floats max(Floats a, Floats b) { return {a.x > b.x ? a.x : b.x}; }
  static Floats div(Floats a, Floats b) { return {a.x / b.x}; }
  static Floats rsqrt(Floats a) {
    for (std::size_t i = 0; i < kLanes; ++i) a.x[i] = 1.0f / sqrtf(a.x[i]);
    return a;
  }
  // a * 2^n, with n in the low bits of `shifted`
  static Floats shift_add(Floats a, Floats shifted) {
    return {reinterpret_cast<Lanes>(reinterpret_cast<Bits>(a.x) + (reinterpret_cast<Bits>(shifted.x) << 23))};
  }
};
inline Floats operator+(Floats a, Floats b) { return {a.x + b.x}; }
inline Floats operator-(Floats a, Floats b) { return {a.x - b.x}; }
inline Floats operator*(Floats a, Floats b) { return {a.x * b.x}; }

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("portable");

}  // namespace

namespace sparsemae {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace sparsemae
