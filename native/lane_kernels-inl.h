// fp32 kernels with tokens in the lanes, written once over a vector type V and compiled once per instruction set.
//
// Products may be of a vector type of their own, in fp16: SPARSEMAE_PRODUCT is P of lane_products-inl.h, and V loads
// and stores its Number as well.
//
// The residual is by units; q, k and v of a head are [features][padded tokens]; activations are in the chunks of
// lane_products-inl.h. So layer norm, softmax and GELU need no sum across lanes. The including file names its vector
// type in SPARSEMAE_VECTOR: V with what lane_products-inl.h asks for, Number being float, and set, operator+ - *, max,
// div, rsqrt, shift_add, kMultiplyAdd, the instruction that fma is, and upper or steps of its own: Step<float>, and
// Step<std::uint16_t> of bf16.
#ifndef SPARSEMAE_LANE_KERNELS_INL_H
#define SPARSEMAE_LANE_KERNELS_INL_H

#ifndef SPARSEMAE_VECTOR
#error "lane_kernels-inl.h needs SPARSEMAE_VECTOR"
#endif

#ifndef SPARSEMAE_PRODUCT
#define SPARSEMAE_PRODUCT SPARSEMAE_VECTOR
#endif

#include "lane_products-inl.h"
#include "layer_norm-inl.h"

namespace lanes {

using sparsemae::kTokenUnit;
using sparsemae::Output;
using sparsemae::residual_at;
using V = SPARSEMAE_VECTOR;

constexpr bool kInFloats = sizeof(Number) == sizeof(float);
constexpr size_t kParts = P::kLanes / V::kLanes;

#include "lane_math-inl.h"
#if defined(__AVXVNNI__)
#include "zip_products-inl.h"
#endif

struct KeptFloat {
  float value;
  std::uint32_t bytes;

  static KeptFloat of(float w, std::size_t offset) { return {w, static_cast<std::uint32_t>(offset)}; }
  const KeptFloat& read() const { return *this; }
  P weight() const { return P::set(value); }
  std::size_t offset() const { return bytes; }
};

// The weight, and below it the offset in units of eight bytes.
template <class Vector>
struct KeptBf16 {
  std::uint32_t bits;

  static KeptBf16 of(float w, std::size_t offset) {
    std::uint32_t weight;
    std::memcpy(&weight, &w, sizeof weight);
    return {weight | static_cast<std::uint32_t>(offset / 8)};
  }
  const KeptBf16& read() const { return *this; }
  Vector weight() const { return Vector::upper(&bits); }
  std::size_t offset() const { return std::size_t{8} * (bits & 0xFFFFu); }
};

// The steps of fp32 and of bf16 weights, where V has none of its own.
template <class Vector>
struct Steps {
  using Exact = RowStep<KeptFloat>;
  using Bf16 = RowStep<KeptBf16<Vector>>;
};
template <class Vector>
  requires requires { typename Vector::template Step<float>; }
struct Steps<Vector> {
  using Exact = typename Vector::template Step<float>;
  using Bf16 = typename Vector::template Step<std::uint16_t>;
};
using ExactStep = Steps<P>::Exact;
using Bf16Step = Steps<P>::Bf16;

// The sums of a pass; q, k and v; the scores of two vectors of queries, and what they mix of the values.
inline size_t scratch_bytes(const Geometry& g) {
  return sums_bytes() +
         (3 * g.padded_head_dim * g.padded_tokens + 2 * V::kLanes * (g.padded_tokens + g.padded_head_dim)) *
             sizeof(float);
}

inline void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  auto* out = static_cast<Number*>(activation);
  const Chunks chunks(g);
  const size_t across = g.image_width / g.patch, features = g.channels * g.patch * g.patch;
  for (size_t t = first; t < first + kTokenUnit && t < g.tokens; ++t) {
    if (t < g.prefix) continue;  // stays zero
    const size_t row = (t - g.prefix) / across * g.patch, column = (t - g.prefix) % across * g.patch;
    Number* to = out + chunks.at_token(t, features);
    for (size_t c = 0; c < g.channels; ++c)
      for (size_t y = 0; y < g.patch; ++y) {
        const float* from = image + (c * g.image_height + row + y) * g.image_width + column;
        for (size_t x = 0; x < g.patch; ++x, to += kLine) *to = from[x];
      }
  }
}

// Normalizes tokens [first, last), by units as far as they go. dst(t) is where feature 0 of the vector of token t
// goes; the others follow at distances of `step`.
template <class Dst>
inline void normalize_tokens(const Geometry& g, const float* residual, const float* weight, const float* bias,
                             float eps, size_t first, size_t last, size_t step, const Dst& dst) {
  constexpr size_t count = kTokenUnit / V::kLanes;
  for (size_t t = first; t < last && t < g.tokens;) {
    const float* x = residual + residual_at(g, t, 0);
    if (t % kTokenUnit == 0 && last - t >= kTokenUnit) {
      decltype(dst(t)) to[count];
      for (size_t i = 0; i < count; ++i) to[i] = dst(t + i * V::kLanes);
      normalize<V, count>(x, kTokenUnit, g.width, weight, bias, eps, [&](size_t d, size_t i, V y) {
        if (to[i]) V::store(to[i] + d * step, y);
      });
      t += kTokenUnit;
    } else {
      const auto to = dst(t);
      normalize<V, 1>(x, kTokenUnit, g.width, weight, bias, eps,
                      [&](size_t d, size_t, V y) { V::store(to + d * step, y); });
      t += V::kLanes;
    }
  }
}

inline void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                 void* activation, size_t first, size_t last) {
  const Chunks chunks(g);
  normalize_tokens(g, residual, weight, bias, eps, first, last, kLine, [&](size_t t) -> Number* {
    const bool any = t / P::kLanes < chunks.all;  // the last unit has vectors that no token is in
    return any ? static_cast<Number*>(activation) + chunks.at_token(t, g.width) : nullptr;
  });
}

inline void norm_residual(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                          float* out, size_t first, size_t last) {
  normalize_tokens(g, residual, weight, bias, eps, first, last, kTokenUnit,
                   [&](size_t t) { return out + residual_at(g, t, 0); });
}

// c[a][N vectors] = sum over k of A(a, k) * b[k][N vectors], for R rows; A(a, k) = A[a * row + k * column].
template <size_t N, size_t R>
inline void product(const float* A, size_t row, size_t column, size_t depth, const float* b, size_t b_stride, float* c,
                    size_t c_stride) {
  V sum[R][N];
  for (size_t a = 0; a < R; ++a)
    for (size_t n = 0; n < N; ++n) sum[a][n] = V::set(0.0f);
  for (size_t k = 0; k < depth; ++k) {
    V from[N];
    for (size_t n = 0; n < N; ++n) from[n] = V::load(b + k * b_stride + n * V::kLanes);
    for (size_t a = 0; a < R; ++a) {
      const V w = V::set(A[a * row + k * column]);
      for (size_t n = 0; n < N; ++n) sum[a][n] = V::fma(w, from[n], sum[a][n]);
    }
  }
  for (size_t a = 0; a < R; ++a)
    for (size_t n = 0; n < N; ++n) V::store(c + a * c_stride + n * V::kLanes, sum[a][n]);
}

constexpr size_t kProductSums = 12;  // of a product, in registers
#if defined(__wasm__)
constexpr size_t kProductRows = 6;  // more would be 3 KB of the module for the last of an odd number of vectors
#else
constexpr size_t kProductRows = 12;
#endif

template <size_t N, class>
struct Products;
template <size_t N, size_t... R>
struct Products<N, std::index_sequence<R...>> {
  static constexpr decltype(&product<N, 1>) run[] = {product<N, R + 1>...};
};

template <size_t N>
inline void product_rows(size_t rows, const float* A, size_t row, size_t column, size_t depth, const float* b,
                         size_t b_stride, float* c, size_t c_stride) {
  constexpr size_t most = kProductSums / N < kProductRows ? kProductSums / N : kProductRows;
  for (size_t a = 0; a < rows; a += most)
    Products<N, std::make_index_sequence<most>>::run[(rows - a < most ? rows - a : most) - 1](
        A + a * row, row, column, depth, b, b_stride, c + a * c_stride, c_stride);
}

// A dense layer has its rows as they are: blocks of [kRowBlock][columns] floats.
inline size_t pack_any_block(const RowSource& source, const Linear& l, size_t block, void* out) {
#if defined(__AVXVNNI__)
  if (l.quantize) return zips::pack_block(source, l, block, out);
#endif
  if (!l.dense || !kInFloats) return (l.exact ? pack_block<ExactStep> : pack_block<Bf16Step>)(source, l, block, out);
  auto* to = static_cast<float*>(out);
  for (size_t r = 0; to && r < kRowBlock; ++r) {
    const Row row = source.row(source.context, block * kRowBlock + r);
    for (size_t k = 0; k < l.columns; ++k) *to++ = row.count ? row.value[k] : 0.0f;
  }
  return round_up(kRowBlock * l.columns * sizeof(float), 64);
}

// As multiply, for a dense layer.
template <class Sink>
inline void multiply_dense(const Geometry& g, const Linear& l, const float* x, size_t first_chunk, size_t last_chunk,
                           size_t first, size_t last, V* sums, const Sink& sink) {
  const Chunks chunks(g);
  for (; first < last; ++first)
    for (size_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const size_t vectors = chunks.size(chunk);
      const auto* rows = reinterpret_cast<const float*>(static_cast<const char*>(l.data) + l.offsets[first]);
      const float* from = x + chunk * l.columns * kLine;
      auto* to = reinterpret_cast<float*>(sums);
      size_t j = 0;
      for (; j + 2 <= vectors; j += 2, from += 2 * V::kLanes, to += 2 * V::kLanes)
        product_rows<2>(kRowBlock, rows, l.columns, 1, l.columns, from, kLine, to, kLine);
      if (j < vectors) product_rows<1>(kRowBlock, rows, l.columns, 1, l.columns, from, kLine, to, kLine);
      sink(first * kRowBlock, chunk, vectors, sums);
    }
}

// sink(row, chunk, j, y) for all rows of blocks [first, last) and chunks [first, last) of tokens, y being vector j of
// V.
template <class Sink>
inline void multiply_rows(const Geometry& g, const Linear& l, const void* input, size_t first_chunk, size_t last_chunk,
                          size_t first, size_t last, P* sums, const Sink& sink) {
  const auto* x = static_cast<const Number*>(input);
  const auto finish = [&](size_t block, size_t chunk, size_t vectors, const P* sums_of_rows) {
    const auto* sum = reinterpret_cast<const Number*>(sums_of_rows);
    for (size_t row = block; row < block + kRowBlock; ++row, sum += kLine) {
      const V scale = V::set(l.scale[row]), bias = V::set(l.bias[row]);
      for (size_t j = 0; j < vectors * kParts; ++j)
        sink(row, chunk, j, V::fma(V::load(sum + j * V::kLanes), scale, bias));
    }
  };
#if defined(__AVXVNNI__)
  if (l.quantize) return zips::multiply(g, l, input, first_chunk, last_chunk, first, last, sums, finish);
#endif
  if constexpr (kInFloats)
    if (l.dense) return multiply_dense(g, l, x, first_chunk, last_chunk, first, last, sums, finish);
  if (l.exact)
    multiply<ExactStep>(g, l, x, first_chunk, last_chunk, first, last, sums, finish);
  else
    multiply<Bf16Step>(g, l, x, first_chunk, last_chunk, first, last, sums, finish);
}

inline void linear(const Geometry& g, const Linear& l, const void* input, Output kind, const float* residual,
                   void* output, size_t first_chunk, size_t last_chunk, size_t first_block, size_t last_block,
                   void* scratch) {
  auto* sums = static_cast<P*>(scratch);
  if (kind == Output::residual) {
    const Chunks chunks(g);
    multiply_rows(g, l, input, first_chunk, last_chunk, first_block, last_block, sums,
                  [&](size_t row, size_t chunk, size_t j, V y) {
                    const size_t at = residual_at(g, chunks.first_token(chunk) + j * V::kLanes, row);
                    if (row < l.used) V::store(static_cast<float*>(output) + at, y + V::load(residual + at));
                  });
    return;
  }
  multiply_rows(g, l, input, first_chunk, last_chunk, first_block, last_block, sums,
                [&](size_t row, size_t chunk, size_t j, V y) {
                  auto* to = static_cast<Number*>(output) + (chunk * l.used + row) * kLine + j * V::kLanes;
                  if (row < l.used) V::store(to, kind == Output::gelu ? gelu(y) : y);
                });
}

// q, k and v of a head, and what its attention needs beside them.
struct HeadScratch {
  float *q, *k, *v, *scores, *context;  // scores and context for two vectors of queries
};

// Attention of N vectors of queries, from token `at` on.
template <size_t N>
inline void attend(const Geometry& g, const HeadScratch& s, size_t at, size_t head, Number* output) {
  constexpr size_t width = N * V::kLanes;
  product_rows<N>(g.tokens, s.k, 1, g.padded_tokens, g.head_dim, s.q + at, g.padded_tokens, s.scores, width);
  V maximum[2][N], sum[N];  // two maxima at a time, because one alone waits for itself
  for (size_t n = 0; n < N; ++n) {
    maximum[0][n] = maximum[1][n] = V::load(s.scores + n * V::kLanes);
    sum[n] = V::set(0.0f);
  }
  for (size_t j = 1; j < g.tokens; ++j)
    for (size_t n = 0; n < N; ++n)
      maximum[j % 2][n] = V::max(maximum[j % 2][n], V::load(s.scores + j * width + n * V::kLanes));
  for (size_t n = 0; n < N; ++n) maximum[0][n] = V::max(maximum[0][n], maximum[1][n]);
  for (size_t j = 0; j < g.tokens; ++j)
    for (size_t n = 0; n < N; ++n) {
      float* score = s.scores + j * width + n * V::kLanes;
      const V e = exponential(V::load(score) - maximum[0][n]);
      sum[n] = sum[n] + e;
      V::store(score, e);
    }
  product_rows<N>(g.head_dim, s.v, g.padded_tokens, 1, g.tokens, s.scores, width, s.context, width);
  const Chunks chunks(g);
  for (size_t n = 0; n < N; ++n) {
    const V inverse = V::div(V::set(1.0f), sum[n]);
    Number* out = output + chunks.at_token(at + n * V::kLanes, g.width) + head * g.head_dim * kLine;
    for (size_t d = 0; d < g.head_dim; ++d)
      V::store(out + d * kLine, V::load(s.context + d * width + n * V::kLanes) * inverse);
  }
}

inline HeadScratch layout_head_scratch(const Geometry& g, void* scratch) {
  const size_t plane = g.padded_head_dim * g.padded_tokens;
  HeadScratch s;
  s.q = reinterpret_cast<float*>(static_cast<char*>(scratch) + sums_bytes());
  s.k = s.q + plane;
  s.v = s.k + plane;
  s.scores = s.v + plane;
  s.context = s.scores + g.padded_tokens * 2 * V::kLanes;
  return s;
}

inline void project_head(const Geometry& g, const Linear& qkv, const void* input, size_t head, void* scratch) {
  float* q = layout_head_scratch(g, scratch).q;
  const size_t blocks = 3 * g.padded_head_dim / kRowBlock, origin = head * 3 * g.padded_head_dim;
  const Chunks chunks(g);
  multiply_rows(g, qkv, input, 0, chunks.count, head * blocks, (head + 1) * blocks, static_cast<P*>(scratch),
                [&](size_t row, size_t chunk, size_t j, V y) {
                  V::store(q + (row - origin) * g.padded_tokens + chunks.first_token(chunk) + j * V::kLanes, y);
                });
}

inline void attend_head(const Geometry& g, void* output, size_t head, void* scratch) {
  const HeadScratch s = layout_head_scratch(g, scratch);
  auto* to = static_cast<Number*>(output);
  size_t token = 0;
  for (; token + V::kLanes < g.tokens; token += 2 * V::kLanes) attend<2>(g, s, token, head, to);
  if (token < g.tokens) attend<1>(g, s, token, head, to);
}

inline void dense_rows(const float* weight, const float* bias, const float* x, size_t columns, float* out, size_t first,
                       size_t last) {
  for (size_t r = first; r < last; ++r) {
    const float* w = weight + r * columns;
    V sum[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
    size_t k = 0;
    for (; k + 4 * V::kLanes <= columns; k += 4 * V::kLanes)
      for (size_t j = 0; j < 4; ++j)
        sum[j] = V::fma(V::load(w + k + j * V::kLanes), V::load(x + k + j * V::kLanes), sum[j]);
    float parts[V::kLanes];
    V::store(parts, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    float total = 0.0f;
    for (size_t j = 0; j < V::kLanes; ++j) total += parts[j];
    for (; k < columns; ++k) total += w[k] * x[k];
    out[r] = total + bias[r];
  }
}

inline void no_thread_state() {}

template <class Vector>
inline sparsemae::Peak peak_of(size_t rounds, float* sink) {
  Vector sums[kProductSums];
  for (Vector& sum : sums) sum = Vector::set(0.0f);
  const Vector one = Vector::set(1.0f);
  for (size_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (size_t i = 0; i < kProductSums; ++i) sums[i] = Vector::fma(one, sums[i], one);
  for (size_t i = 1; i < kProductSums; ++i) sums[0] = Vector::max(sums[0], sums[i]);
  Vector::store(reinterpret_cast<typename Vector::Number*>(sink), sums[0]);
  return {Vector::kMultiplyAdd, rounds * kProductSums * Vector::kLanes};
}

inline sparsemae::Peak peak(sparsemae::Product product, size_t rounds, float* sink) {
#if defined(__AVXVNNI__)
  if (product == sparsemae::Product::int8) return zips::peak(rounds, sink);
#endif
  return product == sparsemae::Product::dense ? peak_of<V>(rounds, sink) : peak_of<P>(rounds, sink);
}

constexpr sparsemae::Kernels table(const char* name) {
  return {
      .name = name,
      .math = "fp32",
      .blocked_residual = true,
      .head_step = kRowBlock,
      .activation_bytes = activation_bytes,
      .scratch_bytes = scratch_bytes,
      .pack_block = pack_any_block,
      .thread_begin = no_thread_state,
      .thread_end = no_thread_state,
      .patches = patches,
      .norm = norm,
      .norm_residual = norm_residual,
#if defined(__AVXVNNI__)
      .quantize = zips::quantize,
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

}  // namespace lanes

#endif  // SPARSEMAE_LANE_KERNELS_INL_H
