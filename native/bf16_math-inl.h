// Vector functions that both bf16 instruction sets use. Included inside the anonymous namespace of a file of kernels.

// 2^n times a polynomial of degree 4: relative error below 4e-6, far under bf16's. x <= 0.
#ifndef SPARSEMAE_BF16_MATH_INL_H
#define SPARSEMAE_BF16_MATH_INL_H

#ifndef __AVX512BW__
#error "bf16_math-inl.h needs __AVX512BW__"
#endif

inline __m512 exponential(__m512 x) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(t, 0);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(9.6184374e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022648e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314720e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// x * Phi(x) with Phi as an odd polynomial on [-3.9, 3.9]: absolute error below 1.5e-4, under the rounding of a bf16
// result.
inline __m512 gelu(__m512 x) {
  const __m512 c = _mm512_range_ps(x, _mm512_set1_ps(3.9f), 2);  // the smaller magnitude, with x's sign
  const __m512 s = _mm512_mul_ps(c, c);
  __m512 p = _mm512_set1_ps(2.6268763e-08f);
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-1.7703649e-06f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(5.1234849e-05f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-8.4449002e-04f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(8.9136874e-03f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-6.4869270e-02f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(0.39808547f));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(p, c, _mm512_set1_ps(0.5f)));
}

// The nearest bfloat16, ties to even; finite values only.
inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Patches of image [C][H][W] for tokens [first, first + kTokenUnit): write(token, feature, mask, bf16) for up to 16
// pixels of a row, and after a patch's pixels for what rounding has taken from each column of a channel.
template <class Write>
inline void round_patches(const Geometry& g, const float* image, std::size_t first, const Write& write) {
  const std::size_t across = g.image_width / g.patch, pixels = patch_inputs(g, false);
  for (std::size_t t = first < g.prefix ? g.prefix : first; t < first + kTokenUnit && t < g.tokens; ++t) {
    const float* patch = image + (t - g.prefix) / across * g.patch * g.image_width + (t - g.prefix) % across * g.patch;
    for (std::size_t c = 0; c < g.channels; ++c)
      for (std::size_t x = 0; x < g.patch; x += 16) {
        const __mmask16 mask = static_cast<__mmask16>(g.patch - x < 16 ? (1u << (g.patch - x)) - 1u : 0xFFFFu);
        __m512 taken = _mm512_setzero_ps();
        for (std::size_t y = 0; y < g.patch; ++y) {
          const __m512 from = _mm512_maskz_loadu_ps(mask, patch + (c * g.image_height + y) * g.image_width + x);
          const auto rounded = (__m256i)_mm512_cvtneps_pbh(from);
          const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
          taken = _mm512_add_ps(taken, _mm512_sub_ps(from, _mm512_castsi512_ps(bits)));
          write(t, (c * g.patch + y) * g.patch + x, mask, rounded);
        }
        write(t, pixels + c * g.patch + x, mask, (__m256i)_mm512_cvtneps_pbh(taken));
      }
  }
}

// Transposes 16 x 16 dwords; `step` is the distance of rows, in dwords, of both.
inline void transpose16(const std::uint32_t* from, std::size_t from_step, std::uint32_t* to, std::size_t to_step) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + static_cast<std::size_t>(i) * from_step);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: lane l holds column 4 l + c of rows i .. i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x44),
                  high01 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x44),
                  high23 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xEE);
    const auto at = [&](int row) { return to + static_cast<std::size_t>(row + c) * to_step; };
    _mm512_storeu_si512(at(0), _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(at(4), _mm512_shuffle_i32x4(low01, low23, 0xDD));
    _mm512_storeu_si512(at(8), _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(at(12), _mm512_shuffle_i32x4(high01, high23, 0xDD));
  }
}

inline void dense_rows(const float* weight, const float* bias, const float* x, std::size_t columns, float* out,
                       std::size_t first, std::size_t last) {
  for (std::size_t r = first; r < last; ++r) {
    const float* w = weight + r * columns;
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (std::size_t k = 0; k < columns; k += 64)
      for (std::size_t j = 0; j < 4 && k + j * 16 < columns; ++j) {
        const std::size_t left = columns - k - j * 16;
        const __mmask16 mask = static_cast<__mmask16>(left < 16 ? (1u << left) - 1u : 0xFFFFu);
        sum[j] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, w + k + j * 16),
                                 _mm512_maskz_loadu_ps(mask, x + k + j * 16), sum[j]);
      }
    out[r] =
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]))) + bias[r];
  }
}

#endif  // SPARSEMAE_BF16_MATH_INL_H
