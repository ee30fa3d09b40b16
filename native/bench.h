// How fast the kernels of a model are, each by itself: `sparsemae benchmark --section kernels`.
#pragma once

#include <string>
#include <vector>

#include "vit.h"

namespace sparsemae {

struct KernelTiming {
  std::string kernel;
  double seconds = 0.0;      // of one image
  std::string instructions;  // what its products are made of; empty for a norm
  double peak = 0.0;         // multiply-adds per second of these instructions on registers alone
  bool zeros = false;        // that rate counts the zeros of sparse weights
};

// The kernels of the model's first block on the calling thread: norm, the four linear layers and attention as the
// forward runs them (with bias, GELU, sums into the residual, and rounding of int8 inputs). The shortest of `rounds`
// runs, in turn, counts, because whatever else runs on the processor only makes a run longer.
std::vector<KernelTiming> time_kernels(Vit&, std::size_t rounds);

}  // namespace sparsemae
