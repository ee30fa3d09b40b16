// bf16 with AVX-512-BF16: one vpermw gathers what 16 rows keep of 32 inputs, one vdpbf16ps multiplies it.
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
using std::uint16_t;

#include "gather_kernels-inl.h"

constexpr Kernels kTable = gather::table("avx512bf16");

}  // namespace

namespace sparsemae {
const Kernels* avx512bf16_kernels() { return &kTable; }
}  // namespace sparsemae
