// The loops over the masks for AVX-512.
#include "mask_loops.h"

#include <cstring>

namespace {

#include "mask_loops-inl.h"

}  // namespace

namespace sparsemae {
const MaskLoops* avx512_mask_loops() { return &kMaskLoops; }
}  // namespace sparsemae
