// The loops of masks.cpp over a part of the weights, as one instruction set does them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsemae {

struct MaskLoops {
  // `keys`: scratch, m long. `kept`: null, or as kept_bf16 would make it.
  void (*select_kept)(const float* weights, std::size_t groups, std::size_t m, std::size_t n, std::int32_t* keys,
                      std::uint8_t* mask, std::uint16_t* kept);
  void (*kept_bf16)(const float* weights, const std::uint8_t* mask, std::size_t count, std::uint16_t* out);
  void (*pull_pruned)(float* gradients, const float* weights, const std::uint8_t* mask, std::size_t count,
                      float strength);
};

const MaskLoops* avx2_mask_loops();
const MaskLoops* avx512_mask_loops();

}  // namespace sparsemae
