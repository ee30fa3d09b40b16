// What both tables that use AMX tiles share: tile layouts, layer norm, and the attention of a head. Included inside the
// anonymous namespace of a file of kernels. The residual is by units; tokens are in the columns of a tile.
#ifndef SPARSEMAE_AMX_TILES_INL_H
#define SPARSEMAE_AMX_TILES_INL_H

#ifndef __AMX_TILE__
#error "amx_tiles-inl.h needs __AMX_TILE__"
#endif
#ifndef __AVX512BF16__
#error "amx_tiles-inl.h needs __AVX512BF16__"
#endif

#include "bf16_math-inl.h"
#include "floats_avx512-inl.h"
#include "layer_norm-inl.h"

constexpr size_t kTile = 1024;  // bytes

inline size_t tiles(size_t features) { return (features + 31) / 32; }
inline size_t token_blocks(const Geometry& g) { return g.padded_tokens / 16; }

// Address of the feature pair `pair` of the 16 tokens of a block.
inline char* pair_address(void* activation, size_t block_tiles, size_t pair, size_t token_block) {
  return static_cast<char*>(activation) + (token_block * block_tiles + pair / 16) * kTile + pair % 16 * 64;
}

inline __m512i interleave(__m512 low, __m512 high) {
  alignas(64) static constexpr std::uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

void thread_begin() {
  struct {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));  // GCC's intrinsic claims to read the first eight bytes only
}
void thread_end() { _tile_release(); }

// GCC's tile loads do not tell the compiler that they read memory: nothing stored before may be moved behind them.
inline void before_tile_loads() { __asm__ volatile("" ::: "memory"); }

inline void load_sums(const float* from, bool fresh) {
  before_tile_loads();
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, from, 64);
    _tile_loadd(2, from + 256, 64);
    _tile_loadd(1, from + 512, 64);
    _tile_loadd(3, from + 768, 64);
  }
}
inline void store_sums(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(2, to + 256, 64);
  _tile_stored(1, to + 512, 64);
  _tile_stored(3, to + 768, 64);
}

// One thread's memory for a head: q, k and probabilities as B operands, v as A operand.
struct HeadScratch {
  char *q, *k, *v, *p;
  float* scores;  // [padded tokens][32]
  float* result;  // 4 tiles
  size_t bytes;
};

inline HeadScratch layout_head_scratch(const Geometry& g, void* base) {
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    char* here = base ? static_cast<char*>(base) + offset : nullptr;
    offset += round_up(bytes, 64);
    return here;
  };
  const size_t blocks = token_blocks(g), key_tiles = tiles(g.padded_tokens), head_tiles = g.padded_head_dim / 32;
  HeadScratch s;
  s.q = take(blocks * head_tiles * kTile);
  s.k = take(blocks * head_tiles * kTile);
  s.v = take(2 * head_tiles * key_tiles * kTile);
  s.p = take(2 * key_tiles * kTile);
  s.scores = reinterpret_cast<float*>(take(g.padded_tokens * 32 * sizeof(float)));
  s.result = reinterpret_cast<float*>(take(4 * kTile));
  s.bytes = offset;
  return s;
}

// Rows `row` and `row` + 1 of a head, counted from its first (q, k, v one after the other), for 16 tokens; `row` is
// even.
inline void store_projected(const Geometry& g, const HeadScratch& s, size_t row, size_t token_block, __m512 low,
                            __m512 high) {
  const size_t d = row % g.padded_head_dim, part = row / g.padded_head_dim;
  if (part == 2) {
    char* to = s.v + (d / 16 * tiles(g.padded_tokens) + token_block / 2) * kTile + d % 16 * 64 + token_block % 2 * 32;
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(low));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64), (__m256i)_mm512_cvtneps_pbh(high));
  } else {
    _mm512_store_si512(pair_address(part == 0 ? s.q : s.k, g.padded_head_dim / 32, d / 2, token_block),
                       interleave(low, high));
  }
}

// p[key pairs][16 queries of each half] = exp(score - max), bf16; returns 1 / sum per query.
inline void softmax(const Geometry& g, const float* scores, char* p, __m512 inverse[2]) {
  const size_t key_tiles = tiles(g.padded_tokens), pairs = key_tiles * 16;
  __m512 maximum[4], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int i = 0; i < 4; ++i) maximum[i] = _mm512_load_ps(scores + i % 2 * 16);
  for (size_t j = 1; j < g.tokens; ++j)
    for (size_t half = 0; half < 2; ++half)
      maximum[j % 2 * 2 + half] = _mm512_max_ps(maximum[j % 2 * 2 + half], _mm512_load_ps(scores + j * 32 + half * 16));
  for (size_t half = 0; half < 2; ++half) maximum[half] = _mm512_max_ps(maximum[half], maximum[half + 2]);
  for (size_t pair = 0; pair < pairs; ++pair)
    for (size_t half = 0; half < 2; ++half) {
      const float* from = scores + pair * 64 + half * 16;
      __m512 e0 = _mm512_setzero_ps(), e1 = e0;
      if (2 * pair < g.tokens) e0 = exponential(_mm512_sub_ps(_mm512_load_ps(from), maximum[half]));
      if (2 * pair + 1 < g.tokens) e1 = exponential(_mm512_sub_ps(_mm512_load_ps(from + 32), maximum[half]));
      sum[half] = _mm512_add_ps(sum[half], _mm512_add_ps(e0, e1));
      _mm512_store_si512(p + (half * key_tiles + pair / 16) * kTile + pair % 16 * 64, interleave(e0, e1));
    }
  for (size_t half = 0; half < 2; ++half) inverse[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[half]);
}

// 2 x 2 tiles of a product whose operands are tiles already: A tiles `a_step` bytes apart, two rows of tiles; B
// likewise.
inline void tile_product(const char* a0, const char* a1, const char* b0, const char* b1, size_t count) {
  load_sums(nullptr, true);
  for (size_t t = 0; t < count; ++t) {
    _tile_loadd(4, a0 + t * kTile, 64);
    _tile_loadd(6, b0 + t * kTile, 64);
    _tile_loadd(5, a1 + t * kTile, 64);
    _tile_loadd(7, b1 + t * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Attention of a head that is projected; its keys become the A operand. write(d, token block, low, high) gets features
// d and d + 1 of the head for 16 tokens.
template <class Write>
inline void attend(const Geometry& g, const HeadScratch& s, const Write& write) {
  const size_t head_tiles = g.padded_head_dim / 32, key_tiles = tiles(g.padded_tokens), blocks = token_blocks(g);
  for (size_t tile = 0; tile < blocks * head_tiles; ++tile) {
    auto* key = reinterpret_cast<std::uint32_t*>(s.k + tile * kTile);
    transpose16(key, 16, key, 16);
  }
  for (size_t i = 0; i < blocks; i += 2) {
    const size_t other = i + 1 < blocks ? i + 1 : i;
    const char *q0 = s.q + i * head_tiles * kTile, *q1 = s.q + other * head_tiles * kTile;
    for (size_t j = 0; j < blocks; j += 2) {
      const size_t below = j + 1 < blocks ? j + 1 : j;  // computed twice rather than in a form of its own
      tile_product(s.k + j * head_tiles * kTile, s.k + below * head_tiles * kTile, q0, q1, head_tiles);
      float *to = s.scores + j * 512, *to_below = s.scores + below * 512;
      _tile_stored(0, to, 128);
      _tile_stored(1, to + 16, 128);
      _tile_stored(2, to_below, 128);
      _tile_stored(3, to_below + 16, 128);
    }
    __m512 inverse[2];
    softmax(g, s.scores, s.p, inverse);
    for (size_t d = 0; d < g.head_dim; d += 32) {
      const char* v = s.v + d / 16 * key_tiles * kTile;
      tile_product(v, v + key_tiles * kTile, s.p, s.p + key_tiles * kTile, key_tiles);
      store_sums(s.result);
      for (size_t half = 0; half < 2 && i + half < blocks; ++half)
        for (size_t r = 0; r < 32 && d + r < g.head_dim; r += 2) {
          const float* sums = s.result + half * 512 + r * 16;
          const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), inverse[half]);
          const __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + 16), inverse[half]);
          write(d + r, i + half, low, high);
        }
    }
  }
}

inline void norm_residual(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                          float* out, size_t first, size_t last) {
  for (; first < last; first += 16)
    normalize<Floats, 1>(residual + residual_at(g, first, 0), 16, g.width, weight, bias, eps,
                         [&](size_t d, size_t, Floats y) { Floats::store(out + residual_at(g, first, d), y); });
}

#endif  // SPARSEMAE_AMX_TILES_INL_H
