// Plain loops that the compiler makes vectors of; included once for each instruction set, in an anonymous namespace.

// One group. Magnitudes are compared as integers, in the order of the floats they are the bits of. kM: its size, known
// so that it stays in registers; 0 where it is `m`.
template <std::size_t kM>
inline void select_group(const float* weights, std::size_t m, std::size_t n, std::int32_t* scratch,
                         std::uint8_t* mask) {
  const std::size_t size = kM ? kM : m;
  alignas(64) std::int32_t own[kM ? kM : 1];
  std::int32_t* const keys = kM ? own : scratch;
  std::memcpy(keys, weights, size * sizeof(float));
  for (std::size_t i = 0; i < size; ++i) keys[i] &= 0x7fffffff;
  // From the largest magnitude down to the least that is kept, equal ones together.
  std::int32_t bound = 0x7fffffff, least = bound;
  std::size_t chosen = 0;
  while (chosen < n) {
    least = -1;
    for (std::size_t i = 0; i < size; ++i) {
      const std::int32_t key = keys[i] <= bound ? keys[i] : -1;
      least = key > least ? key : least;
    }
    std::int32_t equal = 0;
    for (std::size_t i = 0; i < size; ++i) equal += keys[i] == least;
    chosen += static_cast<std::size_t>(equal);
    bound = least - 1;
  }
  for (std::size_t i = 0; i < size; ++i) mask[i] = keys[i] >= least;
  for (std::size_t i = size; chosen > n; --chosen) {  // the last of equal ones are too many
    while (keys[--i] != least) {
    }
    mask[i] = 0;
  }
}

inline void kept_bf16(const float* weights, const std::uint8_t* mask, std::size_t count, std::uint16_t* out) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, weights + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[i] = static_cast<std::uint16_t>(mask[i] ? rounded : 0);
  }
}

template <std::size_t kM>
inline void select_groups(const float* weights, std::size_t groups, std::size_t m, std::size_t n, std::int32_t* keys,
                          std::uint8_t* mask, std::uint16_t* kept) {
  const std::size_t size = kM ? kM : m;
  for (std::size_t group = 0; group < groups; ++group, weights += size, mask += size) {
    select_group<kM>(weights, m, n, keys, mask);
    if (kept) kept_bf16(weights, mask, size, kept), kept += size;
  }
}

void select_kept(const float* weights, std::size_t groups, std::size_t m, std::size_t n, std::int32_t* keys,
                 std::uint8_t* mask, std::uint16_t* kept) {
  (m == 32 ? select_groups<32> : select_groups<0>)(weights, groups, m, n, keys, mask, kept);
}

void pull_pruned(float* gradients, const float* weights, const std::uint8_t* mask, std::size_t count, float strength) {
  for (std::size_t i = 0; i < count; ++i) {  // without a branch, so that it is done by vectors
    float pull = strength * weights[i];
    std::uint32_t bits;
    std::memcpy(&bits, &pull, sizeof bits);
    bits &= mask[i] - 1u;
    std::memcpy(&pull, &bits, sizeof bits);
    gradients[i] += pull;
  }
}

constexpr sparsemae::MaskLoops kMaskLoops{select_kept, kept_bf16, pull_pruned};
