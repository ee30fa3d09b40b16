// fp32 kernels with tokens in the lanes, written once over a vector type V and compiled once per instruction set.
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

#include "lane_products-inl.h"
#include "layer_norm-inl.h"

namespace lanes {

using sparsemae::kTokenUnit;
using sparsemae::Output;
using sparsemae::residual_at;

#if defined(__AVXVNNI__)
#include "zip_products-inl.h"
#endif

struct KeptFloat {
  float value;
  std::uint32_t bytes;

  static KeptFloat of(float w, std::size_t offset) { return {w, static_cast<std::uint32_t>(offset)}; }
  const KeptFloat& read() const { return *this; }
  V weight() const { return V::set(value); }
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
using ExactStep = Steps<V>::Exact;
using Bf16Step = Steps<V>::Bf16;

// exp(x) for x <= 0 or small: 2^n times a polynomial; relative error below 2e-7, 0 below about -87.
inline V exponential(V x) {
  const V magic = V::set(12582912.0f);
  V t = V::max(x, V::set(-87.0f)) * V::set(1.44269504088896341f);
  V shifted = t + magic;
  V f = t - (shifted - magic);
  V p = V::set(1.5353362e-4f);
  p = V::fma(p, f, V::set(1.3398874e-3f));
  p = V::fma(p, f, V::set(9.6184374e-3f));
  p = V::fma(p, f, V::set(5.5503324e-2f));
  p = V::fma(p, f, V::set(2.4022648e-1f));
  p = V::fma(p, f, V::set(6.9314720e-1f));
  p = V::fma(p, f, V::set(1.0f));
  return V::shift_add(p, shifted);
}

// x * Phi(x), with Phi - 1/2 as c times a polynomial in c^2 on [-5, 5], in a variable on [-1, 1]: absolute error below
// 2e-6.
inline V gelu(V x) {
  const V c = V::max(V::min(x, V::set(5.0f)), V::set(-5.0f));
  const V u = V::fma(c * c, V::set(0.08f), V::set(-1.0f));
  V p = V::set(4.70802924e-04f);
  p = V::fma(p, u, V::set(-1.49244041e-03f));
  p = V::fma(p, u, V::set(2.05243052e-03f));
  p = V::fma(p, u, V::set(-2.96503297e-03f));
  p = V::fma(p, u, V::set(6.12416110e-03f));
  p = V::fma(p, u, V::set(-1.09331695e-02f));
  p = V::fma(p, u, V::set(1.65121199e-02f));
  p = V::fma(p, u, V::set(-2.33506418e-02f));
  p = V::fma(p, u, V::set(3.14241984e-02f));
  p = V::fma(p, u, V::set(-4.04310324e-02f));
  p = V::fma(p, u, V::set(5.15215008e-02f));
  p = V::fma(p, u, V::set(-7.02967237e-02f));
  p = V::fma(p, u, V::set(1.41363780e-01f));
  return x * V::fma(p, c, V::set(0.5f));
}

// The sums of a pass; q, k and v; the scores of two vectors of queries, and what they mix of the values.
inline size_t scratch_bytes(const Geometry& g) {
  return sums_bytes() +
         (3 * g.padded_head_dim * g.padded_tokens + 2 * V::kLanes * (g.padded_tokens + g.padded_head_dim)) *
             sizeof(float);
}

inline void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  auto* out = static_cast<float*>(activation);
  const Chunks chunks(g);
  const size_t across = g.image_width / g.patch, features = g.channels * g.patch * g.patch;
  for (size_t t = first; t < first + kTokenUnit && t < g.tokens; ++t) {
    if (t < g.prefix) continue;  // stays zero
    const size_t row = (t - g.prefix) / across * g.patch, column = (t - g.prefix) % across * g.patch;
    float* to = out + chunks.at(t / V::kLanes, features) + t % V::kLanes;
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
      float* to[count];
      for (size_t i = 0; i < count; ++i) to[i] = dst(t + i * V::kLanes);
      normalize<V, count>(x, kTokenUnit, g.width, weight, bias, eps, [&](size_t d, size_t i, V y) {
        if (to[i]) V::store(to[i] + d * step, y);
      });
      t += kTokenUnit;
    } else {
      float* to = dst(t);
      normalize<V, 1>(x, kTokenUnit, g.width, weight, bias, eps,
                      [&](size_t d, size_t, V y) { V::store(to + d * step, y); });
      t += V::kLanes;
    }
  }
}

inline void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps,
                 void* activation, size_t first, size_t last) {
  const Chunks chunks(g);
  normalize_tokens(g, residual, weight, bias, eps, first, last, kLine, [&](size_t t) -> float* {
    const size_t vector = t / V::kLanes;  // the last unit has some that no token is in
    return vector < chunks.all ? static_cast<float*>(activation) + chunks.at(vector, g.width) : nullptr;
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
  if (!l.dense) return (l.exact ? pack_block<ExactStep> : pack_block<Bf16Step>)(source, l, block, out);
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

// sink(row, chunk, j, y) for all rows of blocks [first, last) and chunks [first, last) of tokens.
template <class Sink>
inline void multiply_rows(const Geometry& g, const Linear& l, const void* input, size_t first_chunk, size_t last_chunk,
                          size_t first, size_t last, V* sums, const Sink& sink) {
  const auto* x = static_cast<const float*>(input);
  const auto finish = [&](size_t block, size_t chunk, size_t vectors, const V* sum) {
    for (size_t row = block; row < block + kRowBlock; ++row, sum += kVectors) {
      const V scale = V::set(l.scale[row]), bias = V::set(l.bias[row]);
      for (size_t j = 0; j < vectors; ++j) sink(row, chunk, j, V::fma(sum[j], scale, bias));
    }
  };
#if defined(__AVXVNNI__)
  if (l.quantize) return zips::multiply(g, l, input, first_chunk, last_chunk, first, last, sums, finish);
#endif
  if (l.dense)
    multiply_dense(g, l, x, first_chunk, last_chunk, first, last, sums, finish);
  else if (l.exact)
    multiply<ExactStep>(g, l, x, first_chunk, last_chunk, first, last, sums, finish);
  else
    multiply<Bf16Step>(g, l, x, first_chunk, last_chunk, first, last, sums, finish);
}

inline void linear(const Geometry& g, const Linear& l, const void* input, Output kind, const float* residual,
                   void* output, size_t first_chunk, size_t last_chunk, size_t first_block, size_t last_block,
                   void* scratch) {
  auto* sums = static_cast<V*>(scratch);
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
                  float* to = static_cast<float*>(output) + (chunk * l.used + row) * kLine + j * V::kLanes;
                  if (row < l.used) V::store(to, kind == Output::gelu ? gelu(y) : y);
                });
}

// q, k and v of a head, and what its attention needs beside them.
struct HeadScratch {
  float *q, *k, *v, *scores, *context;  // scores and context for two vectors of queries
};

// Attention of N vectors of queries, from token `at` on.
template <size_t N>
inline void attend(const Geometry& g, const HeadScratch& s, size_t at, size_t head, float* output) {
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
    float* out = output + chunks.at(at / V::kLanes + n, g.width) + head * g.head_dim * kLine;
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
  multiply_rows(g, qkv, input, 0, chunks.count, head * blocks, (head + 1) * blocks, static_cast<V*>(scratch),
                [&](size_t row, size_t chunk, size_t j, V y) {
                  V::store(q + (row - origin) * g.padded_tokens + chunks.first_token(chunk) + j * V::kLanes, y);
                });
}

inline void attend_head(const Geometry& g, void* output, size_t head, void* scratch) {
  const HeadScratch s = layout_head_scratch(g, scratch);
  const Chunks chunks(g);
  size_t vector = 0;
  for (; vector + 2 <= chunks.all; vector += 2) attend<2>(g, s, vector * V::kLanes, head, static_cast<float*>(output));
  if (vector < chunks.all) attend<1>(g, s, vector * V::kLanes, head, static_cast<float*>(output));
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

inline sparsemae::Peak peak([[maybe_unused]] sparsemae::Product product, size_t rounds, float* sink) {
#if defined(__AVXVNNI__)
  if (product == sparsemae::Product::int8) return zips::peak(rounds, sink);
#endif
  V sums[kProductSums];
  for (V& sum : sums) sum = V::set(0.0f);
  const V one = V::set(1.0f);
  for (size_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (size_t i = 0; i < kProductSums; ++i) sums[i] = V::fma(one, sums[i], one);
  for (size_t i = 1; i < kProductSums; ++i) sums[0] = sums[0] + sums[i];
  V::store(sink, sums[0]);
  return {V::kMultiplyAdd, rounds * kProductSums * V::kLanes};
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
