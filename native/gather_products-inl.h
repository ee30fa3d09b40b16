// Products of sparse weights by gathers inside a register: 64 bytes of a token's inputs are one register, so one vpermw
// or vpermb fetches what 16 rows keep of them, and one dot-product instruction multiplies that. No gather touches
// memory. Included inside the anonymous namespace of a file of kernels.
//
// Tokens are rows of inputs, cut in tiles of 64 bytes. kTokens tokens and one block of rows are multiplied at a time:
// the sums stay in registers, an index and a weight serve all these tokens, an input both halves of the block. These
// tokens meet all blocks of rows while they are in the first-level cache. Inputs too wide for that are taken in slabs
// where sums can go into the residual one slab after the other.
//
// A block of 32 rows:
//   slabs        per slab where its records begin in the block (uint32)
//   counts       per tile the pairs of records that it has (uint8); the half with fewer kept weights is filled with
//   zeros start        int8 only: per slab what the sums of the 32 rows start from (int32) records      per tile,
//   `count` times for rows 0 to 15 and 16 to 31: {64 bytes of indices, 64 bytes of weights}
// A block of a dense layer has no indices: one record {64 bytes of weights} for every 4 bytes of inputs and half.
#ifndef SPARSEMAE_GATHER_PRODUCTS_INL_H
#define SPARSEMAE_GATHER_PRODUCTS_INL_H

#ifndef __AVX512BF16__
#error "gather_products-inl.h needs __AVX512BF16__"
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define SPARSEMAE_INT8
#endif

#include "bf16_math-inl.h"

namespace gather {

constexpr size_t kHalf = 16;   // rows in a register of sums
constexpr size_t kTokens = 8;  // 16 sums: with more GCC 12 keeps some of them in memory
constexpr size_t kSlabTiles =
    48;  // of kTokens tokens 24 KB: they and the weights of a block stay in the first-level cache

inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }

// Two weights per row and register.
struct Bf16 {
  using Element = std::uint16_t;
  using Sum = __m512;
  static constexpr size_t kTile = 32;  // inputs
  static constexpr size_t kKept = 2;   // weights of a row in a record
  static Element element(float w) { return to_bf16(w); }
  static Sum multiply_add(Sum sum, __m512i index, __m512i weights, __m512i inputs) {
    return _mm512_dpbf16_ps(sum, as_bf16(weights), as_bf16(_mm512_permutexvar_epi16(index, inputs)));
  }
  static Sum multiply_add_dense(Sum sum, __m512i weights, __m512i inputs) {
    return _mm512_dpbf16_ps(sum, as_bf16(weights), as_bf16(inputs));
  }
  static __m512 to_float(Sum sum) { return sum; }
};

#if defined(SPARSEMAE_INT8)
// Four weights per row and register. Inputs are unsigned, 128 larger than what they stand for; the sums start from what
// that adds to them.
struct Int8 {
  using Element = std::uint8_t;
  using Sum = __m512i;
  static constexpr size_t kTile = 64;
  static constexpr size_t kKept = 4;
  static constexpr int kOffset = 128;
  static Element element(float w) { return static_cast<Element>(static_cast<std::int8_t>(w)); }
  static Sum multiply_add(Sum sum, __m512i index, __m512i weights, __m512i inputs) {
    return _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(index, inputs), weights);
  }
  static __m512 to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};
#endif

template <class P>
inline size_t tiles_of(size_t features) {
  return (features + P::kTile - 1) / P::kTile;
}
inline size_t slabs_of(size_t tiles) { return (tiles + kSlabTiles - 1) / kSlabTiles; }

// The parts of a block that come before its records.
struct Header {
  size_t counts, start, bytes;

  Header(size_t tiles, bool with_start)
      : counts(slabs_of(tiles) * sizeof(std::uint32_t)),
        start(round_up(counts + tiles, 64)),
        bytes(start + (with_start ? slabs_of(tiles) * kRowBlock * sizeof(std::int32_t) : 0)) {}
};

template <class P>
size_t pack_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  constexpr bool kStarts = !std::is_same_v<P, Bf16>;
  const size_t tiles = tiles_of<P>(l.columns);
  const Header header(tiles, kStarts);
  auto* bytes = static_cast<char*>(out);
  Row rows[kRowBlock];
  for (size_t r = 0; r < kRowBlock; ++r) rows[r] = source.row(source.context, block * kRowBlock + r);
  size_t at = header.bytes, cursor[kRowBlock] = {};
  for (size_t tile = 0; tile < tiles; ++tile) {
    size_t kept[kRowBlock] = {}, records = 0;
    for (size_t r = 0; r < kRowBlock; ++r) {
      while (cursor[r] + kept[r] < rows[r].count && rows[r].index[cursor[r] + kept[r]] / P::kTile == tile) ++kept[r];
      if ((kept[r] + P::kKept - 1) / P::kKept > records) records = (kept[r] + P::kKept - 1) / P::kKept;
    }
    if (out) {
      if (tile % kSlabTiles == 0)
        reinterpret_cast<std::uint32_t*>(bytes)[tile / kSlabTiles] = static_cast<std::uint32_t>(at);
      bytes[header.counts + tile] = static_cast<char>(records);
      auto* starts = reinterpret_cast<std::int32_t*>(bytes + header.start) + tile / kSlabTiles * kRowBlock;
      for (size_t r = 0; r < kRowBlock; ++r)
        for (size_t i = 0; i < records * P::kKept; ++i) {
          auto* record = reinterpret_cast<typename P::Element*>(bytes + at + (i / P::kKept * 2 + r / kHalf) * 128);
          const size_t lane = r % kHalf * P::kKept + i % P::kKept, k = cursor[r] + i;
          const bool real = i < kept[r];
          record[lane] = static_cast<typename P::Element>(real ? rows[r].index[k] % P::kTile : 0);
          record[64 / sizeof(typename P::Element) + lane] =
              real ? P::element(rows[r].value[k]) : typename P::Element{0};
          if constexpr (kStarts)
            if (real) starts[r] -= P::kOffset * static_cast<std::int32_t>(rows[r].value[k]);
        }
    }
    for (size_t r = 0; r < kRowBlock; ++r) cursor[r] += kept[r];
    at += records * 256;
  }
  return at;
}

inline size_t pack_dense_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  const size_t pairs = tiles_of<Bf16>(l.columns) * 16;
  auto* record = static_cast<std::uint16_t*>(out);
  for (size_t r = 0; record && r < kRowBlock; ++r) {
    const Row row = source.row(source.context, block * kRowBlock + r);
    for (size_t k = 0; k < 2 * pairs; ++k)
      record[(k / 2 * 2 + r / kHalf) * 32 + r % kHalf * 2 + k % 2] = k < row.count ? to_bf16(row.value[k]) : 0;
  }
  return pairs * 128;
}

// The sums of a block for kTokens tokens, [half][token].
template <class P>
using Sums = typename P::Sum[2][kTokens];

// Adds `tiles` tiles of inputs to sums that begin with `start`. x is the first token's; the next is `stride` bytes on.
template <class P>
__attribute__((noinline)) void accumulate(const char* record, const char* counts, size_t tiles, const char* x,
                                          size_t stride, const typename P::Sum start[2], Sums<P>& to) {
  Sums<P> sums;
#pragma GCC unroll 8
  for (size_t t = 0; t < kTokens; ++t) sums[0][t] = start[0], sums[1][t] = start[1];
  for (size_t tile = 0; tile < tiles; ++tile, x += 64)
    for (auto left = static_cast<std::uint8_t>(counts[tile]); left; --left, record += 256) {
      const __m512i index[2] = {_mm512_load_si512(record), _mm512_load_si512(record + 128)};
      const __m512i weights[2] = {_mm512_load_si512(record + 64), _mm512_load_si512(record + 192)};
#pragma GCC unroll 8
      for (size_t t = 0; t < kTokens; ++t) {
        const __m512i inputs = _mm512_loadu_si512(x + t * stride);
        sums[0][t] = P::multiply_add(sums[0][t], index[0], weights[0], inputs);
        sums[1][t] = P::multiply_add(sums[1][t], index[1], weights[1], inputs);
      }
    }
#pragma GCC unroll 8
  for (size_t t = 0; t < kTokens; ++t) to[0][t] = sums[0][t], to[1][t] = sums[1][t];
}

// As accumulate, for a block of a dense layer.
__attribute__((noinline)) inline void accumulate_dense(const char* record, size_t pairs, const char* x, size_t stride,
                                                       Sums<Bf16>& to) {
  Sums<Bf16> sums;
#pragma GCC unroll 8
  for (size_t t = 0; t < kTokens; ++t) sums[0][t] = sums[1][t] = _mm512_setzero_ps();
  for (size_t pair = 0; pair < pairs; ++pair, record += 128, x += 4) {
    const __m512i weights[2] = {_mm512_load_si512(record), _mm512_load_si512(record + 64)};
#pragma GCC unroll 8
    for (size_t t = 0; t < kTokens; ++t) {
      int both;
      __builtin_memcpy(&both, x + t * stride, sizeof both);
      const __m512i inputs = _mm512_set1_epi32(both);
      sums[0][t] = Bf16::multiply_add_dense(sums[0][t], weights[0], inputs);
      sums[1][t] = Bf16::multiply_add_dense(sums[1][t], weights[1], inputs);
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < kTokens; ++t) to[0][t] = sums[0][t], to[1][t] = sums[1][t];
}

// Multiplies blocks [first, last) of a layer with tokens [first_token, last_token), whole tiles of kTokens, whose
// inputs are `stride` bytes apart. sink(token, row, slab, low, high) gets the scaled sums of a block's rows, from `row`
// on, for one token: with `slabwise` one slab after the other, otherwise whole. token_scale: what a token's inputs have
// been divided by, or null.
template <class P, class Sink>
inline void multiply(const Linear& l, const char* x, size_t stride, const float* token_scale, size_t first_token,
                     size_t last_token, size_t first, size_t last, bool slabwise, const Sink& sink) {
  const size_t tiles = tiles_of<P>(l.columns), all_slabs = slabs_of(tiles);
  const size_t slabs = slabwise && !l.dense ? all_slabs : 1;
  const Header header(tiles, token_scale != nullptr);
  for (size_t token = first_token; token < last_token; token += kTokens)
    for (size_t slab = 0; slab < slabs; ++slab)
      for (size_t block = first; block < last; ++block) {
        const char* data = static_cast<const char*>(l.data) + l.offsets[block];
        const size_t first_tile = slab * kSlabTiles, last_tile = slab + 1 < slabs ? first_tile + kSlabTiles : tiles;
        const char* from = x + token * stride + first_tile * 64;
        Sums<P> sums;
        if (l.dense) {
          if constexpr (std::is_same_v<P, Bf16>) accumulate_dense(data, (l.columns + 1) / 2, from, stride, sums);
        } else {
          typename P::Sum start[2] = {};
          if constexpr (!std::is_same_v<P, Bf16>)
            for (size_t s = slab; s < (slabs > 1 ? slab + 1 : all_slabs); ++s)
              for (size_t half = 0; half < 2; ++half)
                start[half] = _mm512_add_epi32(
                    start[half], _mm512_loadu_si512(data + header.start + (s * kRowBlock + half * kHalf) * 4));
          accumulate<P>(data + reinterpret_cast<const std::uint32_t*>(data)[slab], data + header.counts + first_tile,
                        last_tile - first_tile, from, stride, start, sums);
        }
        const size_t row = block * kRowBlock;
        __m512 scale[2], bias[2];
        for (size_t half = 0; half < 2; ++half) {
          scale[half] = _mm512_loadu_ps(l.scale + row + half * kHalf);
          bias[half] = slab ? _mm512_setzero_ps() : _mm512_loadu_ps(l.bias + row + half * kHalf);
        }
        for (size_t t = 0; t < kTokens; ++t) {
          __m512 y[2];
          for (size_t half = 0; half < 2; ++half) {
            y[half] = P::to_float(sums[half][t]);
            if (token_scale) y[half] = _mm512_mul_ps(y[half], _mm512_set1_ps(token_scale[token + t]));
            y[half] = _mm512_fmadd_ps(y[half], scale[half], bias[half]);
          }
          sink(token + t, row, slab, y[0], y[1]);
        }
      }
}

}  // namespace gather

#endif  // SPARSEMAE_GATHER_PRODUCTS_INL_H
