// fp32 for AVX2 and FMA: the lane kernels over eight floats.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

#include "floats_avx2-inl.h"
using Floats = Floats8<7>;

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("avx2");

}  // namespace

namespace sparsemae {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace sparsemae
