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

// All rows of a layer for parts of the tokens. quantized: where the inputs are rounded to, or null where a norm has
// done it or nothing is rounded.
inline void linear_rounded(const Kernels& kernels, const Geometry& g, const Linear& layer, const void* input,
                           void* quantized, Output kind, const float* residual, void* output, std::size_t first_part,
                           std::size_t last_part, void* scratch) {
  const std::size_t blocks = layer.rows / kRowBlock;
  if (!quantized)
    return kernels.linear(g, layer, input, kind, residual, output, first_part, last_part, 0, blocks, scratch);
  for (std::size_t part = first_part; part < last_part; ++part) {
    kernels.quantize(g, layer.columns, input, quantized, kernels.part_begin(g, part), kernels.part_begin(g, part + 1));
    kernels.linear(g, layer, quantized, kind, residual, output, part, part + 1, 0, blocks, scratch);
  }
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
