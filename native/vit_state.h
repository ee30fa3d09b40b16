// What building and running a model share and nobody else needs.
#pragma once

#include <cstring>
#include <new>

#include "vit.h"

namespace sparsemae {

// Zeroed, 64-byte aligned; `count` may be 0.
template <class T>
Aligned<T> aligned_array(std::size_t count) {
  void* memory = ::operator new[](round_up(count * sizeof(T), 64) + 64, std::align_val_t{64});
  std::memset(memory, 0, round_up(count * sizeof(T), 64) + 64);
  return Aligned<T>(static_cast<T*>(memory));
}

// Floats of a residual of one image.
inline std::size_t residual_size(const Geometry& g) { return g.padded_tokens / kTokenUnit * residual_unit(g); }

inline std::size_t residual_index(const Kernels& kernels, const Geometry& g, std::size_t token, std::size_t feature) {
  return kernels.blocked_residual ? residual_at(g, token, feature) : token * g.width + feature;
}

struct Vit::State {
  Aligned<float> residual, fused;   // fused: the sum of a segmenter's projected maps so far
  Aligned<char> normed, quantized;  // quantized: of an int8 layer
};

struct Vit::Workspace {
  Aligned<char> patches, attended, hidden;
  // Inputs of int8 layers. Each has its own, because where threads keep to their own tokens, one may already be a layer
  // further than another, and they are of different lengths.
  Aligned<char> quantized, quantized_hidden;
  Aligned<char> head_input, head_hidden;  // of a segmenter's head
  Aligned<float> logits;
  std::vector<float> pooled, result;
};

}  // namespace sparsemae
