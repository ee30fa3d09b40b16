// Dense products by AMX over the layouts of gather_kernels-inl.h, which are its operands as they are: tokens are rows
// of A; keys, values and dense weights in pairs are B. Included inside the anonymous namespace of a file of kernels,
// after amx_tiles-inl.h and gather_kernels-inl.h.
#ifndef SPARSEMAE_GATHER_TILES_INL_H
#define SPARSEMAE_GATHER_TILES_INL_H

#ifndef __AMX_TILE__
#error "gather_tiles-inl.h needs __AMX_TILE__"
#endif

namespace gather {

// Tokens [first_token, last_token) times blocks [first, last) of a dense layer; sink as in multiply.
template <class Sink>
inline void multiply_tiles(const Linear& l, const char* x, size_t first_token, size_t last_token, size_t first,
                           size_t last, const Sink& sink) {
  const size_t stride = stride_of(l.columns) * 2, depth = tiles_of<Bf16>(l.columns);
  alignas(64) float sums[2][16][32];
  for (size_t token = first_token; token < last_token; token += 32) {
    size_t from[2];  // the last tokens are multiplied twice rather than those of others
    for (size_t i = 0; i < 2; ++i) {
      const size_t last_start = last_token < 16 ? 0 : last_token - 16;
      from[i] = token + 16 * i < last_start ? token + 16 * i : last_start;
    }
    for (size_t block = first; block < last; ++block) {
      const char *weights = static_cast<const char*>(l.data) + l.offsets[block], *x0 = x + from[0] * stride,
                 *x1 = x + from[1] * stride;
      load_sums(nullptr, true);
      for (size_t t = 0; t < depth; ++t, weights += 16 * 128, x0 += 64, x1 += 64) {
        _tile_loadd(4, x0, stride);
        _tile_loadd(5, x1, stride);
        _tile_loadd(6, weights, 128);
        _tile_loadd(7, weights + 64, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums[0], 128);
      _tile_stored(1, &sums[0][0][16], 128);
      _tile_stored(2, sums[1], 128);
      _tile_stored(3, &sums[1][0][16], 128);
      const size_t row = block * kRowBlock;
      for (size_t t = token; t < token + 32 && t < last_token; ++t) {
        const size_t i = (t - token) / 16;
        const auto y = [&](size_t half) {
          return _mm512_fmadd_ps(_mm512_load_ps(&sums[i][t - from[i]][half]), _mm512_loadu_ps(l.scale + row + half),
                                 _mm512_loadu_ps(l.bias + row + half));
        };
        sink(t, row, 0, y(0), y(kHalf));
      }
    }
  }
}

// scores[16 queries][keys] of a head, from query `i` on.
inline void score_tiles(const Scratch& s, size_t i, size_t keys, size_t hd) {
  const auto* k = reinterpret_cast<const std::uint32_t*>(s.k);
  for (size_t j = 0; j < keys; j += 32) {
    const size_t other = j + 16 < keys ? j + 16 : j;  // computed twice rather than in a form of its own
    before_tile_loads();
    _tile_zero(0);
    _tile_zero(1);
    for (size_t d = 0; d < hd; d += 32) {
      _tile_loadd(4, s.q + i * hd + d, hd * 2);
      _tile_loadd(6, k + d / 2 * keys + j, keys * 4);
      _tile_loadd(7, k + d / 2 * keys + other, keys * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, s.scores + j, keys * 4);
    _tile_stored(1, s.scores + other, keys * 4);
  }
}

inline void attend_head_tiles(const Geometry& g, void* output, size_t head, void* scratch) {
  const Scratch s = layout_scratch(g, scratch);
  const size_t hd = g.padded_head_dim, keys = g.padded_tokens, stride = stride_of(g.width), p_stride = paired_keys(g);
  const auto* v = reinterpret_cast<const std::uint32_t*>(s.v);
  alignas(64) float sums[16][32];
  for (size_t i = 0; i < g.tokens; i += 16) {
    score_tiles(s, i, keys, hd);
    float inverse[16];
    for (size_t r = 0; r < 16; ++r) inverse[r] = softmax_row(s.scores + r * keys, g.tokens, keys, s.p + r * p_stride);
    for (size_t d = 0; d < g.head_dim; d += 32) {
      before_tile_loads();
      _tile_zero(0);
      _tile_zero(1);
      for (size_t t = 0; t < p_stride; t += 32) {
        _tile_loadd(4, s.p + t, p_stride * 2);
        _tile_loadd(6, v + t / 2 * hd + d, hd * 4);
        _tile_loadd(7, v + t / 2 * hd + d + 16, hd * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sums, 128);
      _tile_stored(1, &sums[0][16], 128);
      for (size_t r = 0; r < 16; ++r) store_attended(g, output, stride, i + r, head, d, sums[r], inverse[r]);
    }
  }
}

}  // namespace gather

#endif  // SPARSEMAE_GATHER_TILES_INL_H
