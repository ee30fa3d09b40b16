// JSON as a tree, for the headers of packed files. No exceptions: what is not JSON is nullopt.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sparsemae {

struct Json {
  enum class Kind { null, boolean, number, string, array, object };
  Kind kind = Kind::null;
  bool boolean = false;
  bool integer = false;  // a number without fraction and exponent
  double number = 0.0;
  std::string string;  // UTF-8; a lone surrogate is U+FFFD
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;  // in the order of the text, each name once

  // The member of an object; null where it is none, or has none.
  const Json* find(std::string_view name) const;
};

std::optional<Json> parse_json(std::string_view text);

// Whether a number is there that is written as a fraction.
bool is_real(const Json* value);
// A whole number in [least, most].
std::optional<std::size_t> whole(const Json* value, double least, double most);

}  // namespace sparsemae
