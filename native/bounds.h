// How large the inputs of a block's linear layers can get, whatever the image: for tables whose numbers have a small
// range.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "vit.h"

namespace sparsemae {

struct InputBounds {
  float qkv, proj, fc1, fc2;
  float max() const;
};

// Of the block whose tensors' names start with `block`.
InputBounds input_bounds(const std::map<std::string, Weights>&, const std::map<std::string, std::vector<float>>&,
                         const std::string& block, std::size_t width);

}  // namespace sparsemae
