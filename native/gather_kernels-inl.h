// Kernels by gathers inside a register (gather_products-inl.h): sparse layers in bf16 and, compiled with VNNI and VBMI,
// in int8; attention in bf16. Included inside the anonymous namespace of a file of kernels, which makes a table of
// them.
//
// Everything is token-major:
//   residual     float [padded tokens][D]
//   activation   bf16 [padded tokens][features rounded up to 32, plus 32]: the odd stride keeps tokens out of each
//   other's
//                cache sets
//   quantized    a float per token, then uint8 [padded tokens][features rounded up to 64, plus 64]
#ifndef SPARSEMAE_GATHER_KERNELS_INL_H
#define SPARSEMAE_GATHER_KERNELS_INL_H

#include "gather_products-inl.h"

namespace gather {

inline size_t stride_of(size_t features) { return (tiles_of<Bf16>(features) + 1) * 32; }
inline size_t activation_bytes(size_t features, const Geometry& g) { return g.padded_tokens * stride_of(features) * 2; }

inline void store_bf16(void* to, __m512 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_bf16(void* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>(count < 16 ? (1u << count) - 1u : 0xFFFFu); }

// Parts are tiles of tokens; the last units have some that no token is in.
inline size_t token_parts(const Geometry& g) { return (g.tokens + kTokens - 1) / kTokens; }
inline size_t part_begin(const Geometry& g, size_t part) {
  return part < token_parts(g) ? part * kTokens : g.padded_tokens;
}
inline size_t end_of(const Geometry& g, size_t token) {
  const size_t end = token_parts(g) * kTokens;
  return token < end ? token : end;
}

#if defined(SPARSEMAE_INT8)
inline size_t scales_bytes(const Geometry& g) { return g.padded_tokens * sizeof(float); }
inline size_t quantized_stride(size_t features) { return (tiles_of<Int8>(features) + 1) * 64; }

// What a token's inputs, `tiles` tiles of 64, have to be divided by to become int8.
inline float int8_scale(const uint16_t* from, size_t tiles) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF), odd = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  __m512i maxima[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // bf16 magnitudes are ordered as integers
  for (size_t tile = 0; tile < tiles; ++tile, from += 64) {
    maxima[0] = _mm512_max_epu16(maxima[0], _mm512_and_si512(_mm512_loadu_si512(from), magnitude));
    maxima[1] = _mm512_max_epu16(maxima[1], _mm512_and_si512(_mm512_loadu_si512(from + 32), magnitude));
  }
  const __m512i both = _mm512_max_epu16(maxima[0], maxima[1]);
  const float maximum = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                                                           _mm512_castsi512_ps(_mm512_and_si512(both, odd))));
  return maximum > 1e-30f ? maximum / 127.0f : 1e-30f;
}

// Rounds a token's inputs to int8, plus 128.
inline void round_token(const uint16_t* from, size_t tiles, float scale, std::uint8_t* to) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m512 inverse = _mm512_set1_ps(1.0f / scale);
  // Packing takes four numbers from each 128-bit lane of its operands in turn; this puts even and odd ones in order.
  alignas(64) static constexpr std::uint8_t kOrder[64] = {
      0,  4,  1,  5,  2,  6,  3,  7,  16, 20, 17, 21, 18, 22, 19, 23, 32, 36, 33, 37, 34, 38,
      35, 39, 48, 52, 49, 53, 50, 54, 51, 55, 8,  12, 9,  13, 10, 14, 11, 15, 24, 28, 25, 29,
      26, 30, 27, 31, 40, 44, 41, 45, 42, 46, 43, 47, 56, 60, 57, 61, 58, 62, 59, 63};
  const __m512i order = _mm512_load_si512(kOrder), offset = _mm512_set1_epi8(static_cast<char>(Int8::kOffset));
  const auto rounded = [&](__m512i bits) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(bits), inverse));
  };
  const auto words = [&](const uint16_t* at) {
    const __m512i x = _mm512_loadu_si512(at);
    return _mm512_packs_epi32(rounded(_mm512_slli_epi32(x, 16)), rounded(_mm512_and_si512(x, odd)));
  };
  for (size_t tile = 0; tile < tiles; ++tile, from += 64, to += 64) {
    const __m512i bytes = _mm512_packs_epi16(words(from), words(from + 32));
    _mm512_storeu_si512(to, _mm512_xor_si512(_mm512_permutexvar_epi8(order, bytes), offset));
  }
}

inline void quantize(const Geometry& g, size_t features, const void* activation, void* quantized, size_t first,
                     size_t last) {
  const size_t stride = stride_of(features), tiles = tiles_of<Int8>(features), end = end_of(g, last);
  const auto* from = static_cast<const uint16_t*>(activation);
  auto* scales = static_cast<float*>(quantized);
  auto* to = static_cast<std::uint8_t*>(quantized) + scales_bytes(g);
  // A token's scale takes long to come out of its maxima: meanwhile the token before is rounded.
  for (size_t t = first; t < end; ++t) {
    if (t == first) scales[t] = int8_scale(from + t * stride, tiles);
    if (t + 1 < end) scales[t + 1] = int8_scale(from + (t + 1) * stride, tiles);
    round_token(from + t * stride, tiles, scales[t], to + t * quantized_stride(features));
  }
}
#endif

// sink as in multiply, for tokens of [first_token, last_token).
template <class Sink>
inline void multiply_layer(const Geometry& g, const Linear& l, const void* input, size_t first_token, size_t last_token,
                           size_t first, size_t last, bool slabwise, const Sink& sink) {
  last_token = end_of(g, last_token);
#if defined(SPARSEMAE_INT8)
  if (l.quantize)
    return multiply<Int8>(l, static_cast<const char*>(input) + scales_bytes(g), quantized_stride(l.columns),
                          static_cast<const float*>(input), first_token, last_token, first, last, slabwise, sink);
#endif
  multiply<Bf16>(l, static_cast<const char*>(input), stride_of(l.columns) * 2, nullptr, first_token, last_token, first,
                 last, slabwise, sink);
}

inline size_t pack_any_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  if (l.dense) return pack_dense_block(source, l, block, out);
#if defined(SPARSEMAE_INT8)
  if (l.quantize) return pack_block<Int8>(source, l, block, out);
#endif
  return pack_block<Bf16>(source, l, block, out);
}

inline auto add_to_residual(const Linear& l, const float* residual, float* output) {
  const auto add = [&l, residual, output](size_t token, size_t row, size_t slab, __m512 y) {
    float* to = output + token * l.used + row;
    const float* from = slab ? to : residual + token * l.used + row;
    if (row + kHalf <= l.used) return _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(from), y));
    if (row >= l.used) return;
    const __mmask16 mask = first_lanes(l.used - row);
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, from), y));
  };
  return [add](size_t token, size_t row, size_t slab, __m512 low, __m512 high) {
    add(token, row, slab, low);
    add(token, row + kHalf, slab, high);
  };
}

inline void linear(const Geometry& g, const Linear& l, const void* input, Output kind, const float* residual,
                   void* output, size_t first_part, size_t last_part, size_t first, size_t last, void*) {
  const size_t first_token = part_begin(g, first_part), last_token = part_begin(g, last_part);
  if (kind == Output::residual) {
    return multiply_layer(g, l, input, first_token, last_token, first, last, true,
                          add_to_residual(l, residual, static_cast<float*>(output)));
  }
  auto* activation = static_cast<uint16_t*>(output);
  const size_t stride = stride_of(l.used);
  multiply_layer(g, l, input, first_token, last_token, first, last, false,
                 [&](size_t token, size_t row, size_t, __m512 low, __m512 high) {
                   if (kind == Output::gelu) low = gelu(low), high = gelu(high);
                   store_bf16(activation + token * stride + row, low, high);
                 });
}

struct Scratch {
  uint16_t *q, *k_rows, *v_rows, *k, *v,
      *p;         // [tokens][head], then keys as [pairs of d][tokens][2], values as [pairs of tokens][head][2]
  float* scores;  // [kQueries][padded keys]
  size_t bytes;
};

#if defined(__AMX_TILE__)
constexpr size_t kQueries = 16;  // taken at a time
#else
constexpr size_t kQueries = 4;
#endif

// Keys of a row of probabilities: whole registers. Values have as many, zeros at the end.
inline size_t paired_keys(const Geometry& g) { return round_up(g.padded_tokens, 32); }

inline Scratch layout_scratch(const Geometry& g, void* base) {
  size_t offset = 0;
  const auto take = [&](size_t bytes) {
    char* here = base ? static_cast<char*>(base) + offset : nullptr;
    offset += round_up(bytes, 64);
    return reinterpret_cast<uint16_t*>(here);
  };
  const size_t keys = g.padded_tokens, plane = keys * g.padded_head_dim * 2;
  Scratch s;
  s.q = take(plane), s.k_rows = take(plane), s.v_rows = take(plane), s.k = take(plane);
  s.v = take(paired_keys(g) * g.padded_head_dim * 2);
  s.p = take(kQueries * paired_keys(g) * 2);
  s.scores = reinterpret_cast<float*>(take(kQueries * keys * sizeof(float)));
  s.bytes = offset;
  return s;
}

inline size_t scratch_bytes(const Geometry& g) { return layout_scratch(g, nullptr).bytes; }

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

inline void project_head(const Geometry& g, const Linear& qkv, const void* input, size_t head, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  const size_t hd = g.padded_head_dim, origin = head * 3 * hd, keys = g.padded_tokens;
  uint16_t* parts[3] = {s.q, s.k_rows, s.v_rows};
  multiply_layer(g, qkv, input, 0, g.padded_tokens, origin / kRowBlock, (origin + 3 * hd) / kRowBlock, false,
                 [&](size_t token, size_t row, size_t, __m512 low, __m512 high) {
                   store_bf16(parts[(row - origin) / hd] + token * hd + (row - origin) % hd, low, high);
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

// 32 features of a head, from `d` on, for one token.
inline void store_attended(const Geometry& g, void* output, size_t stride, size_t token, size_t head, size_t d,
                           const float* sums, float inverse) {
  for (size_t half = 0; half < 32 && d + half < g.head_dim; half += 16) {
    auto* to = static_cast<uint16_t*>(output) + token * stride + head * g.head_dim + d + half;
    const __m256i y = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sums + half), _mm512_set1_ps(inverse)));
    _mm256_mask_storeu_epi16(to, first_lanes(g.head_dim - d - half), y);
  }
}

inline void attend_head(const Geometry& g, void* output, size_t head, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  const size_t hd = g.padded_head_dim, keys = g.padded_tokens, stride = stride_of(g.width);
  const auto* q = reinterpret_cast<const std::uint32_t*>(s.q);
  for (size_t i = 0; i < g.tokens; i += 4) {
    const auto score = [&]<size_t kVectors>(size_t j) {
      product<4, kVectors>(q + i * hd / 2, hd / 2, reinterpret_cast<const std::uint32_t*>(s.k) + j, keys, hd / 2,
                           s.scores + j, keys);
    };
    size_t j = 0;
    for (; j + 64 <= g.padded_tokens; j += 64) score.template operator()<4>(j);
    for (; j < g.padded_tokens; j += 16) score.template operator()<1>(j);
    float inverse[4];
    for (size_t r = 0; r < 4; ++r)
      inverse[r] = softmax_row(s.scores + r * keys, g.tokens, g.padded_tokens, s.p + r * keys);
    for (size_t d = 0; d < g.head_dim; d += 32) {
      alignas(64) float sums[4][32];
      product<4, 2>(reinterpret_cast<const std::uint32_t*>(s.p), keys / 2,
                    reinterpret_cast<const std::uint32_t*>(s.v) + d, hd, g.padded_tokens / 2, sums[0], 32);
      for (size_t r = 0; r < 4; ++r) store_attended(g, output, stride, i + r, head, d, sums[r], inverse[r]);
    }
  }
}

inline void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  const size_t stride = stride_of(patch_inputs(g, true));
  round_patches(g, image, first, [&](size_t token, size_t feature, __mmask16 mask, __m256i bf16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(activation) + token * stride + feature, mask, bf16);
  });
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

inline void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                 void* activation, size_t first, size_t last) {
  for (size_t t = first; t < end_of(g, last); ++t) {
    auto* to = static_cast<uint16_t*>(activation) + t * stride_of(g.width);
    norm_token(g, residual + t * g.width, weight, bias, eps,
               [&](size_t d, __mmask16, __m512 y) { store_bf16(to + d, y); });
  }
}

inline void norm_residual(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                          float* out, size_t first, size_t last) {
  for (size_t t = first; t < end_of(g, last); ++t)
    norm_token(g, residual + t * g.width, weight, bias, eps,
               [&](size_t d, __mmask16 mask, __m512 y) { _mm512_mask_storeu_ps(out + t * g.width + d, mask, y); });
}

inline void no_thread_state() {}

// Products of 12 sums on registers alone, `rounds` times. Returns how many weights that multiplies.
template <class P, bool kGather>
inline size_t multiply_registers(size_t rounds, float* sink) {
  constexpr size_t kSums = 12;
  typename P::Sum sums[kSums] = {};
  __m512i inputs = _mm512_loadu_si512(sink), index = inputs, weights = inputs;
  for (size_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (size_t i = 0; i < kSums; ++i) {
      __asm__("" : "+v"(inputs));  // or one permutation would do for all
      if constexpr (kGather)
        sums[i] = P::multiply_add(sums[i], index, weights, inputs);
      else
        sums[i] = P::multiply_add_dense(sums[i], weights, inputs);
    }
  for (size_t i = 1; i < kSums; ++i) sums[0] = sums[0] + sums[i];
  _mm512_storeu_ps(sink, P::to_float(sums[0]));
  return rounds * kSums * kHalf * P::kKept;
}

inline Peak peak(Product product, size_t rounds, float* sink) {
  if (product == Product::dense) return {"vdpbf16ps", multiply_registers<Bf16, false>(rounds, sink)};
#if defined(SPARSEMAE_INT8)
  if (product == Product::int8) return {"vpermb + vpdpbusd", multiply_registers<Int8, true>(rounds, sink)};
#endif
  return {"vpermw + vdpbf16ps", multiply_registers<Bf16, true>(rounds, sink)};
}

constexpr Kernels table(const char* name) {
  return {
      .name = name,
      .math = "bf16",
      .head_step = kRowBlock,
      .rounds_pixels = true,
      .activation_bytes = activation_bytes,
      .scratch_bytes = scratch_bytes,
      .pack_block = pack_any_block,
      .thread_begin = no_thread_state,
      .thread_end = no_thread_state,
      .patches = patches,
      .norm = norm,
      .norm_residual = norm_residual,
#if defined(SPARSEMAE_INT8)
      .quantize = quantize,
#endif
      .token_parts = token_parts,
      .part_begin = part_begin,
      .linear = linear,
      .project_head = project_head,
      .attend_head = attend_head,
      .dense_rows = dense_rows,
      .peak = peak,
  };
}

}  // namespace gather

#endif  // SPARSEMAE_GATHER_KERNELS_INL_H
