// int8 products with tokens in the lanes, by AVX-VNNI: four inputs of 32 tokens are zipped, so that each token has its
// four side by side, and one vpdpbusd multiplies those of eight tokens by four kept weights of a row. Included by
// lane_kernels-inl.h.
//
//   quantized   a float per token, then uint8 [chunk][feature][32], 128 larger than what they stand for. A chunk has up
//               to four vectors of tokens: byte 4 v + i % 4 + i / 4 * 16 is token i of vector v, where packing puts it,
//               and from where zips bring it back in order
//   block       per slab and pair of rows the number of steps (uint16); what the sums of the rows start from (int32);
//               the steps
#ifndef SPARSEMAE_ZIP_PRODUCTS_INL_H
#define SPARSEMAE_ZIP_PRODUCTS_INL_H

#ifndef __AVXVNNI__
#error "zip_products-inl.h needs __AVXVNNI__"
#endif

namespace zips {

constexpr size_t kTokens = 32;
constexpr size_t kKept = 4;     // weights of a row in a step
constexpr size_t kSlab = 1024;  // inputs: 32 KB of a chunk stay in the first-level cache
constexpr int kOffset = 128;
static_assert(kLine == kTokens && kRows == 2);

// Of kRows rows: weights, and where their inputs are from the slab's first on, in bytes.
struct Step {
  struct {
    std::int8_t weight[kKept];
    std::uint16_t at[kKept];
  } row[kRows];
};

struct Header {
  size_t slabs, starts, steps;

  explicit Header(size_t columns)
      : slabs((columns + kSlab - 1) / kSlab),
        starts(round_up(slabs * kGroups * sizeof(std::uint16_t), 64)),
        steps(starts + kRowBlock * sizeof(std::int32_t)) {}
};

inline size_t pack_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  const Header header(l.columns);
  Row rows[kRowBlock];
  for (size_t r = 0; r < kRowBlock; ++r) rows[r] = source.row(source.context, block * kRowBlock + r);
  auto* bytes = static_cast<char*>(out);
  size_t total = 0, cursor[kRowBlock] = {};
  for (size_t s = 0; s < header.slabs; ++s)
    for (size_t first = 0; first < kRowBlock; first += kRows) {
      size_t kept[kRows] = {}, steps = 0;
      for (size_t r = 0; r < kRows; ++r) {
        const Row& row = rows[first + r];
        const size_t begin = cursor[first + r];
        while (begin + kept[r] < row.count && row.index[begin + kept[r]] / kSlab == s) ++kept[r];
        if ((kept[r] + kKept - 1) / kKept > steps) steps = (kept[r] + kKept - 1) / kKept;
      }
      if (out) {
        reinterpret_cast<std::uint16_t*>(bytes)[s * kGroups + first / kRows] = static_cast<std::uint16_t>(steps);
        auto* step = reinterpret_cast<Step*>(bytes + header.steps) + total;
        auto* starts = reinterpret_cast<std::int32_t*>(bytes + header.starts) + first;
        for (size_t r = 0; r < kRows; ++r)
          for (size_t i = 0; i < kept[r]; ++i) {  // the rest stays zero
            const size_t k = cursor[first + r] + i;
            auto& to = step[i / kKept].row[r];
            to.weight[i % kKept] = static_cast<std::int8_t>(rows[first + r].value[k]);
            to.at[i % kKept] = static_cast<std::uint16_t>(rows[first + r].index[k] % kSlab * kTokens);
            starts[r] -= kOffset * to.weight[i % kKept];
          }
      }
      for (size_t r = 0; r < kRows; ++r) cursor[first + r] += kept[r];
      total += steps;
    }
  return round_up(header.steps + total * sizeof(Step), 64);
}

// sum[v] of the eight tokens of a vector += the products of four weights and the inputs of 32 tokens at each of `in`.
inline void multiply_add(__m256i (&sum)[kVectors], __m256i weights, const __m256i (&in)[kKept]) {
  const __m256i low[2] = {_mm256_unpacklo_epi8(in[0], in[1]), _mm256_unpacklo_epi8(in[2], in[3])};
  const __m256i high[2] = {_mm256_unpackhi_epi8(in[0], in[1]), _mm256_unpackhi_epi8(in[2], in[3])};
  sum[0] = _mm256_dpbusd_avx_epi32(sum[0], _mm256_unpacklo_epi16(low[0], low[1]), weights);
  sum[1] = _mm256_dpbusd_avx_epi32(sum[1], _mm256_unpackhi_epi16(low[0], low[1]), weights);
  sum[2] = _mm256_dpbusd_avx_epi32(sum[2], _mm256_unpacklo_epi16(high[0], high[1]), weights);
  sum[3] = _mm256_dpbusd_avx_epi32(sum[3], _mm256_unpackhi_epi16(high[0], high[1]), weights);
}

// sums[kRowBlock][kVectors] += a block's slab; x is its first input. Returns the end of the steps.
inline const Step* accumulate(const Step* step, const std::uint16_t* counts, const char* x, __m256i* sums) {
  for (size_t group = 0; group < kGroups; ++group, sums += kRows * kVectors) {
    __m256i sum[kRows][kVectors];
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows * kVectors; ++i) sum[i / kVectors][i % kVectors] = sums[i];
    for (size_t count = counts[group]; count; --count, ++step)
#pragma GCC unroll 2
      for (size_t r = 0; r < kRows; ++r) {
        int weights;
        std::memcpy(&weights, step->row[r].weight, sizeof weights);
        const auto input = [&](size_t i) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + step->row[r].at[i]));
        };
        multiply_add(sum[r], _mm256_set1_epi32(weights), {input(0), input(1), input(2), input(3)});
      }
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows * kVectors; ++i) sums[i] = sum[i / kVectors][i % kVectors];
  }
  return step;
}

// As lanes::multiply, for int8; the sums that sink gets are scaled by what tokens have been divided by.
template <class Sink>
inline void multiply(const Geometry& g, const Linear& l, const void* quantized, size_t first_chunk, size_t last_chunk,
                     size_t first, size_t last, V* scratch, const Sink& sink) {
  const Chunks chunks(g);
  const Header header(l.columns);
  const auto* scales = static_cast<const float*>(quantized);
  const auto* x = reinterpret_cast<const char*>(scales + g.padded_tokens);
  auto* sums = reinterpret_cast<__m256i*>(scratch);
  const Step* next[kPassBlocks];
  for (; first < last; first += kPassBlocks) {
    const size_t blocks = last - first < kPassBlocks ? last - first : kPassBlocks;
    for (size_t chunk = first_chunk; chunk < last_chunk; ++chunk)
      for (size_t s = 0; s < header.slabs; ++s)
        for (size_t b = 0; b < blocks; ++b) {
          const char* data = static_cast<const char*>(l.data) + l.offsets[first + b];
          __m256i* to = sums + b * kRowBlock * kVectors;
          if (s == 0) {
            next[b] = reinterpret_cast<const Step*>(data + header.steps);
            const auto* starts = reinterpret_cast<const std::int32_t*>(data + header.starts);
            for (size_t i = 0; i < kRowBlock * kVectors; ++i) to[i] = _mm256_set1_epi32(starts[i / kVectors]);
          }
          next[b] = accumulate(next[b], reinterpret_cast<const std::uint16_t*>(data) + s * kGroups,
                               x + (chunk * l.columns + s * kSlab) * kTokens, to);
          if (s + 1 < header.slabs) continue;
          V* floats = scratch + b * kRowBlock * kVectors;
          const size_t vectors = chunks.size(chunk);
          for (size_t j = 0; j < vectors; ++j) {
            const V scale = V::load(scales + chunks.first_token(chunk) + j * V::kLanes);
            for (size_t r = 0; r < kRowBlock; ++r)
              floats[r * kVectors + j] = V{_mm256_cvtepi32_ps(to[r * kVectors + j])} * scale;
          }
          sink((first + b) * kRowBlock, chunk, vectors, floats);
        }
  }
}

// Rounds kCount vectors, all of a chunk or one; of a whole chunk, `vectors` have tokens.
template <size_t kCount>
inline void quantize_vectors(const float* from, size_t features, size_t vectors, float* scales, char* to) {
  V maximum[kCount], inverse[kCount];
  for (V& m : maximum) m = V::set(1e-30f);
  for (size_t d = 0; d < features; ++d)
    for (size_t j = 0; j < kCount; ++j) {
      const V x = V::load(from + d * kLine + j * V::kLanes);
      maximum[j] = V::max(maximum[j], V::max(x, V::zero() - x));
    }
  for (size_t j = 0; j < kCount; ++j) {
    if (j < vectors) V::store(scales + j * V::kLanes, maximum[j] * V::set(1.0f / 127.0f));
    inverse[j] = V::div(V::set(127.0f), maximum[j]);
  }
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(kOffset));
  for (size_t d = 0; d < features; ++d, to += kTokens) {
    const auto pair = [&](size_t j) {
      const auto rounded = [&](size_t i) {
        return _mm256_cvtps_epi32((V::load(from + d * kLine + i * V::kLanes) * inverse[i]).x);
      };
      return _mm256_packs_epi32(rounded(j % kCount), rounded((j + 1) % kCount));
    };
    const __m256i bytes = _mm256_xor_si256(_mm256_packs_epi16(pair(0), pair(2)), offset);
    if constexpr (kCount == kVectors) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
    } else {
      const int halves[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
      std::memcpy(to, &halves[0], 4);
      std::memcpy(to + 16, &halves[1], 4);
    }
  }
}

inline void quantize(const Geometry& g, size_t features, const void* activation, void* quantized, size_t first,
                     size_t last) {
  const Chunks chunks(g);
  auto* scales = static_cast<float*>(quantized);
  auto* bytes = reinterpret_cast<char*>(scales + g.padded_tokens);
  for (size_t chunk = 0; chunk < chunks.count; ++chunk) {
    const size_t begin = chunks.first(chunk), vectors = chunks.size(chunk);
    const float* from = static_cast<const float*>(activation) + chunk * features * kLine;
    char* to = bytes + chunk * features * kTokens;
    if (first <= begin * V::kLanes && (begin + vectors) * V::kLanes <= last) {
      quantize_vectors<kVectors>(from, features, vectors, scales + begin * V::kLanes, to);
      continue;
    }
    for (size_t j = 0; j < vectors; ++j)
      if (const size_t token = (begin + j) * V::kLanes; first <= token && token < last)
        quantize_vectors<1>(from + j * V::kLanes, features, 1, scales + token, to + 4 * j);
  }
}

// As lanes::peak, for a step.
inline sparsemae::Peak peak(size_t rounds, float* sink) {
  __m256i sums[kRows][kVectors] = {}, inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sink));
  const __m256i weights = inputs;
  for (size_t round = 0; round < rounds; ++round)
#pragma GCC unroll 2
    for (auto& sum : sums) {
      __asm__("" : "+x"(inputs));  // or the zips of one step would do for all
      multiply_add(sum, weights, {inputs, weights, inputs, weights});
    }
  for (size_t i = 1; i < kRows * kVectors; ++i)
    sums[0][0] = _mm256_add_epi32(sums[0][0], sums[i / kVectors][i % kVectors]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sink), sums[0][0]);
  return {"zips + vpdpbusd", rounds * kRows * kKept * kTokens};
}

}  // namespace zips

#endif  // SPARSEMAE_ZIP_PRODUCTS_INL_H
