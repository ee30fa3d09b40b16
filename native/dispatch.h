// Which tables this processor can run, and which one a model gets.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace sparsemae {

// All that run here, fastest first. The last is always the portable one.
std::vector<const Kernels*> usable_kernels();

// What a model asks of a table.
struct Needs {
  bool exact = false;  // fp32 products
  bool odd_heads = false;
  bool quantize = false;   // int8 layers whose inputs may be rounded to int8
  float density = 0.0f;    // the largest fraction of its weights that a layer keeps
  float max_input = 0.0f;  // a bound on what a linear layer can get as its input
};

// The table that `isa` names where it can run the model, otherwise the fastest for it among those below ("": among
// all). Throws std::invalid_argument for a name that is unknown or cannot run here.
const Kernels* choose_kernels(const std::string& isa, const Needs&);

}  // namespace sparsemae
