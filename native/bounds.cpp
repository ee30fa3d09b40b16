#include "bounds.h"

#include <algorithm>
#include <cmath>

namespace sparsemae {
namespace {

using Vectors = std::map<std::string, std::vector<float>>;

// A normalized feature is at most sqrt(width): it were the only one that differs from the mean.
float norm_bound(const Vectors& vectors, const std::string& name, std::size_t width) {
  const auto &weight = vectors.at(name + ".weight"), &bias = vectors.at(name + ".bias");
  const float peak = std::sqrt(static_cast<float>(width));
  float bound = 0.0f;
  for (std::size_t d = 0; d < width; ++d) bound = std::max(bound, std::abs(weight[d]) * peak + std::abs(bias[d]));
  return bound;
}

// The largest output of the rows from `first` on, for inputs up to `input`.
float output_bound(const Weights& w, const Vectors& vectors, const std::string& name, float input, std::size_t first) {
  const auto bias = vectors.find(name + ".bias");
  float bound = 0.0f;
  for (std::size_t r = first; r < w.rows; ++r) {
    float sum = 0.0f;
    for (std::size_t i = r * w.kept(); i < (r + 1) * w.kept(); ++i) sum += std::abs(w.value(i));
    if (w.row_scale) sum *= std::abs(w.row_scale[r]);
    bound = std::max(bound, sum * input + (bias == vectors.end() ? 0.0f : std::abs(bias->second[r])));
  }
  return bound;
}

}  // namespace

float InputBounds::max() const { return std::max({qkv, proj, fc1, fc2}); }

InputBounds input_bounds(const std::map<std::string, Weights>& weights, const Vectors& vectors,
                         const std::string& block, std::size_t width) {
  InputBounds b;
  b.qkv = norm_bound(vectors, block + "norm1", width);
  b.fc1 = norm_bound(vectors, block + "norm2", width);
  // attention averages values, GELU shrinks
  b.proj = output_bound(weights.at(block + "attn.qkv.weight"), vectors, block + "attn.qkv", b.qkv, 2 * width);
  b.fc2 = output_bound(weights.at(block + "mlp.fc1.weight"), vectors, block + "mlp.fc1", b.fc1, 0);
  return b;
}

}  // namespace sparsemae
