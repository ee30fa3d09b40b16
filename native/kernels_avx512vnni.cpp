// As kernels_avx512bf16.cpp, and int8 files with VNNI and VBMI: one vpermb gathers what 16 rows keep of 64 inputs, one
// vpdpbusd multiplies that.
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
using std::uint16_t;

#include "gather_kernels-inl.h"

constexpr Kernels kTable = gather::table("avx512vnni");

}  // namespace

namespace sparsemae {
const Kernels* avx512vnni_kernels() { return &kTable; }
}  // namespace sparsemae
