// Group codes to kept positions; the format and its slow twin are in sparsemae/packing/codec.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sparsemae {

// Kept positions of `groups` groups of n:m, ascending within each, [groups][n].
// Throws std::invalid_argument when the codes are not exactly as long as they must be, or one is out of range.
std::vector<std::uint8_t> decode_positions(const std::uint8_t* codes, std::size_t bytes, std::size_t groups, unsigned n,
                                           unsigned m);

// What decode_positions would throw, in words; empty: nothing.
std::string wrong_codes(const std::uint8_t* codes, std::size_t bytes, std::size_t groups, unsigned n, unsigned m);

}  // namespace sparsemae
