// fp32 for Arm's Advanced SIMD: the lane kernels over four floats. A multiply-add takes its weight from an element of a
// register, so that the weights of four rows are one load and are never spread.
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace {

struct Floats {
  using Number = float;
  static constexpr const char* kMultiplyAdd = "fmla";
  static constexpr std::size_t kLanes = 4, kVectors = 6, kRows = 4;
  float32x4_t x;

  static Floats zero() { return {vdupq_n_f32(0.0f)}; }
  static Floats load(const float* p) { return {vld1q_f32(p)}; }
  static void store(float* p, Floats v) { vst1q_f32(p, v.x); }
  static Floats set(float s) { return {vdupq_n_f32(s)}; }
  // of the upper halves of the bits, as bfloat16
  static Floats upper(const std::uint32_t* bits) {
    return {vreinterpretq_f32_u32(vandq_u32(vld1q_dup_u32(bits), vdupq_n_u32(0xFFFF0000u)))};
  }
  // The weights of the kRows rows of a step; element `r` of them is the weight of row r.
  template <class Kept>
  static float32x4_t weights(const Kept* kept) {
    if constexpr (sizeof(Kept) == sizeof(std::uint32_t))
      return vreinterpretq_f32_u32(vandq_u32(vld1q_u32(&kept->bits), vdupq_n_u32(0xFFFF0000u)));
    else
      return vld2q_f32(&kept->value).val[0];
  }
  static Floats element(float32x4_t weights, std::size_t r) {
    switch (r) {
      case 0:
        return {vdupq_laneq_f32(weights, 0)};
      case 1:
        return {vdupq_laneq_f32(weights, 1)};
      case 2:
        return {vdupq_laneq_f32(weights, 2)};
      default:
        return {vdupq_laneq_f32(weights, 3)};
    }
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

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("neon");

}  // namespace

namespace sparsemae {
const Kernels* neon_kernels() { return &kTable; }
}  // namespace sparsemae
