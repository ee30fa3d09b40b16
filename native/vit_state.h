// What building and running a model share and nobody else needs.
#pragma once

#include <cstring>
#include <new>

#include "vit.h"

namespace sparsemae {

constexpr std::size_t kStagesPerImage = 8;
constexpr std::size_t kStagesPerBlock = 8;

// Zeroed, 64-byte aligned; `count` may be 0.
template <class T>
Aligned<T> aligned_array(std::size_t count) {
  void* memory = ::operator new[](round_up(count * sizeof(T), 64) + 64, std::align_val_t{64});
  std::memset(memory, 0, round_up(count * sizeof(T), 64) + 64);
  return Aligned<T>(static_cast<T*>(memory));
}

inline std::size_t residual_index(const Kernels& kernels, const Geometry& g, std::size_t token, std::size_t feature) {
  return kernels.blocked_residual ? residual_at(g, token, feature) : token * g.width + feature;
}

struct Vit::Workspace {
  Aligned<float> residual;
  Aligned<char> patches, normed, attended, hidden;
  // Inputs of int8 layers; of fc2 by itself, because where threads keep to their own tokens, one may already round the
  // inputs of fc1 while another is still at fc2, and the two are of different lengths.
  Aligned<char> quantized, quantized_hidden;
  std::vector<float> pooled;
};

}  // namespace sparsemae
