// As kernels_avx2.cpp, and int8 files with AVX-VNNI (Alder Lake and later): zip_products-inl.h.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

#include "floats_avx2-inl.h"
using Floats = Floats8<4>;  // 32 tokens: as many bytes are a register

#define SPARSEMAE_VECTOR Floats
#include "lane_kernels-inl.h"

constexpr sparsemae::Kernels table() {
  sparsemae::Kernels t = lanes::table("avxvnni");
  t.math = "int8";
  return t;
}
constexpr sparsemae::Kernels kTable = table();

}  // namespace

namespace sparsemae {
const Kernels* avxvnni_kernels() { return &kTable; }
}  // namespace sparsemae
