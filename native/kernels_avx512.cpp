// fp32 for AVX-512F: the lane kernels over sixteen floats. Serves fp32 files on every machine with AVX-512.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

struct V {
  using Number = float;
  using Weight = float;
  static constexpr std::size_t kLanes = 16, kVectors = 4, kRows = 4;
  __m512 x;

  static Weight weight(float w) { return w; }
  static V zero() { return {_mm512_setzero_ps()}; }
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v.x); }
  static V set(float s) { return {_mm512_set1_ps(s)}; }
  static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  static V min(V a, V b) { return {_mm512_min_ps(a.x, b.x)}; }
  static V max(V a, V b) { return {_mm512_max_ps(a.x, b.x)}; }
  static V div(V a, V b) { return {_mm512_div_ps(a.x, b.x)}; }
  static V rsqrt(V a) { return {_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(a.x))}; }
  // a * 2^n, with n in the low bits of `shifted`
  static V shift_add(V a, V shifted) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.x), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.x), n))};
  }
};
inline V operator+(V a, V b) { return {_mm512_add_ps(a.x, b.x)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.x, b.x)}; }

#include "lane_kernels.h"

constexpr sparsemae::Kernels kTable = lanes::table("avx512");

}  // namespace

namespace sparsemae {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace sparsemae
