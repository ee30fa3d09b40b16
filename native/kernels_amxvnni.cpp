// As kernels_avx512vnni.cpp, for processors that have AMX, too: int8 files at 2:32 by gathers, which beat the tiles
// there (these multiply the zeros); attention and the embedding, which are dense, on tiles.
#include <immintrin.h>

#include <type_traits>

#include "kernels.h"

namespace {

using namespace sparsemae;
using std::size_t;
using std::uint16_t;

#include "amx_tiles-inl.h"
#include "gather_kernels-inl.h"
#include "gather_tiles-inl.h"

void linear(const Geometry& g, const Linear& l, const void* input, Output kind, const float* residual, void* output,
            size_t first_part, size_t last_part, size_t first, size_t last, void* scratch) {
  if (!l.dense || kind != Output::residual)
    return gather::linear(g, l, input, kind, residual, output, first_part, last_part, first, last, scratch);
  gather::multiply_tiles(l, static_cast<const char*>(input), gather::part_begin(g, first_part),
                         gather::end_of(g, gather::part_begin(g, last_part)), first, last,
                         gather::add_to_residual(l, residual, static_cast<float*>(output)));
}

Peak peak(Product product, size_t rounds, float* sink) {
  return product == Product::dense ? amx_kernels()->peak(product, rounds, sink) : gather::peak(product, rounds, sink);
}

constexpr Kernels table() {
  Kernels t = gather::table("amxvnni");
  t.max_density = 0.07f;  // 2:32, not 4:32
  t.best_for_int8 = true;
  t.thread_begin = thread_begin;
  t.thread_end = thread_end;
  t.linear = linear;
  t.attend_head = gather::attend_head_tiles;
  t.peak = peak;
  return t;
}
constexpr Kernels kTable = table();

}  // namespace

namespace sparsemae {
const Kernels* amxvnni_kernels() { return &kTable; }
}  // namespace sparsemae
