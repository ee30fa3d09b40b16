// The loops over the masks for AVX2.
#include "mask_loops.h"

#include <cstring>

namespace {

#include "mask_loops-inl.h"

}  // namespace

namespace sparsemae {
const MaskLoops* avx2_mask_loops() { return &kMaskLoops; }
}  // namespace sparsemae
