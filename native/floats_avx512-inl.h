// Sixteen floats: the vector type of the fp32 kernels for AVX-512F, and of the layer norm of the AMX and fp16 kernels.
// Included inside the anonymous namespace of a file of kernels.
#ifndef SPARSEMAE_FLOATS_AVX512_INL_H
#define SPARSEMAE_FLOATS_AVX512_INL_H

#ifndef __AVX512F__
#error "floats_avx512-inl.h needs __AVX512F__"
#endif

struct Floats {
  using Number = float;
  static constexpr const char* kMultiplyAdd = "vfmadd231ps";
  static constexpr std::size_t kLanes = 16, kVectors = 4, kRows = 4;
  __m512 x;

  static Floats zero() { return {_mm512_setzero_ps()}; }
  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v.x); }
  static Floats set(float s) { return {_mm512_set1_ps(s)}; }
  // of the upper halves of the bits, as bfloat16
  static Floats upper(const std::uint32_t* bits) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(static_cast<int>(*bits)), mask))};
  }
  static Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  static Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.x, b.x)}; }
  static Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.x, b.x)}; }
  static Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.x, b.x)}; }
  static Floats rsqrt(Floats a) { return {_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(a.x))}; }
  // a * 2^n, with n in the low bits of `shifted`
  static Floats shift_add(Floats a, Floats shifted) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.x), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.x), n))};
  }
};
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.x, b.x)}; }

#endif  // SPARSEMAE_FLOATS_AVX512_INL_H
