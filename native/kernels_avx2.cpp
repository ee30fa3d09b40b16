// fp32 for AVX2 and FMA: the lane kernels over eight floats.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

struct Floats {
  using Number = float;
  static constexpr const char* kMultiplyAdd = "vfmadd231ps";
  static constexpr std::size_t kLanes = 8, kVectors = 7, kRows = 2;
  __m256 x;

  static Floats zero() { return {_mm256_setzero_ps()}; }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v.x); }
  static Floats set(float s) { return {_mm256_set1_ps(s)}; }
  // of the upper halves of the bits, as bfloat16
  static Floats upper(const std::uint32_t* bits) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(*bits)), mask))};
  }
  static Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
  static Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.x, b.x)}; }
  static Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.x, b.x)}; }
  static Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.x, b.x)}; }
  static Floats rsqrt(Floats a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_sqrt_ps(a.x))}; }
  // a * 2^n, with n in the low bits of `shifted`
  static Floats shift_add(Floats a, Floats shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.x), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.x), n))};
  }
};
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.x, b.x)}; }

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("avx2");

}  // namespace

namespace sparsemae {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace sparsemae
