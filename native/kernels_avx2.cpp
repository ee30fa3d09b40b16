// fp32 for AVX2 and FMA: the lane kernels over eight floats.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

struct V {
  using Number = float;
  static constexpr std::size_t kLanes = 8, kVectors = 7, kRows = 2;
  __m256 x;

  static V zero() { return {_mm256_setzero_ps()}; }
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v.x); }
  static V set(float s) { return {_mm256_set1_ps(s)}; }
  // of the upper halves of the bits, as bfloat16
  static V upper(const std::uint32_t* bits) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(*bits)), mask))};
  }
  static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
  static V min(V a, V b) { return {_mm256_min_ps(a.x, b.x)}; }
  static V max(V a, V b) { return {_mm256_max_ps(a.x, b.x)}; }
  static V div(V a, V b) { return {_mm256_div_ps(a.x, b.x)}; }
  static V rsqrt(V a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_sqrt_ps(a.x))}; }
  // a * 2^n, with n in the low bits of `shifted`
  static V shift_add(V a, V shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.x), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.x), n))};
  }
};
inline V operator+(V a, V b) { return {_mm256_add_ps(a.x, b.x)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.x, b.x)}; }

#include "lane_kernels.h"

constexpr sparsemae::Kernels kTable = lanes::table("avx2");

}  // namespace

namespace sparsemae {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace sparsemae
