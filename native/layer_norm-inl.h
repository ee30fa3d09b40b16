// Layer norm of tokens in the lanes, feature-major, over a vector type. Included inside the anonymous namespace of a
// file of kernels.

// Mean and inverse deviation of kCount vectors of tokens.
#ifndef SPARSEMAE_LAYER_NORM_INL_H
#define SPARSEMAE_LAYER_NORM_INL_H

template <class V, std::size_t kCount>
struct Moments {
  V mean[kCount], scale[kCount];
};

// In one reading: features are taken in parts that fit the registers, and the moments of the parts are joined (Chan,
// Golub and LeVeque's formula), which is as exact as two readings.
template <class V, std::size_t kCount>
inline Moments<V, kCount> moments(const float* x, std::size_t stride, std::size_t width, float eps) {
  constexpr std::size_t kPart = 8;
  Moments<V, kCount> m;
  V squares[kCount];
  for (std::size_t i = 0; i < kCount; ++i) m.mean[i] = squares[i] = V::set(0.0f);
  const auto join = [&](std::size_t i, std::size_t before, std::size_t count, V mean) {
    const float share = static_cast<float>(count) / static_cast<float>(before + count);
    const V delta = mean - m.mean[i];
    m.mean[i] = V::fma(delta, V::set(share), m.mean[i]);
    squares[i] = V::fma(delta * delta, V::set(share * static_cast<float>(before)), squares[i]);
  };
  std::size_t d = 0;
  for (; d + kPart <= width; d += kPart)
    for (std::size_t i = 0; i < kCount; ++i) {
      V part[kPart], sum[2] = {V::set(0.0f), V::set(0.0f)}, deviations[2] = {V::set(0.0f), V::set(0.0f)};
      for (std::size_t p = 0; p < kPart; ++p) {
        part[p] = V::load(x + (d + p) * stride + i * V::kLanes);
        sum[p % 2] = sum[p % 2] + part[p];
      }
      const V mean = (sum[0] + sum[1]) * V::set(1.0f / kPart);
      for (std::size_t p = 0; p < kPart; ++p) {
        const V centered = part[p] - mean;
        deviations[p % 2] = V::fma(centered, centered, deviations[p % 2]);
      }
      squares[i] = squares[i] + (deviations[0] + deviations[1]);
      join(i, d, kPart, mean);
    }
  for (; d < width; ++d)
    for (std::size_t i = 0; i < kCount; ++i) join(i, d, 1, V::load(x + d * stride + i * V::kLanes));
  for (std::size_t i = 0; i < kCount; ++i)
    m.scale[i] = V::rsqrt(V::fma(squares[i], V::set(1.0f / static_cast<float>(width)), V::set(eps)));
  return m;
}

// write(d, i, y) for the normalized features of kCount vectors of tokens, the first of them at x.
template <class V, std::size_t kCount, class Write>
inline void normalize(const float* x, std::size_t stride, std::size_t width, const float* weight, const float* bias,
                      float eps, const Write& write) {
  const auto m = moments<V, kCount>(x, stride, width, eps);
  for (std::size_t d = 0; d < width; ++d, x += stride)
    for (std::size_t i = 0; i < kCount; ++i)
      write(d, i, V::fma((V::load(x + i * V::kLanes) - m.mean[i]) * m.scale[i], V::set(weight[d]), V::set(bias[d])));
}

#endif  // SPARSEMAE_LAYER_NORM_INL_H
