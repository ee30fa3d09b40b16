#include "masks.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace sparsemae {
namespace {

constexpr std::size_t kLeast = 1 << 16;  // weights a thread is started for

// part(begin, end) of [0, count) in equal parts, each of a thread of its own where it may start.
template <class Part>
void in_parts(std::size_t count, std::size_t weights_each, std::size_t threads, const Part& part) {
  threads = std::clamp<std::size_t>(count * weights_each / kLeast, 1, threads);
  std::vector<std::thread> others;
  const std::size_t each = (count + threads - 1) / threads;
  std::size_t begin = 0;
  try {
    for (; begin + each < count; begin += each) others.emplace_back(part, begin, begin + each);
  } catch (const std::system_error&) {  // no more threads: the rest is done here
  }
  part(begin, count);
  for (std::thread& other : others) other.join();
}

// One group. Magnitudes are compared as integers, in the order of the floats they are the bits of. `keys` is scratch.
template <std::size_t kM>
void select_group(const float* weights, std::size_t m, std::size_t n, std::int32_t* keys, std::uint8_t* mask) {
  const std::size_t size = kM ? kM : m;
  std::memcpy(keys, weights, size * sizeof(float));
  for (std::size_t i = 0; i < size; ++i) keys[i] &= 0x7fffffff;
  // From the largest magnitude down to the least that is kept, equal ones together.
  std::int32_t bound = std::numeric_limits<std::int32_t>::max(), least = bound;
  std::size_t kept = 0;
  while (kept < n) {
    least = -1;
    for (std::size_t i = 0; i < size; ++i) least = std::max(least, keys[i] <= bound ? keys[i] : -1);
    std::int32_t equal = 0;
    for (std::size_t i = 0; i < size; ++i) equal += keys[i] == least;
    kept += static_cast<std::size_t>(equal);
    bound = least - 1;
  }
  for (std::size_t i = 0; i < size; ++i) mask[i] = keys[i] >= least;
  for (std::size_t i = size; kept > n; --kept) {  // the last of equal ones are too many
    while (keys[--i] != least) {
    }
    mask[i] = 0;
  }
}

}  // namespace

void select_kept(const float* weights, std::size_t groups, std::size_t m, std::size_t n, std::size_t threads,
                 std::uint8_t* mask) {
  in_parts(groups, m, threads, [=](std::size_t begin, std::size_t end) {
    std::vector<std::int32_t> keys(m);
    for (std::size_t group = begin; group < end; ++group) {
      const auto select = m == 32 ? select_group<32> : select_group<0>;
      select(weights + group * m, m, n, keys.data(), mask + group * m);
    }
  });
}

void kept_bf16(const float* weights, const std::uint8_t* mask, std::size_t count, std::size_t threads,
               std::uint16_t* out) {
  in_parts(count, 1, threads, [=](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, weights + i, sizeof bits);
      const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      out[i] = static_cast<std::uint16_t>(mask[i] ? rounded : 0);
    }
  });
}

void pull_pruned(float* gradients, const float* weights, const std::uint8_t* mask, std::size_t count, float strength,
                 std::size_t threads) {
  in_parts(count, 1, threads, [=](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {  // without a branch, so that it is done by vectors
      float pull = strength * weights[i];
      std::uint32_t bits;
      std::memcpy(&bits, &pull, sizeof bits);
      bits &= mask[i] - 1u;
      std::memcpy(&pull, &bits, sizeof bits);
      gradients[i] += pull;
    }
  });
}

}  // namespace sparsemae
