// fp32 for Arm's Advanced SIMD: the lane kernels over four floats.
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace {

#include "floats_neon-inl.h"

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels kTable = lanes::table("neon");

}  // namespace

namespace sparsemae {
const Kernels* neon_kernels() { return &kTable; }
}  // namespace sparsemae
