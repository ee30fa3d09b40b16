// A training step's passes over its latent weights, on a CPU: which are kept, and the kept ones in bf16. Threads take
// equal parts of the groups; what comes out does not depend on their number.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsemae {

// The n of largest magnitude in each of `groups` groups of m finite weights; of equal ones the first. mask: 0 or 1
// each. kept: null, or what kept_bf16 makes of them.
void select_kept(const float* weights, std::size_t groups, std::size_t m, std::size_t n, std::size_t threads,
                 std::uint8_t* mask, std::uint16_t* kept);
// Kept weights rounded to bf16, to nearest even as torch does; the others 0.
void kept_bf16(const float* weights, const std::uint8_t* mask, std::size_t count, std::size_t threads,
               std::uint16_t* out);

// gradients += strength * weights where the mask is 0: SR-STE's term.
void pull_pruned(float* gradients, const float* weights, const std::uint8_t* mask, std::size_t count, float strength,
                 std::size_t threads);

}  // namespace sparsemae
