// fp32 kernels with tokens in the lanes, written once over a vector type V and compiled once per instruction set.
//
// Activations and residual are feature-major, [features][padded tokens]: a kept weight is one broadcast and one multiply-add per
// vector of tokens, whatever n:m is, and layer norm, softmax and GELU need no sum across lanes. The including file defines, in
// its own anonymous namespace, `V` with: static kLanes; load, store, set, operator+ - *, fma(a, b, c), max, div, shift_add.
// Inputs are taken in slabs so that the slab of activations stays in the first-level cache.

namespace lanes {

using sparsemae::Geometry;
using sparsemae::Linear;
using sparsemae::Output;
using sparsemae::Row;
using sparsemae::RowSource;
using sparsemae::kRowBlock;
using sparsemae::kTokenUnit;
using sparsemae::round_up;
using std::size_t;

constexpr size_t kVectors = 8;                               // vectors of tokens per register block
constexpr size_t kBlockTokens = kVectors * V::kLanes;
constexpr size_t kSlab = 8192 / kBlockTokens;                // inputs per slab: 32 KB of activations

struct Entry {
  std::uint32_t input;
  float weight;
};

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

// x * Phi(x), with erf after Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7).
inline V gelu(V x) {
  V a = V::max(x, V::set(0.0f) - x) * V::set(0.70710678118654752f);
  V t = V::div(V::set(1.0f), V::fma(a, V::set(0.3275911f), V::set(1.0f)));
  V p = V::set(1.061405429f);
  p = V::fma(p, t, V::set(-1.453152027f));
  p = V::fma(p, t, V::set(1.421413741f));
  p = V::fma(p, t, V::set(-0.284496736f));
  p = V::fma(p, t, V::set(0.254829592f));
  V half_tail = p * t * exponential(V::set(0.0f) - a * a) * V::set(0.5f);  // (1 - erf(|x| / sqrt 2)) / 2
  return V::max(x, V::set(0.0f)) - V::max(x, V::set(0.0f) - x) * half_tail;
}

inline size_t activation_bytes(size_t features, const Geometry& g) { return features * g.padded_tokens * sizeof(float); }

// q, k, v, the scores of two vectors of queries, and the accumulators of a row block.
inline size_t scratch_floats(const Geometry& g) {
  return 3 * g.padded_head_dim * g.padded_tokens + g.padded_tokens * 2 * V::kLanes + kRowBlock * kBlockTokens;
}
inline size_t scratch_bytes(const Geometry& g) { return scratch_floats(g) * sizeof(float); }

// Block: [slabs * kRowBlock + 1] starts (uint32, in entries), then the entries, by slab, then row, then input.
inline size_t pack_block(const RowSource& source, size_t columns, size_t block, bool, void* out) {
  const size_t slabs = (columns + kSlab - 1) / kSlab;
  const size_t header = round_up((slabs * kRowBlock + 1) * sizeof(std::uint32_t), 64);
  auto* starts = static_cast<std::uint32_t*>(out);
  auto* entries = reinterpret_cast<Entry*>(static_cast<char*>(out) + (out ? header : 0));
  size_t count = 0;
  if (!out) {
    for (size_t r = 0; r < kRowBlock; ++r) count += source.row(source.context, block * kRowBlock + r).count;
    return round_up(header + count * sizeof(Entry), 64);
  }
  for (size_t s = 0; s < slabs; ++s) {
    for (size_t r = 0; r < kRowBlock; ++r) {
      starts[s * kRowBlock + r] = static_cast<std::uint32_t>(count);
      const Row row = source.row(source.context, block * kRowBlock + r);
      for (size_t i = 0; i < row.count; ++i)
        if (row.index[i] / kSlab == s) entries[count++] = Entry{row.index[i], row.value[i]};
    }
  }
  starts[slabs * kRowBlock] = static_cast<std::uint32_t>(count);
  return round_up(header + count * sizeof(Entry), 64);
}

inline void patches(const Geometry& g, const float* image, void* activation, size_t first) {
  auto* out = static_cast<float*>(activation);
  const size_t across = g.image_width / g.patch;
  for (size_t t = first; t < first + kTokenUnit && t < g.tokens; ++t) {
    if (t < g.prefix) continue;  // stays zero
    const size_t row = (t - g.prefix) / across * g.patch, column = (t - g.prefix) % across * g.patch;
    float* to = out + t;
    for (size_t c = 0; c < g.channels; ++c)
      for (size_t y = 0; y < g.patch; ++y) {
        const float* from = image + (c * g.image_height + row + y) * g.image_width + column;
        for (size_t x = 0; x < g.patch; ++x, to += g.padded_tokens) *to = from[x];
      }
  }
}

inline void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, void* activation,
                 size_t first) {
  auto* out = static_cast<float*>(activation);
  const size_t stride = g.padded_tokens;
  const V inverse = V::set(1.0f / static_cast<float>(g.width));
  for (size_t t = first; t < first + kTokenUnit; t += V::kLanes) {
    V sum = V::set(0.0f), squares = V::set(0.0f);
    for (size_t d = 0; d < g.width; ++d) sum = sum + V::load(residual + d * stride + t);
    const V mean = sum * inverse;
    for (size_t d = 0; d < g.width; ++d) {
      const V centred = V::load(residual + d * stride + t) - mean;
      squares = V::fma(centred, centred, squares);
    }
    const V scale = V::rsqrt(V::fma(squares, inverse, V::set(eps)));
    for (size_t d = 0; d < g.width; ++d) {
      const V centred = V::load(residual + d * stride + t) - mean;
      V::store(out + d * stride + t, V::fma(centred * scale, V::set(weight[d]), V::set(bias[d])));
    }
  }
}

inline void norm_residual(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, float* out,
                          size_t first) {
  norm(g, residual, weight, bias, eps, out, first);
}

// acc[J vectors] += sum over entries of weight * x[input]; x points at the block's first token.
template <size_t J>
inline void accumulate(const Entry* entry, const Entry* end, const float* x, size_t stride, float* acc, bool fresh) {
  V sum[J];
  for (size_t j = 0; j < J; ++j) sum[j] = fresh ? V::set(0.0f) : V::load(acc + j * V::kLanes);
  for (; entry != end; ++entry) {
    const V w = V::set(entry->weight);
    const float* row = x + entry->input * stride;
    for (size_t j = 0; j < J; ++j) sum[j] = V::fma(w, V::load(row + j * V::kLanes), sum[j]);
  }
  for (size_t j = 0; j < J; ++j) V::store(acc + j * V::kLanes, sum[j]);
}

using Accumulate = void (*)(const Entry*, const Entry*, const float*, size_t, float*, bool);
constexpr Accumulate kAccumulate[kVectors] = {accumulate<1>, accumulate<2>, accumulate<3>, accumulate<4>,
                                              accumulate<5>, accumulate<6>, accumulate<7>, accumulate<8>};

inline void linear_block(const Geometry& g, const Linear& l, const float* x, Output kind, float* out, size_t block, size_t rows,
                         float* acc) {
  const char* data = static_cast<const char*>(l.data) + l.offsets[block];
  const size_t stride = g.padded_tokens, slabs = (l.columns + kSlab - 1) / kSlab;
  const auto* starts = reinterpret_cast<const std::uint32_t*>(data);
  const auto* entries =
      reinterpret_cast<const Entry*>(data + round_up((slabs * kRowBlock + 1) * sizeof(std::uint32_t), 64));
  for (size_t t = 0; t < stride; t += kBlockTokens) {
    const size_t vectors = (stride - t < kBlockTokens ? stride - t : kBlockTokens) / V::kLanes;
    const Accumulate run = kAccumulate[vectors - 1];
    for (size_t s = 0; s < slabs; ++s)
      for (size_t r = 0; r < rows; ++r) {
        const std::uint32_t* start = starts + s * kRowBlock + r;
        run(entries + start[0], entries + start[1], x + t, stride, acc + r * kBlockTokens, s == 0);
      }
    for (size_t r = 0; r < rows; ++r) {
      const V scale = V::set(l.scale[block * kRowBlock + r]), bias = V::set(l.bias[block * kRowBlock + r]);
      float* to = out + r * stride + t;
      for (size_t j = 0; j < vectors; ++j) {
        V y = V::fma(V::load(acc + r * kBlockTokens + j * V::kLanes), scale, bias);
        if (kind == Output::gelu) y = gelu(y);
        if (kind == Output::residual) y = y + V::load(to + j * V::kLanes);
        V::store(to + j * V::kLanes, y);
      }
    }
  }
}

inline void linear(const Geometry& g, const Linear& l, const void* input, Output kind, void* output, size_t first_block,
                   size_t last_block, void* scratch) {
  for (size_t block = first_block; block < last_block; ++block) {
    const size_t row = block * kRowBlock, rows = l.used - row < kRowBlock ? l.used - row : kRowBlock;
    linear_block(g, l, static_cast<const float*>(input), kind, static_cast<float*>(output) + row * g.padded_tokens, block, rows,
                 static_cast<float*>(scratch));
  }
}

// c[a][2 vectors] = sum over k of A(a, k) * b[k][2 vectors], for 4 rows or 1; A(a, k) = A[a * row + k * column].
template <size_t R>
inline void product(const float* A, size_t row, size_t column, size_t depth, const float* b, size_t b_stride, float* c,
                    size_t c_stride) {
  V sum[R][2];
  for (size_t a = 0; a < R; ++a) sum[a][0] = sum[a][1] = V::set(0.0f);
  for (size_t k = 0; k < depth; ++k) {
    const V b0 = V::load(b + k * b_stride), b1 = V::load(b + k * b_stride + V::kLanes);
    for (size_t a = 0; a < R; ++a) {
      const V w = V::set(A[a * row + k * column]);
      sum[a][0] = V::fma(w, b0, sum[a][0]);
      sum[a][1] = V::fma(w, b1, sum[a][1]);
    }
  }
  for (size_t a = 0; a < R; ++a) {
    V::store(c + a * c_stride, sum[a][0]);
    V::store(c + a * c_stride + V::kLanes, sum[a][1]);
  }
}

inline void product_rows(size_t rows, const float* A, size_t row, size_t column, size_t depth, const float* b, size_t b_stride,
                         float* c, size_t c_stride) {
  size_t a = 0;
  for (; a + 4 <= rows; a += 4) product<4>(A + a * row, row, column, depth, b, b_stride, c + a * c_stride, c_stride);
  for (; a < rows; ++a) product<1>(A + a * row, row, column, depth, b, b_stride, c + a * c_stride, c_stride);
}

inline void attention(const Geometry& g, const Linear& qkv, const void* input, void* output, size_t head, void* scratch) {
  const size_t stride = g.padded_tokens, plane = g.padded_head_dim * stride;
  auto* q = static_cast<float*>(scratch);
  float *k = q + plane, *v = k + plane, *scores = v + plane, *acc = scores + stride * 2 * V::kLanes;
  const size_t blocks = 3 * g.padded_head_dim / kRowBlock;
  for (size_t b = 0; b < blocks; ++b)
    linear_block(g, qkv, static_cast<const float*>(input), Output::activation, q + b * kRowBlock * stride, head * blocks + b,
                 kRowBlock, acc);
  constexpr size_t width = 2 * V::kLanes;
  for (size_t i = 0; i < stride; i += width) {
    // padded tokens are a multiple of 16; the last step may reach back over queries that are already done
    const size_t at = i + width <= stride ? i : stride - width;
    product_rows(g.tokens, k, 1, stride, g.head_dim, q + at, stride, scores, width);
    V inverse[2];
    for (size_t half = 0; half < 2; ++half) {
      float* s = scores + half * V::kLanes;
      V top = V::load(s), sum = V::set(0.0f);
      for (size_t j = 1; j < g.tokens; ++j) top = V::max(top, V::load(s + j * width));
      for (size_t j = 0; j < g.tokens; ++j) {
        const V e = exponential(V::load(s + j * width) - top);
        sum = sum + e;
        V::store(s + j * width, e);
      }
      inverse[half] = V::div(V::set(1.0f), sum);
    }
    float* out = static_cast<float*>(output) + head * g.head_dim * stride + at;
    product_rows(g.head_dim, v, stride, 1, g.tokens, scores, width, out, stride);
    for (size_t d = 0; d < g.head_dim; ++d)
      for (size_t half = 0; half < 2; ++half) {
        float* to = out + d * stride + half * V::kLanes;
        V::store(to, V::load(to) * inverse[half]);
      }
  }
}

inline void dense_rows(const float* weight, const float* bias, const float* x, size_t columns, float* out, size_t first,
                       size_t last) {
  for (size_t r = first; r < last; ++r) {
    const float* w = weight + r * columns;
    V sum[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
    size_t k = 0;
    for (; k + 4 * V::kLanes <= columns; k += 4 * V::kLanes)
      for (size_t j = 0; j < 4; ++j) sum[j] = V::fma(V::load(w + k + j * V::kLanes), V::load(x + k + j * V::kLanes), sum[j]);
    float parts[V::kLanes];
    V::store(parts, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    float total = 0.0f;
    for (size_t j = 0; j < V::kLanes; ++j) total += parts[j];
    for (; k < columns; ++k) total += w[k] * x[k];
    out[r] = total + bias[r];
  }
}

inline void no_thread_state() {}

constexpr sparsemae::Kernels table(const char* name) {
  return {name,     "fp32", true,          false,  kRowBlock, activation_bytes, scratch_bytes, pack_block, no_thread_state, no_thread_state,
          patches,  norm,   norm_residual, nullptr, linear, attention,        dense_rows};
}

}  // namespace lanes
