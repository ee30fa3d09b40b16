// bf16 on AMX tiles. At 2:32 a gather (vpermw + vdpbf16ps) does 32 kept multiply-adds in three cycles here, a tile 8192
// dense ones in 16: the tile wins up to a density of 1/24 even if every zero is multiplied. So the weights stay packed
// in memory (4 bytes per kept weight), and a row of 32 inputs is expanded by one vpexpandw just before its tiles are
// multiplied, while the tile unit works on the ones before; the bandwidth saved is what a dense model lacks. Any n:m is
// the same code and the same speed.
//
// Tokens are in the columns of a tile everywhere:
//   activation   tiles of 1 KB, [padded tokens / 16][features / 32]: 16 rows of feature pairs x 16 tokens x 2
//                (the B operand)
//   quantized    a float per token, then the same tiles of int8: 16 rows of four features x 16 tokens x 4
//   weights      block of 32 rows: per 32 inputs 32 masks (uint32), then all kept values (bf16) in the same order
//                (the A operand);
//                of an int8 layer: per 64 inputs 32 masks (uint64), then int8
// The output of one layer is so the operand of the next without a transposition; only the keys of attention need one.
#include <immintrin.h>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
#include "amx_products-inl.h"

void linear(const Geometry& g, const Linear& l, const void* input, Output kind, const float* residual, void* output,
            size_t, size_t, size_t first, size_t last, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  if (kind == Output::residual) {
    multiply_blocks(g, l, input, first, last, s, [&](size_t row, size_t t, const Rows& y) {
      size_t at = residual_at(g, t * 16, row);
      for (size_t r = 0; r < kEpilogueRows && row + r < l.used; ++r, at += 16)
        _mm512_storeu_ps(static_cast<float*>(output) + at, _mm512_add_ps(_mm512_loadu_ps(residual + at), y[r]));
    });
    return;
  }
  const size_t width = tiles(l.used);
  const auto store = [&](auto&& activate) {
    multiply_blocks(g, l, input, first, last, s, [&](size_t row, size_t t, const Rows& y) {
      char* to = pair_address(output, width, row / 2, t);
      for (size_t r = 0; r < kEpilogueRows; r += 2, to += 64)
        _mm512_store_si512(to, interleave(activate(y[r]), activate(y[r + 1])));
    });
  };
  if (kind == Output::gelu)
    store([](__m512 x) { return gelu(x); });
  else
    store([](__m512 x) { return x; });
}

void project_head(const Geometry& g, const Linear& qkv, const void* input, size_t head, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  const size_t origin = head * 3 * g.padded_head_dim, blocks = 3 * g.padded_head_dim / kRowBlock;
  multiply_blocks(g, qkv, input, head * blocks, (head + 1) * blocks, s, [&](size_t row, size_t t, const Rows& y) {
    for (size_t r = 0; r < kEpilogueRows; r += 2) store_projected(g, s.head, row - origin + r, t, y[r], y[r + 1]);
  });
}

void attend_head(const Geometry& g, void* output, size_t head, void* scratch) {
  attend(g, layout_scratch(g, scratch).head, [&](size_t d, size_t t, __m512 low, __m512 high) {
    _mm512_store_si512(pair_address(output, tiles(g.width), (head * g.head_dim + d) / 2, t), interleave(low, high));
  });
}

// x of pair row p is two features of each token; four features make a row of int8 tiles.
void quantize_unit(const Geometry& g, size_t features, const void* activation, void* quantized, size_t first) {
  const size_t from_tiles = tiles(features), to_tiles = depth_of<Int8>(features), block = first / 16;
  const auto* from = static_cast<const char*>(activation) + block * from_tiles * kTile;
  char* to = static_cast<char*>(quantized) + scales_bytes(g) + block * to_tiles * kTile;
  const __m512i magnitude = _mm512_set1_epi32(0x7FFF7FFF);
  __m512i top[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // bf16 magnitudes are ordered as integers
  for (size_t p = 0; p < from_tiles * 16; ++p)
    top[p % 2] = _mm512_max_epu16(top[p % 2], _mm512_and_si512(_mm512_load_si512(from + p * 64), magnitude));
  top[0] = _mm512_max_epu16(top[0], top[1]);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m512 largest = _mm512_max_ps(_mm512_castsi512_ps(_mm512_slli_epi32(top[0], 16)),
                                       _mm512_castsi512_ps(_mm512_and_si512(top[0], high)));
  const __m512 safe = _mm512_max_ps(largest, _mm512_set1_ps(1e-30f));
  _mm512_storeu_ps(static_cast<float*>(quantized) + first, _mm512_mul_ps(safe, _mm512_set1_ps(1.0f / 127.0f)));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), safe);
  const __m512i byte = _mm512_set1_epi32(0xFF);
  const auto pair = [&](const char* at) {  // two int8 in the low bytes of every dword
    const __m512i x = _mm512_load_si512(at);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)), inverse));
    return _mm512_or_si512(_mm512_and_si512(a, byte), _mm512_slli_epi32(_mm512_and_si512(b, byte), 8));
  };
  for (size_t q = 0; q < from_tiles * 8; ++q)
    _mm512_store_si512(to + q * 64,
                       _mm512_or_si512(pair(from + q * 128), _mm512_slli_epi32(pair(from + q * 128 + 64), 16)));
}

void quantize(const Geometry& g, size_t features, const void* activation, void* quantized, size_t first, size_t last) {
  for (; first < last; first += kTokenUnit) quantize_unit(g, features, activation, quantized, first);
}

void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  const size_t width = tiles(patch_inputs(g, true));
  round_patches(g, image, first, [&](size_t token, size_t feature, __mmask16 mask, __m256i bf16) {
    uint16_t values[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), bf16);
    for (size_t i = 0, f = feature; mask >> i; ++i, ++f)
      reinterpret_cast<uint16_t*>(pair_address(activation, width, f / 2, token / 16))[token % 16 * 2 + f % 2] =
          values[i];
  });
}

void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, void* activation,
          size_t first, size_t last) {
  const size_t width = tiles(g.width);
  for (; first < last; first += 16) {
    __m512 even = _mm512_setzero_ps();
    normalize<Floats, 1>(residual + residual_at(g, first, 0), 16, g.width, weight, bias, eps,
                         [&](size_t d, size_t, Floats y) {
                           if (d % 2 == 0) even = y.x;
                           if (d % 2 == 1 || d + 1 == g.width)
                             _mm512_store_si512(pair_address(activation, width, d / 2, first / 16),
                                                interleave(even, d % 2 ? y.x : _mm512_setzero_ps()));
                         });
  }
}

Peak peak(Product product, size_t rounds, float* sink) {
  load_sums(nullptr, true);
  _tile_loadd(4, sink, 0);
  _tile_loadd(5, sink, 0);
  for (size_t i = 0; i < rounds; ++i) {
    if (product == Product::int8) {
      _tile_dpbssd(0, 4, 5);
      _tile_dpbssd(1, 4, 5);
      _tile_dpbssd(2, 4, 5);
      _tile_dpbssd(3, 4, 5);
    } else {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  const bool int8 = product == Product::int8;
  return {int8 ? "tdpbssd" : "tdpbf16ps", rounds * 4 * 16 * 16 * (int8 ? Int8::kInputs : Bf16::kInputs), true};
}

size_t token_parts(const Geometry&) { return 1; }
size_t part_begin(const Geometry& g, size_t part) { return part * g.padded_tokens; }

constexpr Kernels kTable = {
    .name = "amx",
    .math = "bf16",
    .blocked_residual = true,
    .even_heads = true,
    .head_step = kRowBlock,
    .rounds_pixels = true,
    .activation_bytes = activation_bytes,
    .scratch_bytes = scratch_bytes,
    .pack_block = pack_block,
    .thread_begin = thread_begin,
    .thread_end = thread_end,
    .patches = patches,
    .norm = norm,
    .norm_residual = norm_residual,
    .quantize = quantize,
    .token_parts = token_parts,
    .part_begin = part_begin,
    .linear = linear,
    .project_head = project_head,
    .attend_head = attend_head,
    .dense_rows = dense_rows,
    .peak = peak,
};

}  // namespace

namespace sparsemae {
const Kernels* amx_kernels() { return &kTable; }
}  // namespace sparsemae
