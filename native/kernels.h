// The dispatch table: what one instruction set offers to the ViT forward (vit.cpp), as plain function pointers.
//
// Every table owns the layout of its activations and weights; the forward only passes pointers on.
//   residual     float, one image: blocks of [D][kTokenUnit], residual_unit() apart (blocked_residual),
//                or [padded tokens][D]
//   activation   the input of a linear layer: layout private to the table, activation_bytes() long, zeroed
//   scratch      per thread, scratch_bytes() long
//
// Work is cut in units that threads take one by one: blocks of `kTokenUnit` tokens, blocks of kRowBlock output rows,
// heads. Files of kernels are compiled for their instruction set and must not instantiate inline functions shared with
// the rest (the linker could keep the wrong copy): they see this header, and their own code in an anonymous namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace sparsemae {

constexpr std::size_t kRowBlock = 32;   // output rows in one unit of a linear layer
constexpr std::size_t kTokenUnit = 16;  // tokens in one unit of a norm; token counts are padded to a multiple of it

static constexpr std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

// One row of weights in plain form: `count` kept inputs, ascending, and their values.
struct Row {
  const std::uint32_t* index;
  const float* value;
  std::size_t count;
};

// Where the rows of a linear layer come from when its layout is built; row() of a padding row has count 0.
struct RowSource {
  void* context;
  Row (*row)(void* context, std::size_t physical_row);
};

// A linear layer in the layout of one table. y = (W x) * scale + bias, scale and bias per output row (padded with
// zeros).
struct Linear {
  std::size_t rows = 0;                  // physical: a multiple of kRowBlock
  std::size_t used = 0;                  // rows below this are real (except inside heads, which are padded one by one)
  std::size_t columns = 0;               // real inputs
  void* data = nullptr;                  // 64-byte aligned, owned by the model
  const std::size_t* offsets = nullptr;  // byte offset of each row block in data
  const float* scale = nullptr;
  const float* bias = nullptr;
  bool quantize = false;  // int8 weights times activations rounded to int8
  bool exact = false;     // weights are fp32, not bf16 or int8
  bool dense = false;     // every weight of a row is kept
};

struct Geometry {
  std::size_t width = 0, tokens = 0, padded_tokens = 0;
  std::size_t heads = 0, head_dim = 0, padded_head_dim = 0;
  std::size_t channels = 0, image_height = 0, image_width = 0, patch = 0, prefix = 0;
};

// Inputs of the patch embedding: a patch's pixels and, where kernels round these, for each channel and column of them
// the sum of what rounding has taken (Kernels::rounds_pixels).
static constexpr std::size_t patch_inputs(const Geometry& g, bool rounded) {
  return g.channels * g.patch * (g.patch + (rounded ? 1 : 0));
}

// Where a feature of a token is in a residual by units. These are a line longer than they need to be, because at a
// distance of whole pages they would fall on the same sets of the cache.
static constexpr std::size_t residual_unit(const Geometry& g) { return (g.width + 1) * kTokenUnit; }
static constexpr std::size_t residual_at(const Geometry& g, std::size_t token, std::size_t feature) {
  return token / kTokenUnit * residual_unit(g) + feature * kTokenUnit + token % kTokenUnit;
}

enum class Output { activation, gelu, residual };

// What is multiplied: sparse layers, those of them whose inputs are int8, and attention.
enum class Product { sparse, int8, dense };

// What a table's instructions can do at best.
struct Peak {
  const char* instructions;
  std::size_t multiply_adds;
  bool zeros = false;  // a sparse layer's zeros are multiplied and counted
};

struct Kernels {
  const char* name;
  const char* math;               // "fp32", "bf16" or "fp16": what products are made of; "int8": of int8 layers alone
  bool blocked_residual = false;  // layout of the residual
  bool even_heads = false;        // needs an even head_dim
  std::size_t head_step;          // head_dim is padded to a multiple of it
  float max_density = 1.0f;       // it is the best where no sparse layer keeps more than this fraction of its weights
  bool best_for_int8 = false;     // and of these, where layers are int8
  float max_magnitude = 0.0f;     // sums and activations must stay below (0: no bound); vit_build.cpp sees to it
  // Pixels become bf16. Those of a flat surface all lose the same, and that adds up; so the embedding gets what a
  // column of pixels has lost, too, times the mean of its weights.
  bool rounds_pixels = false;
  // Whose patches and linear make the embedding; its residual has the same layout. Null: its own.
  const Kernels* (*embedding)() = nullptr;

  std::size_t (*activation_bytes)(std::size_t features, const Geometry&);
  std::size_t (*scratch_bytes)(const Geometry&);
  // Bytes of row block `block`; writes it to `out` unless that is null. Values and indices come from the source,
  // the number of columns and the kind of weights from the layer, which has no data yet.
  std::size_t (*pack_block)(const RowSource&, const Linear&, std::size_t block, void* out);

  void (*thread_begin)();  // before and after a thread runs kernels (tile state)
  void (*thread_end)();
  // Patches of image [C][H][W] as the activation of the patch embedding, tokens [first, first + kTokenUnit).
  // Null where `embedding` has them.
  void (*patches)(const Geometry&, const float* image, void* activation, std::size_t first) = nullptr;
  // Layer norm of tokens [first, last), whole units or parts, into an activation.
  void (*norm)(const Geometry&, const float* residual, const float* weight, const float* bias, float eps,
               void* activation, std::size_t first, std::size_t last);
  // As norm, with float output in the residual's own layout (in place is allowed).
  void (*norm_residual)(const Geometry&, const float* residual, const float* weight, const float* bias, float eps,
                        float* out, std::size_t first, std::size_t last);
  // The activation of tokens [first, last) rounded to int8 with a scale per token. Null where int8 is not multiplied.
  void (*quantize)(const Geometry&, std::size_t features, const void* activation, void* quantized, std::size_t first,
                   std::size_t last) = nullptr;
  // Into how many parts of tokens the work of a linear layer can be cut besides blocks of rows, and the first token of
  // each; that of the one after the last is padded_tokens.
  std::size_t (*token_parts)(const Geometry&);
  std::size_t (*part_begin)(const Geometry&, std::size_t part);
  // `residual`: what is added for Output::residual; it may be the output itself.
  void (*linear)(const Geometry&, const Linear&, const void* input, Output kind, const float* residual, void* output,
                 std::size_t first_part, std::size_t last_part, std::size_t first_block, std::size_t last_block,
                 void* scratch);
  // q, k and v of one head from the normalized input, into scratch; qkv rows are [head][q, k, v][padded_head_dim].
  void (*project_head)(const Geometry&, const Linear& qkv, const void* input, std::size_t head, void* scratch);
  // Attention of the head that project_head has put into scratch.
  void (*attend_head)(const Geometry&, void* output, std::size_t head, void* scratch);
  // out[r] = dot(weight[r], x) + bias[r] for r in [first, last); weight is [rows][columns] float.
  void (*dense_rows)(const float* weight, const float* bias, const float* x, std::size_t columns, float* out,
                     std::size_t first, std::size_t last);
  // The instructions of such products on registers alone, `rounds` times; the sums end in sink[16]. For bench.cpp.
  Peak (*peak)(Product, std::size_t rounds, float* sink);
};

const Kernels* portable_kernels();
const Kernels* neon_kernels();
const Kernels* neonfp16_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amxvnni_kernels();
const Kernels* amx_kernels();
const Kernels* avx512fp16_kernels();

}  // namespace sparsemae
