// fp16 with tokens in the lanes, for weights so sparse that AMX would mostly multiply zeros: 32 tokens are one
// register, and two multiply-adds start in every cycle. Attention and the embedding, which are dense, stay on AMX tiles
// (every processor that has one of the two instruction sets has both).
//
// Products are summed in fp16. They cannot overflow: when the model is built, the largest input that a layer can get is
// bounded (layer norm bounds it, attention averages, GELU shrinks), and every row of weights is scaled by a power of
// two so that no sum exceeds half of what fp16 can hold.
//
//   activation   fp16, in the chunks of lane_products-inl.h
//   weights      fp16, as lane_products-inl.h has them
#include <immintrin.h>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
#include "amx_tiles-inl.h"

struct Halves {
  using Number = _Float16;
  static constexpr size_t kLanes = 32, kVectors = 4, kRows = 4;
  __m512h x;

  static Halves zero() { return {_mm512_setzero_ph()}; }
  static Halves load(const Number* p) { return {_mm512_loadu_ph(p)}; }
  static void store(Number* p, Halves v) { _mm512_storeu_ph(p, v.x); }
  static Halves set(float s) { return {_mm512_set1_ph(static_cast<_Float16>(s))}; }
  static Halves fma(Halves a, Halves b, Halves c) { return {_mm512_fmadd_ph(a.x, b.x, c.x)}; }
  static Halves min(Halves a, Halves b) { return {_mm512_min_ph(a.x, b.x)}; }
  static Halves max(Halves a, Halves b) { return {_mm512_max_ph(a.x, b.x)}; }
};

// The weight, and above it the offset in units of eight bytes: one load for both, because loads are what a product runs
// out of.
struct Kept {
  std::uint32_t bits;

  static Kept of(float w, size_t offset) {
    const auto half = static_cast<_Float16>(w);
    std::uint16_t low;
    __builtin_memcpy(&low, &half, sizeof low);
    return {low | static_cast<std::uint32_t>(offset / 8) << 16};
  }
  Kept read() const {
    std::uint32_t both = bits;
    __asm__("" : "+r"(both));  // or the compiler makes two loads of it
    return {both};
  }
  Halves weight() const { return {(__m512h)_mm512_set1_epi16(static_cast<short>(bits))}; }
  size_t offset() const { return size_t{8} * (bits >> 16); }
};

#define SPARSEMAE_PRODUCT Halves
#include "lane_products-inl.h"
using Step = lanes::RowStep<Kept>;

inline void store_half(_Float16* to, __m512 x) { _mm256_storeu_ph(to, _mm512_cvtxps_ph(x)); }

// 16 of the 32 tokens as fp32, scaled and with the bias of their row.
inline __m512 epilogue(const Linear& l, size_t row, Halves sum, size_t half) {
  const __m512i bits = (__m512i)sum.x;
  const __m512 x =
      _mm512_cvtxph_ps((__m256h)(half ? _mm512_extracti64x4_epi64(bits, 1) : _mm512_castsi512_si256(bits)));
  return _mm512_fmadd_ps(x, _mm512_set1_ps(l.scale[row]), _mm512_set1_ps(l.bias[row]));
}

// x * Phi(x), with Phi - 1/2 as c times a polynomial in c^2 / 8 - 1 for |c| <= 4. Its error, 5e-4 in the root mean
// square, is a fifth of what rounding the result to bf16 would cost.
inline Halves gelu(Halves x) {
  const Halves bound = Halves::max(x, Halves::set(-4.0f)), c = Halves::min(bound, Halves::set(4.0f));
  const Halves u = Halves::fma({_mm512_mul_ph(c.x, c.x)}, Halves::set(0.125f), Halves::set(-1.0f));
  Halves p = Halves::set(0.00597158f);
  p = Halves::fma(p, u, Halves::set(-0.01655076f));
  p = Halves::fma(p, u, Halves::set(0.02409155f));
  p = Halves::fma(p, u, Halves::set(-0.03546246f));
  p = Halves::fma(p, u, Halves::set(0.05541006f));
  p = Halves::fma(p, u, Halves::set(-0.0844266f));
  p = Halves::fma(p, u, Halves::set(0.17597022f));
  return {_mm512_mul_ph(bound.x, Halves::fma(p, c, Halves::set(0.5f)).x)};
}

size_t scratch_bytes(const Geometry& g) { return lanes::sums_bytes() + layout_head_scratch(g, nullptr).bytes; }

void linear(const Geometry& g, const Linear& l, const void* input, Output kind, const float* residual, void* output,
            size_t first_chunk, size_t last_chunk, size_t first, size_t last, void* scratch) {
  const auto store = [&](const auto& write) {
    lanes::multiply<Step>(
        g, l, static_cast<const _Float16*>(input), first_chunk, last_chunk, first, last, static_cast<Halves*>(scratch),
        [&](size_t block, size_t chunk, size_t vectors, const Halves* sum) {
          for (size_t row = block; row < block + kRowBlock && row < l.used; ++row, sum += lanes::kVectors)
            write(row, chunk, vectors, sum);
        });
  };
  if (kind == Output::residual) {
    const lanes::Chunks chunks(g);
    return store([&](size_t row, size_t chunk, size_t vectors, const Halves* sum) {
      const size_t token = chunks.first_token(chunk);
      size_t at = residual_at(g, token, row);
      for (size_t j = 0; j < 2 * vectors && token + j * 16 < g.padded_tokens; ++j, at += residual_unit(g))
        _mm512_storeu_ps(static_cast<float*>(output) + at,
                         _mm512_add_ps(_mm512_loadu_ps(residual + at), epilogue(l, row, sum[j / 2], j % 2)));
    });
  }
  store([&](size_t row, size_t chunk, size_t vectors, const Halves* sum) {
    auto* to = static_cast<_Float16*>(output) + (chunk * l.used + row) * lanes::kLine;
    const Halves scale = Halves::set(l.scale[row]), bias = Halves::set(l.bias[row]);
    for (size_t j = 0; j < vectors; ++j) {
      const Halves y = Halves::fma(sum[j], scale, bias);
      Halves::store(to + j * 32, kind == Output::gelu ? gelu(y) : y);
    }
  });
}

HeadScratch head_scratch(const Geometry& g, void* scratch) {
  return layout_head_scratch(g, static_cast<char*>(scratch) + lanes::sums_bytes());
}

void project_head(const Geometry& g, const Linear& qkv, const void* input, size_t head, void* scratch) {
  const HeadScratch s = head_scratch(g, scratch);
  const lanes::Chunks chunks(g);
  const size_t origin = head * 3 * g.padded_head_dim, blocks = 3 * g.padded_head_dim / kRowBlock;
  lanes::multiply<Step>(g, qkv, static_cast<const _Float16*>(input), 0, chunks.count, head * blocks,
                        (head + 1) * blocks, static_cast<Halves*>(scratch),
                        [&](size_t block, size_t chunk, size_t vectors, const Halves* sum) {
                          for (size_t row = block; row < block + kRowBlock; row += 2, sum += 2 * lanes::kVectors)
                            for (size_t j = 0; j < 2 * vectors; ++j) {
                              const size_t unit = chunks.first(chunk) * 2 + j;
                              if (unit < token_blocks(g))
                                store_projected(g, s, row - origin, unit, epilogue(qkv, row, sum[j / 2], j % 2),
                                                epilogue(qkv, row + 1, sum[lanes::kVectors + j / 2], j % 2));
                            }
                        });
}

void attend_head(const Geometry& g, void* output, size_t head, void* scratch) {
  const lanes::Chunks chunks(g);
  attend(g, head_scratch(g, scratch), [&](size_t d, size_t t, __m512 low, __m512 high) {
    if (t / 2 >= chunks.all) return;
    auto* to = static_cast<_Float16*>(output) + chunks.at(t / 2, g.width) + (head * g.head_dim + d) * lanes::kLine +
               t % 2 * 16;
    store_half(to, low);
    store_half(to + lanes::kLine, high);
  });
}

void norm(const Geometry& g, const float* residual, const float* weight, const float* bias, float eps, void* activation,
          size_t first, size_t last) {
  const lanes::Chunks chunks(g);
  for (; first < last && first / 32 < chunks.all; first += 16) {
    auto* to = static_cast<_Float16*>(activation) + chunks.at(first / 32, g.width) + first % 32;
    normalize<Floats, 1>(residual + residual_at(g, first, 0), 16, g.width, weight, bias, eps,
                         [&](size_t d, size_t, Floats y) { store_half(to + d * lanes::kLine, y.x); });
  }
}

Peak peak(Product product, size_t rounds, float* sink) {
  if (product == Product::dense) return amx_kernels()->peak(product, rounds, sink);
  constexpr size_t count = 16;
  Halves sums[count];
  for (size_t i = 0; i < count; ++i) sums[i] = Halves::zero();
  const Halves one = Halves::set(1.0f);
  for (size_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (size_t i = 0; i < count; ++i) sums[i] = Halves::fma(one, one, sums[i]);
  for (size_t i = 1; i < count; ++i) sums[0] = Halves::max(sums[0], sums[i]);
  _mm512_storeu_ps(sink, (__m512)sums[0].x);
  return {"vfmadd231ph", rounds * count * Halves::kLanes};
}

constexpr Kernels kTable = {
    .name = "avx512fp16",
    .math = "fp16",
    .blocked_residual = true,
    .even_heads = true,
    .head_step = kRowBlock,
    .max_density = 0.07f,  // 2:32, not 4:32
    .max_magnitude = 32768.0f,
    .embedding = amx_kernels,
    .activation_bytes = lanes::activation_bytes,
    .scratch_bytes = scratch_bytes,
    .pack_block = lanes::pack_block<Step>,
    .thread_begin = thread_begin,
    .thread_end = thread_end,
    .norm = norm,
    .norm_residual = norm_residual,
    .token_parts = lanes::token_parts,
    .part_begin = lanes::part_begin,
    .linear = linear,
    .project_head = project_head,
    .attend_head = attend_head,
    .dense_rows = dense_rows,
    .peak = peak,
};

}  // namespace

namespace sparsemae {
const Kernels* avx512fp16_kernels() { return &kTable; }
}  // namespace sparsemae
