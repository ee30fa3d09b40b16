// fp32 for AVX-512F: the lane kernels over sixteen floats. Serves fp32 files on every machine with AVX-512.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

#include "floats_avx512-inl.h"

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("avx512");

}  // namespace

namespace sparsemae {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace sparsemae
