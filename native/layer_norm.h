// Mean and deviation of tokens in the lanes, feature-major, over a vector type. Included inside the anonymous namespace of a file of kernels.

template <class V>
struct Moments {
  V mean, scale;

  V normalised(V x, float weight, float bias) const { return V::fma((x - mean) * scale, V::set(weight), V::set(bias)); }
};

// In one reading: features are taken in parts that fit the registers, and the moments of the parts are joined (Chan, Golub and LeVeque's
// formula), which is as exact as two readings.
template <class V>
inline Moments<V> moments(const float* x, std::size_t stride, std::size_t width, float eps) {
  constexpr std::size_t kPart = 8;
  V mean = V::set(0.0f), squares = V::set(0.0f);
  const auto join = [&](std::size_t before, std::size_t count, V part_mean) {
    const float share = static_cast<float>(count) / static_cast<float>(before + count);
    const V delta = part_mean - mean;
    mean = V::fma(delta, V::set(share), mean);
    squares = V::fma(delta * delta, V::set(share * static_cast<float>(before)), squares);
  };
  std::size_t d = 0;
  for (; d + kPart <= width; d += kPart) {
    V part[kPart];
    for (std::size_t i = 0; i < kPart; ++i) part[i] = V::load(x + (d + i) * stride);
    const V sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    const V part_mean = sum * V::set(1.0f / kPart);
    V deviations[2] = {V::set(0.0f), V::set(0.0f)};
    for (std::size_t i = 0; i < kPart; ++i) {
      const V centred = part[i] - part_mean;
      deviations[i % 2] = V::fma(centred, centred, deviations[i % 2]);
    }
    squares = squares + (deviations[0] + deviations[1]);
    join(d, kPart, part_mean);
  }
  for (; d < width; ++d) join(d, 1, V::load(x + d * stride));
  return {mean, V::rsqrt(V::fma(squares, V::set(1.0f / static_cast<float>(width)), V::set(eps)))};
}
