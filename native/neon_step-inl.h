// A step of lane_products-inl.h for Arm's Advanced SIMD. A multiply-add takes its weight from an element of a register,
// so that the weights of four rows are one load and are never spread; the places of their inputs are read two at a
// time, and the inputs of a row as well. Included inside the anonymous namespace of a file of kernels.
#ifndef SPARSEMAE_NEON_STEP_INL_H
#define SPARSEMAE_NEON_STEP_INL_H

#ifndef __ARM_NEON
#error "neon_step-inl.h needs __ARM_NEON"
#endif

// P has, besides what lane_products-inl.h asks for, stored<Weight>(weight), weights(four of them) and
// multiply_add<row>(sum, inputs, weights). Empty assembly keeps GCC from what costs more: an address for each input, a
// load for each weight or input.
template <class P, class Weight>
struct NeonStep {
  Weight weight[4];
  std::uint16_t place[4];  // in bytes: a slab has fewer than 64 KB

  void set(std::size_t r, float w, std::size_t offset) {
    weight[r] = P::template stored<Weight>(w);
    place[r] = static_cast<std::uint16_t>(offset);
  }

  template <std::size_t r, std::size_t J, class Weights>
  static void multiply_row(P (&sum)[J], const char* at, Weights weights) {
    __asm__("" : "+r"(at));
    const auto* from = reinterpret_cast<const typename P::Number*>(at);
    if constexpr (J % 2 == 1) sum[0] = P::template multiply_add<r>(sum[0], P::load(from), weights);
    for (std::size_t j = J % 2; j < J; j += 2) {
      P a = P::load(from + j * P::kLanes), b = P::load(from + (j + 1) * P::kLanes);
      __asm__("" : "+w"(a.x), "+w"(b.x));
      sum[j] = P::template multiply_add<r>(sum[j], a, weights);
      sum[j + 1] = P::template multiply_add<r>(sum[j + 1], b, weights);
    }
  }

  template <std::size_t J>
  void multiply_add(P (&sum)[4][J], const char* bytes) const {
    auto weights = P::weights(weight);
    __asm__("" : "+w"(weights));
    std::uint32_t pairs[2];
    std::memcpy(pairs, place, sizeof pairs);
    const std::size_t low = pairs[0], high = pairs[1];
    multiply_row<0>(sum[0], bytes + (low & 0xFFFF), weights);
    multiply_row<1>(sum[1], bytes + (low >> 16), weights);
    multiply_row<2>(sum[2], bytes + (high & 0xFFFF), weights);
    multiply_row<3>(sum[3], bytes + (high >> 16), weights);
  }
};

#endif  // SPARSEMAE_NEON_STEP_INL_H
