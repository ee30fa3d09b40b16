// bf16 on AMX tiles. At 2:32 a gather (vpermw + vdpbf16ps) does 32 kept multiply-adds in three cycles here, a tile 8192 dense ones in
// 16: the tile wins up to a density of 1/24 even if every zero is multiplied. So the weights stay packed in memory (4 bytes
// per kept weight), and a row of 32 inputs is expanded by one vpexpandw just before its tiles are multiplied, while the tile unit works on
// the ones before; the bandwidth saved is what a dense model lacks. Any n:m is the same code and the same speed.
//
// Everything is feature-major, tokens in the columns of a tile:
//   activation   tiles of 1 KB, [padded tokens / 16][features / 32]: 16 rows of feature pairs x 16 tokens x 2 (the B operand)
//   quantised    a float per token, then the same tiles of int8: 16 rows of four features x 16 tokens x 4
//   weights      block of 32 rows: per 32 inputs 32 masks (uint32), then all kept values (bf16) in the same order (the A operand);
//                of an int8 layer: per 64 inputs 32 masks (uint64), then int8
// The output of one layer is so the operand of the next without a transposition; only the keys of attention need one.
#include <immintrin.h>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
#include "bf16_math.h"

#include "amx_products.h"

void linear(const Geometry& g, const Linear& l, const void* input, Output kind, void* output, size_t, size_t first,
            size_t last, void* scratch) {
  const Scratch s = carve(g, scratch);
  if (kind == Output::residual) {
    auto* residual = static_cast<float*>(output);
    multiply_blocks(g, l, input, first, last, s, [&](size_t row, size_t t, const Rows& y) {
      float* to = residual + row * g.padded_tokens + t * 16;
      for (size_t r = 0; r < kFinish && row + r < l.used; ++r, to += g.padded_tokens)
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), y[r]));
    });
    return;
  }
  const size_t width = tiles(l.used);
  const auto store = [&](auto&& activate) {
    multiply_blocks(g, l, input, first, last, s, [&](size_t row, size_t t, const Rows& y) {
      char* to = pair_address(output, width, row / 2, t);
      for (size_t r = 0; r < kFinish; r += 2, to += 64) _mm512_store_si512(to, interleave(activate(y[r]), activate(y[r + 1])));
    });
  };
  if (kind == Output::gelu)
    store([](__m512 x) { return gelu(x); });
  else
    store([](__m512 x) { return x; });
}

// p[key pairs][16 queries of each half] = exp(score - max), bf16; returns 1 / sum per query.
inline void softmax(const Geometry& g, const float* scores, char* p, __m512 inverse[2]) {
  const size_t key_tiles = tiles(g.padded_tokens), pairs = key_tiles * 16;
  __m512 top[4], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int i = 0; i < 4; ++i) top[i] = _mm512_load_ps(scores + i % 2 * 16);
  for (size_t j = 1; j < g.tokens; ++j)
    for (size_t half = 0; half < 2; ++half)
      top[j % 2 * 2 + half] = _mm512_max_ps(top[j % 2 * 2 + half], _mm512_load_ps(scores + j * 32 + half * 16));
  for (size_t half = 0; half < 2; ++half) top[half] = _mm512_max_ps(top[half], top[half + 2]);
  for (size_t pair = 0; pair < pairs; ++pair)
    for (size_t half = 0; half < 2; ++half) {
      const float* from = scores + pair * 64 + half * 16;
      __m512 e0 = _mm512_setzero_ps(), e1 = e0;
      if (2 * pair < g.tokens) e0 = exponential(_mm512_sub_ps(_mm512_load_ps(from), top[half]));
      if (2 * pair + 1 < g.tokens) e1 = exponential(_mm512_sub_ps(_mm512_load_ps(from + 32), top[half]));
      sum[half] = _mm512_add_ps(sum[half], _mm512_add_ps(e0, e1));
      _mm512_store_si512(p + (half * key_tiles + pair / 16) * kTile + pair % 16 * 64, interleave(e0, e1));
    }
  for (size_t half = 0; half < 2; ++half) inverse[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[half]);
}

// 2 x 2 tiles of a product whose operands are tiles already: A tiles `a_step` bytes apart, two rows of tiles; B likewise.
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

void project_head(const Geometry& g, const Linear& qkv, const void* input, size_t head, const Scratch& s) {
  const size_t per_part = g.padded_head_dim, head_tiles = per_part / 32, key_tiles = tiles(g.padded_tokens);
  const size_t origin = head * 3 * per_part, blocks = 3 * head_tiles;
  multiply_blocks(g, qkv, input, head * blocks, (head + 1) * blocks, s, [&](size_t row, size_t t, const Rows& y) {
    const size_t d = (row - origin) % per_part, part = (row - origin) / per_part;
    if (part == 2) {
      char* to = s.v + (d / 16 * key_tiles + t / 2) * kTile + d % 16 * 64 + t % 2 * 32;
      for (size_t r = 0; r < kFinish; ++r, to += 64)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(y[r]));
      return;
    }
    char* to = pair_address(part == 0 ? s.q : s.k, head_tiles, d / 2, t);
    for (size_t r = 0; r < kFinish; r += 2, to += 64) _mm512_store_si512(to, interleave(y[r], y[r + 1]));
  });
  for (size_t tile = 0; tile < token_blocks(g) * head_tiles; ++tile) {
    auto* key = reinterpret_cast<std::uint32_t*>(s.k + tile * kTile);
    transpose16(key, 16, key, 16);
  }
}

void attention(const Geometry& g, const Linear& qkv, const void* input, void* output, size_t head, void* scratch) {
  const Scratch s = carve(g, scratch);
  project_head(g, qkv, input, head, s);
  const size_t head_tiles = g.padded_head_dim / 32, key_tiles = tiles(g.padded_tokens), blocks = token_blocks(g);
  const size_t width = tiles(g.width);
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
          const size_t pair = (head * g.head_dim + d + r) / 2;
          _mm512_store_si512(pair_address(output, width, pair, i + half), interleave(low, high));
        }
    }
  }
}

// x of pair row p is two features of each token; four features make a row of int8 tiles.
void quantise(const Geometry& g, size_t features, const void* activation, void* quantised, size_t first) {
  const size_t from_tiles = tiles(features), to_tiles = depth_of<Int8>(features), block = first / 16;
  const auto* from = static_cast<const char*>(activation) + block * from_tiles * kTile;
  char* to = static_cast<char*>(quantised) + scales_bytes(g) + block * to_tiles * kTile;
  const __m512i magnitude = _mm512_set1_epi32(0x7FFF7FFF);
  __m512i top[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // bf16 magnitudes are ordered as integers
  for (size_t p = 0; p < from_tiles * 16; ++p)
    top[p % 2] = _mm512_max_epu16(top[p % 2], _mm512_and_si512(_mm512_load_si512(from + p * 64), magnitude));
  top[0] = _mm512_max_epu16(top[0], top[1]);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m512 largest = _mm512_max_ps(_mm512_castsi512_ps(_mm512_slli_epi32(top[0], 16)), _mm512_castsi512_ps(_mm512_and_si512(top[0], high)));
  const __m512 safe = _mm512_max_ps(largest, _mm512_set1_ps(1e-30f));
  _mm512_storeu_ps(static_cast<float*>(quantised) + first, _mm512_mul_ps(safe, _mm512_set1_ps(1.0f / 127.0f)));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), safe);
  const __m512i byte = _mm512_set1_epi32(0xFF);
  const auto pair = [&](const char* at) {  // two int8 in the low bytes of every dword
    const __m512i x = _mm512_load_si512(at);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)), inverse));
    return _mm512_or_si512(_mm512_and_si512(a, byte), _mm512_slli_epi32(_mm512_and_si512(b, byte), 8));
  };
  for (size_t q = 0; q < from_tiles * 8; ++q)
    _mm512_store_si512(to + q * 64, _mm512_or_si512(pair(from + q * 128), _mm512_slli_epi32(pair(from + q * 128 + 64), 16)));
}

void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  const size_t across = g.image_width / g.patch, width = tiles(g.channels * g.patch * g.patch);
  for (size_t t = first < g.prefix ? g.prefix : first; t < first + kTokenUnit && t < g.tokens; ++t) {
    const size_t row = (t - g.prefix) / across * g.patch, column = (t - g.prefix) % across * g.patch;
    size_t f = 0;
    for (size_t c = 0; c < g.channels; ++c)
      for (size_t y = 0; y < g.patch; ++y) {
        const float* from = image + (c * g.image_height + row + y) * g.image_width + column;
        for (size_t x = 0; x < g.patch; ++x, ++f)
          reinterpret_cast<std::uint16_t*>(pair_address(activation, width, f / 2, t / 16))[t % 16 * 2 + f % 2] = to_bf16(from[x]);
      }
  }
}

struct Moments {
  __m512 mean, scale;
};

// Of 16 tokens; four sums at a time, because one alone waits for its own additions.
inline Moments moments(const Geometry& g, const float* x, float eps) {
  const __m512 inverse = _mm512_set1_ps(1.0f / static_cast<float>(g.width));
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (size_t d = 0; d < g.width; ++d) sum[d % 4] = _mm512_add_ps(sum[d % 4], _mm512_loadu_ps(x + d * g.padded_tokens));
  const __m512 mean =
      _mm512_mul_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])), inverse);
  for (auto& part : sum) part = _mm512_setzero_ps();
  for (size_t d = 0; d < g.width; ++d) {
    const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(x + d * g.padded_tokens), mean);
    sum[d % 4] = _mm512_fmadd_ps(centred, centred, sum[d % 4]);
  }
  const __m512 squares = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
  const __m512 variance = _mm512_fmadd_ps(squares, inverse, _mm512_set1_ps(eps));
  return {mean, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(variance))};
}

void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, void* activation,
          size_t first) {
  const Moments m = moments(g, residual + first, eps);
  const auto value = [&](size_t d) {
    const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(residual + first + d * g.padded_tokens), m.mean);
    return _mm512_fmadd_ps(_mm512_mul_ps(centred, m.scale), _mm512_set1_ps(weight[d]), _mm512_set1_ps(bias[d]));
  };
  const size_t width = tiles(g.width);
  for (size_t d = 0; d < g.width; d += 2)
    _mm512_store_si512(pair_address(activation, width, d / 2, first / 16),
                       interleave(value(d), d + 1 < g.width ? value(d + 1) : _mm512_setzero_ps()));
}

void norm_residual(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, float* out,
                   size_t first) {
  const Moments m = moments(g, residual + first, eps);
  for (size_t d = 0; d < g.width; ++d) {
    const size_t at = d * g.padded_tokens + first;
    const __m512 centred = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(residual + at), m.mean), m.scale);
    _mm512_storeu_ps(out + at, _mm512_fmadd_ps(centred, _mm512_set1_ps(weight[d]), _mm512_set1_ps(bias[d])));
  }
}

size_t token_parts(const Geometry&) { return 1; }

constexpr Kernels kTable = {"amx",   "bf16", true,          true,     kRowBlock, activation_bytes, scratch_bytes, pack_block, thread_begin, thread_end,
                            patches, norm,   norm_residual, quantise, token_parts, linear, attention,        dense_rows};

}  // namespace

namespace sparsemae {
const Kernels* amx_kernels() { return &kTable; }
}  // namespace sparsemae
