// Products of sparse weights with tokens in the lanes, over a vector type P. Included inside the anonymous namespace of
// a file of kernels.
//
// Activations are cut into chunks of up to kVectors vectors of tokens, [chunk][feature][kVectors]: a kept weight is one
// broadcast and one multiply-add per vector, whatever n:m is. Inputs are taken in slabs, so that a slab of a chunk
// stays in the first-level cache, and each slab is used by up to kPassRows rows before the next: their sums come and go
// through the second-level cache, which costs less than fetching slabs again. kRows rows at a time, because the sums of
// one row alone wait for their own multiply-adds.
//
// SPARSEMAE_PRODUCT names P, which has kLanes, kVectors, kRows, load, store, fma(a, b, c), zero and Number (of a
// token). A type Step is a weight of each of kRows rows and the offset of its input from the slab's first, in bytes, as
// they are stored: set(row, weight, offset), and multiply_add(sum, the slab's first).
#ifndef SPARSEMAE_LANE_PRODUCTS_INL_H
#define SPARSEMAE_LANE_PRODUCTS_INL_H

#ifndef SPARSEMAE_PRODUCT
#error "lane_products-inl.h needs SPARSEMAE_PRODUCT"
#endif

namespace lanes {

using sparsemae::Geometry;
using sparsemae::kRowBlock;
using sparsemae::Linear;
using sparsemae::round_up;
using sparsemae::Row;
using sparsemae::RowSource;
using std::size_t;
using P = SPARSEMAE_PRODUCT;
using Number = P::Number;

constexpr size_t kVectors = P::kVectors;
constexpr size_t kRows = P::kRows;
constexpr size_t kGroups = kRowBlock / kRows;
constexpr size_t kLine = kVectors * P::kLanes;                        // numbers of one feature of a chunk
constexpr size_t kSlab = 36864 / (kLine * sizeof(Number)) / 32 * 32;  // whole groups of the usual sizes
constexpr size_t kPassBlocks = 12;
constexpr size_t kPassRows = kPassBlocks * kRowBlock;

// How the vectors of an image's tokens are shared out among chunks: as evenly as possible.
struct Chunks {
  size_t all, count, vectors, larger;  // the first `larger` chunks have one vector more than the others

  explicit Chunks(const Geometry& g) {
    all = (g.tokens + P::kLanes - 1) / P::kLanes;
    count = (all + kVectors - 1) / kVectors;
    vectors = all / count;
    larger = all % count;
  }
  size_t size(size_t chunk) const { return vectors + (chunk < larger ? 1 : 0); }
  size_t first(size_t chunk) const { return chunk * vectors + (chunk < larger ? chunk : larger); }
  size_t first_token(size_t chunk) const { return first(chunk) * P::kLanes; }
  // Where feature 0 of a vector of tokens is, in an activation of so many features; the others follow at distances of
  // kLine.
  size_t at(size_t vector, size_t features) const {
    const size_t head = larger * (vectors + 1);
    const size_t chunk = vector < head ? vector / (vectors + 1) : larger + (vector - head) / vectors;
    return chunk * features * kLine + (vector - first(chunk)) * P::kLanes;
  }
  size_t at_token(size_t token, size_t features) const { return at(token / P::kLanes, features) + token % P::kLanes; }
};

inline size_t token_parts(const Geometry& g) { return Chunks(g).count; }
inline size_t part_begin(const Geometry& g, size_t part) {
  return part < token_parts(g) ? Chunks(g).first_token(part) : g.padded_tokens;
}

inline size_t activation_bytes(size_t features, const Geometry& g) {
  return Chunks(g).count * features * kLine * sizeof(Number);
}

// A step row by row: a type Kept has of(weight, offset), read() from memory, weight() as a P, offset().
template <class Kept>
struct RowStep {
  Kept rows[kRows];

  void set(size_t r, float w, size_t offset) { rows[r] = Kept::of(w, offset); }
  template <size_t J>
  void multiply_add(P (&sum)[kRows][J], const char* bytes) const {
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) {
      const auto& kept = rows[r].read();
      const P w = kept.weight();
      const auto* from = reinterpret_cast<const Number*>(bytes + kept.offset());
      for (size_t j = 0; j < J; ++j) sum[r][j] = P::fma(w, P::load(from + j * P::kLanes), sum[r][j]);
    }
  }
};

inline size_t slabs_of(size_t columns) { return (columns + kSlab - 1) / kSlab; }
inline size_t header_bytes(size_t columns) { return round_up(slabs_of(columns) * kGroups * sizeof(std::uint16_t), 64); }

// Block: the number of steps of every slab and group of rows (uint16), then the steps in this order. The shorter rows
// of a group are filled up with zeros.
template <class Step>
inline size_t pack_block(const RowSource& source, const Linear& l, size_t block, void* out) {
  const size_t columns = l.columns;
  Row rows[kRowBlock];
  for (size_t r = 0; r < kRowBlock; ++r) rows[r] = source.row(source.context, block * kRowBlock + r);
  auto* counts = static_cast<std::uint16_t*>(out);
  Step* step = nullptr;
  if (out) step = reinterpret_cast<Step*>(static_cast<char*>(out) + header_bytes(columns));
  size_t total = 0;
  size_t cursor[kRowBlock] = {};
  for (size_t s = 0; s < slabs_of(columns); ++s)
    for (size_t group = 0; group < kRowBlock; group += kRows) {
      size_t kept[kRows] = {}, steps = 0;
      for (size_t r = 0; r < kRows; ++r) {
        const Row& row = rows[group + r];
        const size_t first = cursor[group + r];
        while (first + kept[r] < row.count && row.index[first + kept[r]] / kSlab == s) ++kept[r];
        if (kept[r] > steps) steps = kept[r];
      }
      if (out) *counts++ = static_cast<std::uint16_t>(steps);
      for (size_t i = 0; out && i < steps; ++i, ++step)
        for (size_t r = 0; r < kRows; ++r) {
          const Row& row = rows[group + r];
          const size_t at = cursor[group + r] + i;
          const bool real = i < kept[r];
          step->set(r, real ? row.value[at] : 0.0f, real ? row.index[at] % kSlab * kLine * sizeof(Number) : 0);
        }
      for (size_t r = 0; r < kRows; ++r) cursor[group + r] += kept[r];
      total += steps;
    }
  return round_up(header_bytes(columns) + total * sizeof(Step), 64);
}

// sums[kRowBlock][kVectors] += the weights of a block's slab times their inputs, of which x is the first. Returns the
// end of the steps.
template <class Step, size_t J>
inline const Step* accumulate(const Step* step, const std::uint16_t* counts, const Number* x, P* sums, bool fresh) {
  const auto* bytes = reinterpret_cast<const char*>(x);
  for (size_t group = 0; group < kGroups; ++group, sums += kRows * kVectors) {
    P sum[kRows][J];
    for (size_t r = 0; r < kRows; ++r)
      for (size_t j = 0; j < J; ++j) sum[r][j] = fresh ? P::zero() : sums[r * kVectors + j];
    for (size_t count = counts[group]; count; --count, ++step) step->multiply_add(sum, bytes);
    for (size_t r = 0; r < kRows; ++r)
      for (size_t j = 0; j < J; ++j) sums[r * kVectors + j] = sum[r][j];
  }
  return step;
}

template <class Step, class>
struct BySize;
template <class Step, size_t... J>
struct BySize<Step, std::index_sequence<J...>> {
  static constexpr decltype(&accumulate<Step, 1>) run[] = {accumulate<Step, J + 1>...};
};
static_assert(kRowBlock % kRows == 0);

inline size_t sums_bytes() { return kPassRows * kVectors * sizeof(P); }

// Multiplies blocks [first, last) of a layer with chunks [first chunk, last chunk) of the tokens. sink(row, chunk,
// vectors, sums) gets the sums of kRowBlock rows from `row` on, [rows][kVectors], for the vectors of a chunk. `sums`
// has sums_bytes(), aligned.
template <class Step, class Sink>
inline void multiply(const Geometry& g, const Linear& l, const Number* x, size_t first_chunk, size_t last_chunk,
                     size_t first, size_t last, P* sums, const Sink& sink) {
  const Chunks chunks(g);
  const size_t slabs = slabs_of(l.columns);
  const Step* next[kPassBlocks];
  for (; first < last; first += kPassBlocks) {
    const size_t blocks = last - first < kPassBlocks ? last - first : kPassBlocks;
    for (size_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const size_t vectors = chunks.size(chunk);
      const auto run = BySize<Step, std::make_index_sequence<kVectors>>::run[vectors - 1];
      for (size_t s = 0; s < slabs; ++s)
        for (size_t b = 0; b < blocks; ++b) {
          const char* data = static_cast<const char*>(l.data) + l.offsets[first + b];
          if (s == 0) next[b] = reinterpret_cast<const Step*>(data + header_bytes(l.columns));
          P* to = sums + b * kRowBlock * kVectors;
          next[b] = run(next[b], reinterpret_cast<const std::uint16_t*>(data) + s * kGroups,
                        x + (chunk * l.columns + s * kSlab) * kLine, to, s == 0);
          if (s + 1 == slabs) sink((first + b) * kRowBlock, chunk, vectors, to);
        }
    }
  }
}

}  // namespace lanes

#endif  // SPARSEMAE_LANE_PRODUCTS_INL_H
