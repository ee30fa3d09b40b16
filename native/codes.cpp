#include "codes.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

namespace sparsemae {
namespace {

constexpr std::uint64_t kSaturated = std::numeric_limits<std::uint64_t>::max();
constexpr unsigned kMaxGroup = 256;
constexpr std::uint64_t kTableLimit = 1 << 16;

// C(p, i) for i <= n, p <= m, saturated.
class Binomials {
 public:
  Binomials(unsigned n, unsigned m) : width_(m + 1), values_((n + 1) * width_) {
    for (unsigned p = 0; p <= m; ++p) values_[p] = 1;
    for (unsigned i = 1; i <= n; ++i)
      for (unsigned p = 1; p <= m; ++p) {
        const std::uint64_t a = at(p - 1, i - 1), b = at(p - 1, i);
        values_[i * width_ + p] = a > kSaturated - b ? kSaturated : a + b;
      }
  }
  std::uint64_t at(unsigned p, unsigned i) const { return values_[i * width_ + p]; }

 private:
  std::size_t width_;
  std::vector<std::uint64_t> values_;
};

void unrank(const Binomials& binomials, std::uint64_t rank, unsigned n, unsigned m, std::uint8_t* positions) {
  unsigned p = m;
  for (unsigned i = n; i > 0; --i) {  // greedy: the largest p with C(p, i) <= rank
    do --p;
    while (binomials.at(p, i) > rank);
    rank -= binomials.at(p, i);
    positions[i - 1] = static_cast<std::uint8_t>(p);
  }
}

std::string out_of_range(std::size_t group, unsigned n, unsigned m) {
  return "code of group " + std::to_string(group) + " is out of range for " + std::to_string(n) + ":" +
         std::to_string(m);
}

[[noreturn]] void throw_out_of_range(std::size_t group, unsigned n, unsigned m) {
  throw std::invalid_argument(out_of_range(group, n, m));
}

// `bits` <= 64 bits from bit `at` on; reads no byte beyond those that hold them.
std::uint64_t read_bits(const std::uint8_t* bytes, std::size_t at, unsigned bits) {
  std::uint64_t value = 0;
  unsigned have = 0;
  std::size_t byte = at / 8;
  unsigned skip = at % 8;
  while (have < bits) {
    const std::uint64_t part = static_cast<std::uint64_t>(bytes[byte++]) >> skip;
    value |= part << have;
    have += 8 - skip;
    skip = 0;
  }
  return bits == 64 ? value : value & ((std::uint64_t{1} << bits) - 1);
}

void decode_bitmaps(const std::uint8_t* codes, std::size_t groups, unsigned n, unsigned m, std::uint8_t* out) {
  for (std::size_t group = 0; group < groups; ++group) {
    unsigned kept = 0;
    for (unsigned j = 0; j < m; ++j) {
      if (!read_bits(codes, group * m + j, 1)) continue;
      if (kept == n) throw_out_of_range(group, n, m);
      out[group * n + kept++] = static_cast<std::uint8_t>(j);
    }
    if (kept != n) throw_out_of_range(group, n, m);
  }
}

const char* wrong_length(const std::uint8_t* codes, std::size_t bytes, std::size_t groups, unsigned bits, unsigned n,
                         unsigned m) {
  if (groups > std::numeric_limits<std::size_t>::max() / (m + n) || bytes != (groups * bits + 7) / 8)
    return "codes have the wrong number of bytes";
  if (const unsigned spare = groups * bits % 8; spare && codes[bytes - 1] >> spare)
    return "codes end in padding bits that are not zero";
  return nullptr;
}

// Of a code that is no bitmap, whose count is not saturated.
unsigned rank_bits(std::uint64_t count) { return static_cast<unsigned>(std::bit_width(count - 1)); }

constexpr const char* kWrongPattern = "pattern must have 1 <= n <= m <= 256";

}  // namespace

std::string wrong_codes(const std::uint8_t* codes, std::size_t bytes, std::size_t groups, unsigned n, unsigned m) {
  if (n < 1 || n > m || m > kMaxGroup) return kWrongPattern;
  const std::uint64_t count = Binomials(n, m).at(m, n);
  const bool bitmap = count == kSaturated;
  const unsigned bits = bitmap ? m : rank_bits(count);
  if (const char* wrong = wrong_length(codes, bytes, groups, bits, n, m)) return wrong;
  for (std::size_t group = 0; group < groups; ++group) {
    unsigned kept = bitmap ? 0 : n;
    for (unsigned j = 0; bitmap && j < m; ++j) kept += static_cast<unsigned>(read_bits(codes, group * m + j, 1));
    if (kept != n || (!bitmap && bits && read_bits(codes, group * bits, bits) >= count))
      return out_of_range(group, n, m);
  }
  return "";
}

std::vector<std::uint8_t> decode_positions(const std::uint8_t* codes, std::size_t bytes, std::size_t groups, unsigned n,
                                           unsigned m) {
  if (n < 1 || n > m || m > kMaxGroup) throw std::invalid_argument(kWrongPattern);
  const Binomials binomials(n, m);
  const std::uint64_t count = binomials.at(m, n);
  const bool bitmap = count == kSaturated;
  const unsigned bits = bitmap ? m : rank_bits(count);
  if (const char* wrong = wrong_length(codes, bytes, groups, bits, n, m)) throw std::invalid_argument(wrong);
  std::vector<std::uint8_t> positions(groups * n);
  if (bitmap) {
    decode_bitmaps(codes, groups, n, m, positions.data());
    return positions;
  }
  std::vector<std::uint8_t> table;
  if (count <= kTableLimit && groups > count) {
    table.resize(static_cast<std::size_t>(count) * n);
    for (std::uint64_t rank = 0; rank < count; ++rank) unrank(binomials, rank, n, m, &table[rank * n]);
  }
  for (std::size_t group = 0; group < groups; ++group) {
    const std::uint64_t rank = bits ? read_bits(codes, group * bits, bits) : 0;
    if (rank >= count) throw_out_of_range(group, n, m);
    if (table.empty())
      unrank(binomials, rank, n, m, &positions[group * n]);
    else
      std::copy_n(&table[rank * n], n, &positions[group * n]);
  }
  return positions;
}

}  // namespace sparsemae
