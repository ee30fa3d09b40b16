#include "masks.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "mask_loops.h"
#include "processor.h"

namespace sparsemae {
namespace {

#include "mask_loops-inl.h"

constexpr std::size_t kLeast = 1 << 16;  // weights a thread is started for

const MaskLoops& loops() {
#if defined(SPARSEMAE_X86)
  if (this_processor().avx512) return *avx512_mask_loops();
  if (this_processor().avx2) return *avx2_mask_loops();
#endif
  return kMaskLoops;
}

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

}  // namespace

void select_kept(const float* weights, std::size_t groups, std::size_t m, std::size_t n, std::size_t threads,
                 std::uint8_t* mask, std::uint16_t* kept) {
  in_parts(groups, m, threads, [=](std::size_t begin, std::size_t end) {
    std::vector<std::int32_t> keys(m);
    loops().select_kept(weights + begin * m, end - begin, m, n, keys.data(), mask + begin * m,
                        kept ? kept + begin * m : nullptr);
  });
}

void kept_bf16(const float* weights, const std::uint8_t* mask, std::size_t count, std::size_t threads,
               std::uint16_t* out) {
  in_parts(count, 1, threads, [=](std::size_t begin, std::size_t end) {
    loops().kept_bf16(weights + begin, mask + begin, end - begin, out + begin);
  });
}

void pull_pruned(float* gradients, const float* weights, const std::uint8_t* mask, std::size_t count, float strength,
                 std::size_t threads) {
  in_parts(count, 1, threads, [=](std::size_t begin, std::size_t end) {
    loops().pull_pruned(gradients + begin, weights + begin, mask + begin, end - begin, strength);
  });
}

}  // namespace sparsemae
