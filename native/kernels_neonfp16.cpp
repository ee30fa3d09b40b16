// fp16 for Arm processors that compute in it (Armv8.2 with FEAT_FP16: Neoverse N1, Cortex-A76, Apple's A11 and M1, and
// later): the lane kernels with products of eight halves. What is between products, attention too, is in fp32, and so
// is the embedding.
//
// Products are summed in fp16, and cannot overflow, as in kernels_avx512fp16.cpp.
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace {

#include "floats_neon-inl.h"

struct Halves {
  using Number = float16_t;
  static constexpr const char* kMultiplyAdd = "fmla";
  static constexpr std::size_t kLanes = 8, kVectors = 6, kRows = 4;
  template <class>
  using Step = NeonStep<Halves, float16_t>;  // fp32 files are not for this table
  float16x8_t x;

  static Halves zero() { return {vdupq_n_f16(0)}; }
  static Halves load(const Number* p) { return {vld1q_f16(p)}; }
  static void store(Number* p, Halves v) { vst1q_f16(p, v.x); }
  static Halves set(float s) { return {vdupq_n_f16(static_cast<Number>(s))}; }
  static Halves fma(Halves a, Halves b, Halves c) { return {vfmaq_f16(c.x, a.x, b.x)}; }
  static Halves max(Halves a, Halves b) { return {vmaxq_f16(a.x, b.x)}; }
  template <class Weight>
  static Weight stored(float w) {
    return static_cast<Weight>(w);
  }
  static float16x4_t weights(const Number* w) { return vld1_f16(w); }
  template <std::size_t r>
  static Halves multiply_add(Halves sum, Halves x, float16x4_t weights) {
    return {vfmaq_lane_f16(sum.x, x.x, weights, r)};
  }
};

#define SPARSEMAE_VECTOR Floats
#define SPARSEMAE_PRODUCT Halves
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels table() {
  sparsemae::Kernels t = lanes::table("neonfp16");
  t.math = "fp16";
  t.max_density = 0.99f;  // dense layers are not for steps
  t.max_magnitude = 32768.0f;
  t.embedding = sparsemae::neon_kernels;
  t.patches = nullptr;
  return t;
}
constexpr sparsemae::Kernels kTable = table();

}  // namespace

namespace sparsemae {
const Kernels* neonfp16_kernels() { return &kTable; }
}  // namespace sparsemae
