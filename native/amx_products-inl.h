// Products of expanded sparse weights with all tokens of an image on AMX tiles. Included inside the anonymous namespace
// of kernels_amx.cpp, where the layouts are described.
#ifndef SPARSEMAE_AMX_PRODUCTS_INL_H
#define SPARSEMAE_AMX_PRODUCTS_INL_H

#ifndef __AMX_INT8__
#error "amx_products-inl.h needs __AMX_INT8__"
#endif
#ifndef __AVX512VBMI2__
#error "amx_products-inl.h needs __AVX512VBMI2__"
#endif

#include "amx_tiles-inl.h"

constexpr size_t kSlab = 8;  // tiles of 32 inputs expanded at once: two buffers of 16 KB stay in the first-level cache
constexpr size_t kPanel = kSlab * 2 * kTile;

size_t activation_bytes(size_t features, const Geometry& g) { return token_blocks(g) * tiles(features) * kTile; }

inline size_t scales_bytes(const Geometry& g) { return g.padded_tokens * sizeof(float); }

struct Scratch {
  char* panels;    // 2 x kPanel: expanded weights
  float* partial;  // [token blocks + 1][2 tiles]: sums of the slabs so far
  float* result;   // 2 x 4 tiles
  HeadScratch head;
  size_t bytes;
};

Scratch layout_scratch(const Geometry& g, void* base) {
  const size_t partial = 2 * kPanel, result = partial + (token_blocks(g) + 1) * 2 * kTile,
               head = result + 2 * 4 * kTile;
  auto* from = static_cast<char*>(base);
  Scratch s;
  s.head = layout_head_scratch(g, base ? from + head : nullptr);
  s.bytes = head + s.head.bytes;
  if (!base) return s;
  s.panels = from;
  s.partial = reinterpret_cast<float*>(from + partial);
  s.result = reinterpret_cast<float*>(from + result);
  return s;
}

size_t scratch_bytes(const Geometry& g) { return layout_scratch(g, nullptr).bytes; }

// What a tile row of 64 bytes holds: 32 bf16 or 64 int8 inputs.
struct Bf16 {
  using Mask = std::uint32_t;
  using Value = std::uint16_t;
  static constexpr size_t kInputs = 32;
  static Value value(float x) { return to_bf16(x); }
  static __m512i expand(Mask mask, const Value* from) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from));
  }
};
struct Int8 {
  using Mask = std::uint64_t;
  using Value = std::int8_t;
  static constexpr size_t kInputs = 64;
  static Value value(float x) { return static_cast<Value>(x); }
  static __m512i expand(Mask mask, const Value* from) {
    return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(from));
  }
};

template <class T>
inline size_t depth_of(size_t columns) {
  return (columns + T::kInputs - 1) / T::kInputs;
}

template <class T>
size_t pack_rows(const Row* rows, size_t columns, void* out) {
  const size_t masks = depth_of<T>(columns) * kRowBlock;
  size_t count = 0;
  for (size_t r = 0; r < kRowBlock; ++r) count += rows[r].count;
  // whole registers are read at the last value
  const size_t bytes = round_up(masks * sizeof(typename T::Mask) + count * sizeof(typename T::Value), 64) + 64;
  if (!out) return bytes;
  auto* mask = static_cast<typename T::Mask*>(out);
  auto* value = reinterpret_cast<typename T::Value*>(mask + masks);
  size_t cursor[kRowBlock] = {};
  for (size_t t = 0; t < depth_of<T>(columns); ++t)
    for (size_t r = 0; r < kRowBlock; ++r, ++mask) {
      const Row& row = rows[r];
      *mask = 0;
      for (size_t& i = cursor[r]; i < row.count && row.index[i] / T::kInputs == t; ++i) {
        *mask |= typename T::Mask{1} << row.index[i] % T::kInputs;
        *value++ = T::value(row.value[i]);
      }
    }
  return bytes;
}

size_t pack_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  Row rows[kRowBlock];
  for (size_t r = 0; r < kRowBlock; ++r) rows[r] = source.row(source.context, block * kRowBlock + r);
  return l.quantize ? pack_rows<Int8>(rows, l.columns, out) : pack_rows<Bf16>(rows, l.columns, out);
}

// Expands one tile row after the other; a tile is 16 of them.
template <class T>
struct Expander {
  const typename T::Mask* mask;
  const typename T::Value* value;
  char* out;
  size_t left;

  void run(size_t rows) {
    if (rows > left) rows = left;
    left -= rows;
    for (; rows; --rows, ++mask, out += 64) {
      _mm512_store_si512(out, T::expand(*mask, value));
      value += __builtin_popcountll(*mask);
    }
  }
};

// Two token blocks times 32 rows over `count` tiles of inputs, into the sums in tiles 0 to 3. What else has to be done,
// work(), is called between the products: the tile unit takes 16 cycles for each, in which the rest of the core is
// free.
template <class T, bool kTwo, class Work>
inline void multiply(const char* weights, const char* x0, const char* x1, size_t count, const Work& work) {
  for (size_t t = 0; t < count; ++t, weights += 2 * kTile) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, x0 + t * kTile, 64);
    _tile_loadd(5, weights + kTile, 64);
    if (kTwo) _tile_loadd(7, x1 + t * kTile, 64);
    if constexpr (T::kInputs == 64) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(2, 5, 6);
      if (kTwo) {
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwo) {
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    work();
  }
}

constexpr size_t kEpilogueRows = 8;  // rows finished at a time

// Finished sums whose scaling, bias, GELU and storing are still to be done.
template <class Sink>
struct Epilogue {
  const Sink& sink;
  const float* sums = nullptr;  // tiles of rows 0 and 16 of the first token block, then of the second
  size_t row = 0, token_block = 0, next = 0, parts = 0;

  void run(size_t count) {
    for (; count && next < parts; --count, ++next)
      sink(row + next % 4 * kEpilogueRows, token_block + next / 4, sums + next * kEpilogueRows * 16);
  }
};

// Multiplies blocks [first, last) of a layer with all tokens. sink(row, token block, sums) gets finished sums of
// kEpilogueRows rows x 16 tokens.
template <class T, class Sink>
void multiply_tiles(const Geometry& g, const Linear& l, const char* x, size_t first, size_t last, const Scratch& s,
                    const Sink& sink) {
  const size_t depth = depth_of<T>(l.columns), slabs = (depth + kSlab - 1) / kSlab, blocks = token_blocks(g);
  const size_t slab_tiles = (depth + slabs - 1) / slabs;
  const auto tiles_of = [&](size_t slab) {
    return depth - slab * slab_tiles < slab_tiles ? depth - slab * slab_tiles : slab_tiles;
  };
  Expander<T> next{};
  Epilogue<Sink> epilogue{sink};
  size_t buffer = 0, result = 0;
  const auto begin_block = [&](size_t block) {
    next.mask = reinterpret_cast<const typename T::Mask*>(static_cast<const char*>(l.data) + l.offsets[block]);
    next.value = reinterpret_cast<const typename T::Value*>(next.mask + depth * kRowBlock);
  };
  const auto begin_slab = [&](size_t slab) {
    next.out = s.panels + buffer * kPanel;
    next.left = tiles_of(slab) * kRowBlock;
  };
  begin_block(first);
  begin_slab(0);
  next.run(next.left);
  for (size_t block = first; block < last; ++block)
    for (size_t slab = 0; slab < slabs; ++slab) {
      const char* weights = s.panels + buffer * kPanel;
      const size_t count = tiles_of(slab);
      buffer ^= 1;
      next.left = 0;
      if (slab + 1 < slabs) {
        begin_slab(slab + 1);
      } else if (block + 1 < last) {
        begin_block(block + 1);
        begin_slab(0);
      }
      const size_t steps = (blocks + 1) / 2 * count, share = (next.left + steps - 1) / steps;
      const size_t parts = slab + 1 < slabs ? 0 : (8 + count - 1) / count;
      const auto work = [&] {
        next.run(share);
        epilogue.run(parts);
      };
      for (size_t t = 0; t < blocks; t += 2) {
        const bool two = t + 1 < blocks;
        const char* x0 = x + (t * depth + slab * slab_tiles) * kTile;
        float* partial = s.partial + t * 2 * 256;
        load_sums(partial, slab == 0);
        if (two)
          multiply<T, true>(weights, x0, x0 + depth * kTile, count, work);
        else
          multiply<T, false>(weights, x0, x0, count, work);
        if (slab + 1 < slabs) {
          store_sums(partial);
          continue;
        }
        epilogue.run(8);
        result ^= 1;
        epilogue.sums = s.result + result * 4 * 256;
        epilogue.row = block * kRowBlock;
        epilogue.token_block = t;
        epilogue.next = 0;
        epilogue.parts = two ? 8 : 4;
        store_sums(s.result + result * 4 * 256);
      }
      next.run(next.left);
    }
  epilogue.run(8);
}

// y = sums * scale + bias of kEpilogueRows rows of 16 tokens.
using Rows = __m512[kEpilogueRows];

// sink(first row, token block, y) for all rows of blocks [first, last).
template <class Sink>
void multiply_blocks(const Geometry& g, const Linear& l, const void* input, size_t first, size_t last, const Scratch& s,
                     const Sink& sink) {
  if (!l.quantize) {
    multiply_tiles<Bf16>(g, l, static_cast<const char*>(input), first, last, s,
                         [&](size_t row, size_t t, const float* sums) {
                           Rows y;
                           for (size_t r = 0; r < kEpilogueRows; ++r)
                             y[r] = _mm512_fmadd_ps(_mm512_load_ps(sums + r * 16), _mm512_set1_ps(l.scale[row + r]),
                                                    _mm512_set1_ps(l.bias[row + r]));
                           sink(row, t, y);
                         });
    return;
  }
  const auto* token_scale = static_cast<const float*>(input);
  const char* x = static_cast<const char*>(input) + scales_bytes(g);
  multiply_tiles<Int8>(g, l, x, first, last, s, [&](size_t row, size_t t, const float* sums) {
    const __m512 scale = _mm512_loadu_ps(token_scale + t * 16);
    Rows y;
    for (size_t r = 0; r < kEpilogueRows; ++r) {
      const __m512 real = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + r * 16)), scale);
      y[r] = _mm512_fmadd_ps(real, _mm512_set1_ps(l.scale[row + r]), _mm512_set1_ps(l.bias[row + r]));
    }
    sink(row, t, y);
  });
}

#endif  // SPARSEMAE_AMX_PRODUCTS_INL_H
