// bf16 with AVX-512-BF16: 32 inputs in bf16 are one register, so all gathers of a group of 32 are one vpermw, followed
// by a pair-wise dot product (vdpbf16ps). Lanes are 16 output rows x 2 kept weights; no gather touches memory.
//
// Everything is token-major:
//   activation   bf16 [padded tokens][features rounded up to 32, plus 32]: the odd stride keeps tokens
//                out of each other's cache sets
//   weights      block of 32 rows: a count per (32 inputs, half block), then that many records
//                {32 x uint16 index, 32 x bf16 value} each; a count of kDense stands for 16 records without indices,
//                input pairs in order (dense layers)
#include <immintrin.h>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
using std::uint16_t;
#include "bf16_math-inl.h"

constexpr size_t kTokens = 8;  // tokens x 2 half blocks = 16 accumulators
constexpr std::uint8_t kDense = 255;

inline size_t tiles(size_t features) { return (features + 31) / 32; }
inline size_t stride_of(size_t features) { return (tiles(features) + 1) * 32; }
size_t activation_bytes(size_t features, const Geometry& g) { return g.padded_tokens * stride_of(features) * 2; }

inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }
inline void store_bf16(void* to, __m512 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}
inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>(count < 16 ? (1u << count) - 1u : 0xFFFFu); }

struct Scratch {
  uint16_t *q, *k_rows, *v_rows, *k, *v,
      *p;         // [tokens][head], then keys as [pairs of d][tokens][2], values as [pairs of tokens][head][2]
  float* scores;  // [4][padded keys]
  size_t bytes;
};

Scratch layout_scratch(const Geometry& g, void* base) {
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    char* here = base ? static_cast<char*>(base) + offset : nullptr;
    offset += round_up(bytes, 64);
    return reinterpret_cast<uint16_t*>(here);
  };
  const size_t keys = round_up(g.padded_tokens, 64), plane = keys * g.padded_head_dim * 2;
  Scratch s;
  s.q = take(plane), s.k_rows = take(plane), s.v_rows = take(plane), s.k = take(plane), s.v = take(plane);
  s.p = take(4 * keys * 2);
  s.scores = reinterpret_cast<float*>(take(4 * keys * sizeof(float)));
  s.bytes = offset;
  return s;
}

size_t scratch_bytes(const Geometry& g) { return layout_scratch(g, nullptr).bytes; }

// One half block's rows within one tile of 32 inputs.
struct TileRows {
  const std::uint32_t* index[16];
  const float* value[16];
  size_t count[16];
  size_t records = 0;
  bool dense = true;
};

TileRows tile_rows(const RowSource& source, size_t first_row, size_t tile, size_t cursor[16]) {
  TileRows t;
  for (size_t r = 0; r < 16; ++r) {
    const Row row = source.row(source.context, first_row + r);
    size_t& i = cursor[r];
    t.index[r] = row.index + i, t.value[r] = row.value + i, t.count[r] = 0;
    while (i < row.count && row.index[i] / 32 == tile) ++i, ++t.count[r];
    t.records = t.count[r] + 1 > 2 * t.records ? (t.count[r] + 1) / 2 : t.records;
    t.dense = t.dense && t.count[r] == 32;
  }
  return t;
}

size_t pack_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  const size_t columns = l.columns;
  auto* counts = static_cast<std::uint8_t*>(out);
  const size_t header = round_up(tiles(columns) * 2, 64);
  size_t bytes = header, cursor[2][16] = {};
  for (size_t tile = 0; tile < tiles(columns); ++tile)
    for (size_t half = 0; half < 2; ++half) {
      const TileRows t = tile_rows(source, block * kRowBlock + half * 16, tile, cursor[half]);
      const size_t record = t.dense ? 64 : 128;
      if (out) {
        counts[tile * 2 + half] = t.dense ? kDense : static_cast<std::uint8_t>(t.records);
        for (size_t i = 0; i < t.records; ++i)
          for (size_t lane = 0; lane < 32; ++lane) {
            const size_t r = lane / 2, at = i * 2 + lane % 2;
            const bool real = at < t.count[r];
            auto* to = reinterpret_cast<uint16_t*>(static_cast<char*>(out) + bytes + i * record);
            if (!t.dense) to[lane] = static_cast<uint16_t>(real ? t.index[r][at] % 32 : 0);
            to[lane + (t.dense ? 0 : 32)] = real ? to_bf16(t.value[r][at]) : uint16_t{0};
          }
      }
      bytes += t.records * record;
    }
  return bytes;
}

// sums[half][8 tokens] of one block of rows; x points at the first token.
inline void multiply(const char* data, size_t columns, const uint16_t* x, size_t stride, __m512 sums[2][kTokens]) {
  const auto* counts = reinterpret_cast<const std::uint8_t*>(data);
  const char* record = data + round_up(tiles(columns) * 2, 64);
  for (size_t half = 0; half < 2; ++half)
    for (size_t t = 0; t < kTokens; ++t) sums[half][t] = _mm512_setzero_ps();
  for (size_t tile = 0; tile < tiles(columns); ++tile, x += 32) {
    __m512i inputs[kTokens];
    for (size_t t = 0; t < kTokens; ++t) inputs[t] = _mm512_loadu_si512(x + t * stride);
    for (size_t half = 0; half < 2; ++half) {
      const std::uint8_t count = counts[tile * 2 + half];
      if (count == kDense) {
        for (size_t pair = 0; pair < 16; ++pair, record += 64) {
          const __m512bh weights = as_bf16(_mm512_load_si512(record));
          for (size_t t = 0; t < kTokens; ++t) {
            int both;
            __builtin_memcpy(&both, x + t * stride + pair * 2, sizeof both);
            sums[half][t] = _mm512_dpbf16_ps(sums[half][t], weights, as_bf16(_mm512_set1_epi32(both)));
          }
        }
        continue;
      }
      for (std::uint8_t i = 0; i < count; ++i, record += 128) {
        const __m512i index = _mm512_load_si512(record);
        const __m512bh weights = as_bf16(_mm512_load_si512(record + 64));
        for (size_t t = 0; t < kTokens; ++t)
          sums[half][t] = _mm512_dpbf16_ps(sums[half][t], weights, as_bf16(_mm512_permutexvar_epi16(index, inputs[t])));
      }
    }
  }
}

// sink(token, first row of the half block, y) for every token and half block of blocks [first, last).
template <class Sink>
inline void multiply_blocks(const Geometry& g, const Linear& l, const void* input, size_t first, size_t last,
                            const Sink& sink) {
  const size_t stride = stride_of(l.columns);
  for (size_t block = first; block < last; ++block)
    for (size_t t = 0; t < g.padded_tokens; t += kTokens) {
      __m512 sums[2][kTokens];
      multiply(static_cast<const char*>(l.data) + l.offsets[block], l.columns,
               static_cast<const uint16_t*>(input) + t * stride, stride, sums);
      for (size_t half = 0; half < 2; ++half) {
        const size_t row = block * kRowBlock + half * 16;
        const __m512 scale = _mm512_loadu_ps(l.scale + row), bias = _mm512_loadu_ps(l.bias + row);
        for (size_t i = 0; i < kTokens; ++i) sink(t + i, row, _mm512_fmadd_ps(sums[half][i], scale, bias));
      }
    }
}

void linear(const Geometry& g, const Linear& l, const void* input, Output kind, void* output, size_t, size_t,
            size_t first, size_t last, void*) {
  if (kind == Output::residual) {
    multiply_blocks(g, l, input, first, last, [&](size_t token, size_t row, __m512 y) {
      if (row >= l.used) return;
      float* to = static_cast<float*>(output) + token * l.used + row;
      const __mmask16 mask = first_lanes(l.used - row);
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), y));
    });
    return;
  }
  const size_t stride = stride_of(l.used);
  multiply_blocks(g, l, input, first, last, [&](size_t token, size_t row, __m512 y) {
    store_bf16(static_cast<uint16_t*>(output) + token * stride + row, kind == Output::gelu ? gelu(y) : y);
  });
}

// c[R rows][C x 16] = sum over pairs of a[row][pair] . b[pair][lane], bf16 pairs; strides in pairs.
template <size_t R, size_t C>
inline void product(const std::uint32_t* a, size_t a_stride, const std::uint32_t* b, size_t b_stride, size_t pairs,
                    float* c, size_t c_stride) {
  __m512 sums[R][C];
  for (size_t r = 0; r < R; ++r)
    for (size_t j = 0; j < C; ++j) sums[r][j] = _mm512_setzero_ps();
  for (size_t p = 0; p < pairs; ++p)
    for (size_t j = 0; j < C; ++j) {
      const __m512bh right = as_bf16(_mm512_loadu_si512(b + p * b_stride + j * 16));
      for (size_t r = 0; r < R; ++r)
        sums[r][j] =
            _mm512_dpbf16_ps(sums[r][j], as_bf16(_mm512_set1_epi32(static_cast<int>(a[r * a_stride + p]))), right);
    }
  for (size_t r = 0; r < R; ++r)
    for (size_t j = 0; j < C; ++j) _mm512_storeu_ps(c + r * c_stride + j * 16, sums[r][j]);
}

// p = exp(scores - max) in bf16, zero beyond the real keys; returns 1 / sum.
inline float softmax_row(const float* scores, size_t keys, size_t padded, uint16_t* p) {
  __m512 maximum = _mm512_set1_ps(-3.4e38f), sum = _mm512_setzero_ps();
  for (size_t j = 0; j < keys; j += 16)
    maximum = _mm512_mask_max_ps(maximum, first_lanes(keys - j), maximum, _mm512_loadu_ps(scores + j));
  const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(maximum));
  for (size_t j = 0; j < padded; j += 16) {
    const __mmask16 mask = j < keys ? first_lanes(keys - j) : __mmask16{0};
    const __m512 e =
        _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + j), highest)));
    sum = _mm512_add_ps(sum, e);
    store_bf16(p + j, e);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

void project_head(const Geometry& g, const Linear& qkv, const void* input, size_t head, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  const size_t hd = g.padded_head_dim, origin = head * 3 * hd, keys = round_up(g.padded_tokens, 64);
  uint16_t* parts[3] = {s.q, s.k_rows, s.v_rows};
  multiply_blocks(g, qkv, input, origin / kRowBlock, (origin + 3 * hd) / kRowBlock,
                  [&](size_t token, size_t row, __m512 y) {
                    store_bf16(parts[(row - origin) / hd] + token * hd + (row - origin) % hd, y);
                  });
  for (size_t t = 0; t < keys; t += 16)  // rows beyond the padded tokens stay zero
    for (size_t d = 0; d < hd; d += 32)
      transpose16(reinterpret_cast<const std::uint32_t*>(s.k_rows + t * hd + d), hd / 2,
                  reinterpret_cast<std::uint32_t*>(s.k) + d / 2 * keys + t, keys);
  for (size_t t = 0; t < g.padded_tokens; t += 2)
    for (size_t d = 0; d < hd; d += 16) {
      const auto row = [&](size_t token) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.v_rows + token * hd + d)));
      };
      _mm512_storeu_si512(s.v + t * hd + 2 * d, _mm512_or_si512(row(t), _mm512_slli_epi32(row(t + 1), 16)));
    }
}

void attend_head(const Geometry& g, void* output, size_t head, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  const size_t hd = g.padded_head_dim, keys = round_up(g.padded_tokens, 64), stride = stride_of(g.width);
  const auto* q = reinterpret_cast<const std::uint32_t*>(s.q);
  for (size_t i = 0; i < g.padded_tokens; i += 4) {
    for (size_t j = 0; j < keys; j += 64)
      product<4, 4>(q + i * hd / 2, hd / 2, reinterpret_cast<const std::uint32_t*>(s.k) + j, keys, hd / 2, s.scores + j,
                    keys);
    float inverse[4];
    for (size_t r = 0; r < 4; ++r)
      inverse[r] = softmax_row(s.scores + r * keys, g.tokens, g.padded_tokens, s.p + r * keys);
    for (size_t d = 0; d < g.head_dim; d += 32) {
      alignas(64) float sums[4][32];
      product<4, 2>(reinterpret_cast<const std::uint32_t*>(s.p), keys / 2,
                    reinterpret_cast<const std::uint32_t*>(s.v) + d, hd, g.padded_tokens / 2, sums[0], 32);
      for (size_t r = 0; r < 4; ++r)
        for (size_t half = 0; half < 32 && d + half < g.head_dim; half += 16) {
          auto* to = static_cast<uint16_t*>(output) + (i + r) * stride + head * g.head_dim + d + half;
          const __m256i y =
              (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sums[r] + half), _mm512_set1_ps(inverse[r])));
          _mm256_mask_storeu_epi16(to, first_lanes(g.head_dim - d - half), y);
        }
    }
  }
}

void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  const size_t across = g.image_width / g.patch, stride = stride_of(g.channels * g.patch * g.patch);
  for (size_t t = first < g.prefix ? g.prefix : first; t < first + kTokenUnit && t < g.tokens; ++t) {
    const size_t row = (t - g.prefix) / across * g.patch, column = (t - g.prefix) % across * g.patch;
    uint16_t* to = static_cast<uint16_t*>(activation) + t * stride;
    for (size_t c = 0; c < g.channels; ++c)
      for (size_t y = 0; y < g.patch; ++y, to += g.patch) {
        const float* from = image + (c * g.image_height + row + y) * g.image_width + column;
        for (size_t x = 0; x < g.patch; ++x) to[x] = to_bf16(from[x]);
      }
  }
}

// write(d, lanes, y) for 16 features of one normalized token after the other.
template <class Write>
inline void norm_token(const Geometry& g, const float* x, const float* weight, const float* bias, float eps,
                       const Write& write) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (size_t d = 0; d < g.width; d += 16)
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(g.width - d), x + d));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(g.width));
  for (size_t d = 0; d < g.width; d += 16) {
    const __mmask16 mask = first_lanes(g.width - d);
    const __m512 centered = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + d), mean);
    squares = _mm512_fmadd_ps(centered, centered, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(g.width);
  const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + eps));
  for (size_t d = 0; d < g.width; d += 16) {
    const __mmask16 mask = first_lanes(g.width - d);
    const __m512 y = _mm512_mul_ps(_mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + d), mean), scale);
    write(d, mask, _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(mask, weight + d), _mm512_maskz_loadu_ps(mask, bias + d)));
  }
}

void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, void* activation,
          size_t first, size_t last) {
  for (size_t t = first; t < last; ++t) {
    auto* to = static_cast<uint16_t*>(activation) + t * stride_of(g.width);
    norm_token(g, residual + t * g.width, weight, bias, eps,
               [&](size_t d, __mmask16, __m512 y) { store_bf16(to + d, y); });
  }
}

void norm_residual(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                   float* out, size_t first, size_t last) {
  for (size_t t = first; t < last; ++t)
    norm_token(g, residual + t * g.width, weight, bias, eps,
               [&](size_t d, __mmask16 mask, __m512 y) { _mm512_mask_storeu_ps(out + t * g.width + d, mask, y); });
}

void no_thread_state() {}

size_t token_parts(const Geometry&) { return 1; }
size_t part_begin(const Geometry& g, size_t part) { return part * g.padded_tokens; }

Peak peak(Product product, size_t rounds, float* sink) {
  constexpr size_t count = 16;
  __m512 sums[count];
  for (size_t i = 0; i < count; ++i) sums[i] = _mm512_setzero_ps();
  __m512i inputs = _mm512_loadu_si512(sink);
  const __m512i index = _mm512_setzero_si512();
  for (size_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (size_t i = 0; i < count; ++i) {
      __asm__("" : "+v"(inputs));  // or one permutation would do for all
      const __m512i gathered = product == Product::dense ? inputs : _mm512_permutexvar_epi16(index, inputs);
      sums[i] = _mm512_dpbf16_ps(sums[i], as_bf16(index), as_bf16(gathered));
    }
  for (size_t i = 1; i < count; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  _mm512_storeu_ps(sink, sums[0]);
  return {product == Product::dense ? "vdpbf16ps" : "vpermw + vdpbf16ps", rounds * count * 32};
}

constexpr Kernels kTable = {
    .name = "avx512bf16",
    .math = "bf16",
    .head_step = kRowBlock,
    .activation_bytes = activation_bytes,
    .scratch_bytes = scratch_bytes,
    .pack_block = pack_block,
    .thread_begin = no_thread_state,
    .thread_end = no_thread_state,
    .patches = patches,
    .norm = norm,
    .norm_residual = norm_residual,
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
const Kernels* avx512bf16_kernels() { return &kTable; }
}  // namespace sparsemae
