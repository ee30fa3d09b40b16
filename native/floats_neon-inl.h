// Four floats: the vector type of kernels_neon.cpp, and of what kernels_neonfp16.cpp has in fp32. Included inside the
// anonymous namespace of a file of kernels.
#ifndef SPARSEMAE_FLOATS_NEON_INL_H
#define SPARSEMAE_FLOATS_NEON_INL_H

#include "neon_step-inl.h"

struct Floats {
  using Number = float;
  static constexpr const char* kMultiplyAdd = "fmla";
  static constexpr std::size_t kLanes = 4, kVectors = 6, kRows = 4;
  template <class Weight>
  using Step = NeonStep<Floats, Weight>;
  float32x4_t x;

  static Floats zero() { return {vdupq_n_f32(0.0f)}; }
  static Floats load(const float* p) { return {vld1q_f32(p)}; }
  static void store(float* p, Floats v) { vst1q_f32(p, v.x); }
  static Floats load(const float16_t* p) { return {vcvt_f32_f16(vld1_f16(p))}; }
  static void store(float16_t* p, Floats v) { vst1_f16(p, vcvt_f16_f32(v.x)); }
  static Floats set(float s) { return {vdupq_n_f32(s)}; }
  template <class Weight>
  static Weight stored(float w) {
    if constexpr (sizeof(Weight) == sizeof w) {
      return w;
    } else {  // bfloat16
      std::uint32_t bits;
      std::memcpy(&bits, &w, sizeof bits);
      return static_cast<Weight>(bits >> 16);
    }
  }
  static float32x4_t weights(const float* w) { return vld1q_f32(w); }
  static float32x4_t weights(const std::uint16_t* w) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(w), 16)); }
  template <std::size_t r>
  static Floats multiply_add(Floats sum, Floats x, float32x4_t weights) {
    return {vfmaq_laneq_f32(sum.x, x.x, weights, r)};
  }
  static Floats fma(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.x, a.x, b.x)}; }
  static Floats min(Floats a, Floats b) { return {vminq_f32(a.x, b.x)}; }
  static Floats max(Floats a, Floats b) { return {vmaxq_f32(a.x, b.x)}; }
  static Floats div(Floats a, Floats b) { return {vdivq_f32(a.x, b.x)}; }
  static Floats rsqrt(Floats a) { return {vdivq_f32(vdupq_n_f32(1.0f), vsqrtq_f32(a.x))}; }
  // a * 2^n, with n in the low bits of `shifted`
  static Floats shift_add(Floats a, Floats shifted) {
    const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(shifted.x), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.x), n))};
  }
};
inline Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.x, b.x)}; }
inline Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.x, b.x)}; }
inline Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.x, b.x)}; }

#endif  // SPARSEMAE_FLOATS_NEON_INL_H
