// Eight floats, the vector type of kernels_avx2.cpp and kernels_avxvnni.cpp, which take different numbers of them at a
// time. Included inside the anonymous namespace of a file of kernels.
#ifndef SPARSEMAE_FLOATS_AVX2_INL_H
#define SPARSEMAE_FLOATS_AVX2_INL_H

#ifndef __FMA__
#error "floats_avx2-inl.h needs __FMA__"
#endif

template <std::size_t kInChunk>
struct Floats8 {
  using Number = float;
  static constexpr const char* kMultiplyAdd = "vfmadd231ps";
  static constexpr std::size_t kLanes = 8, kVectors = kInChunk, kRows = 2;
  __m256 x;

  static Floats8 zero() { return {_mm256_setzero_ps()}; }
  static Floats8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, Floats8 v) { _mm256_storeu_ps(p, v.x); }
  static Floats8 set(float s) { return {_mm256_set1_ps(s)}; }
  // of the upper halves of the bits, as bfloat16
  static Floats8 upper(const std::uint32_t* bits) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(*bits)), mask))};
  }
  static Floats8 fma(Floats8 a, Floats8 b, Floats8 c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
  static Floats8 min(Floats8 a, Floats8 b) { return {_mm256_min_ps(a.x, b.x)}; }
  static Floats8 max(Floats8 a, Floats8 b) { return {_mm256_max_ps(a.x, b.x)}; }
  static Floats8 div(Floats8 a, Floats8 b) { return {_mm256_div_ps(a.x, b.x)}; }
  static Floats8 rsqrt(Floats8 a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_sqrt_ps(a.x))}; }
  // a * 2^n, with n in the low bits of `shifted`
  static Floats8 shift_add(Floats8 a, Floats8 shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.x), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.x), n))};
  }
};
template <std::size_t n>
inline Floats8<n> operator+(Floats8<n> a, Floats8<n> b) {
  return {_mm256_add_ps(a.x, b.x)};
}
template <std::size_t n>
inline Floats8<n> operator-(Floats8<n> a, Floats8<n> b) {
  return {_mm256_sub_ps(a.x, b.x)};
}
template <std::size_t n>
inline Floats8<n> operator*(Floats8<n> a, Floats8<n> b) {
  return {_mm256_mul_ps(a.x, b.x)};
}

#endif  // SPARSEMAE_FLOATS_AVX2_INL_H
