// exp and GELU of the lane kernels, over a vector type V of floats. Included by lane_kernels-inl.h.
#ifndef SPARSEMAE_LANE_MATH_INL_H
#define SPARSEMAE_LANE_MATH_INL_H

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

#endif  // SPARSEMAE_LANE_MATH_INL_H
