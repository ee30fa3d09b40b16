// Which tables this processor can run, and which one a model gets.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace sparsemae {

// All that run here, fastest first. The last is always the portable one.
std::vector<const Kernels*> usable_kernels();

// The table for a model: `exact` asks for fp32 products, `isa` ("" = the best, or a table's name) caps the choice: a model that
// the forced table cannot run exactly gets the fastest fp32 table below it. Throws std::invalid_argument for a name that is unknown or cannot run here.
const Kernels* choose_kernels(const std::string& isa, bool exact, bool odd_heads);

}  // namespace sparsemae
