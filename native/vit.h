// The whole forward of a plain pre-norm vision transformer over packed weights.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace sparsemae {

// A segmenter's head, token by token (sparsemae/models/light_heads.py).
struct DenseHead {
  bool fused = false;  // segformer: the maps of all `taps` are projected to `width`, summed and fused; else linear
  std::size_t width = 0, classes = 0;
  std::vector<std::size_t> taps;  // blocks after which it reads; the last is the model's last
};

#if defined(__wasm__)
// A page classifies (packed_segment.cpp): the compiler leaves out what asks for a head.
struct MaybeHead {
  constexpr explicit operator bool() const { return false; }
  const DenseHead* operator->() const { __builtin_unreachable(); }
};
#else
using MaybeHead = std::optional<DenseHead>;
#endif

struct VitConfig {
  std::size_t embed_dim, depth, num_heads, mlp_hidden, patch_size, image_height, image_width, in_chans, num_classes,
      reg_tokens;
  bool class_token, no_embed_class, pre_norm, final_norm, fc_norm, patch_bias, pool_include_prefix;
  bool average_pool, all_tokens;  // neither: the class token
  float norm_eps;
  MaybeHead head;  // of an encoder with all_tokens

  std::size_t rows() const { return image_height / patch_size; }
  std::size_t columns() const { return image_width / patch_size; }
};

// A weight matrix as stored in the file; the pointers are only used while the model is built. n = 0: dense float
// values.
struct Weights {
  std::size_t rows = 0, columns = 0;
  unsigned n = 0, m = 0;
  const std::uint8_t* codes = nullptr;
  std::size_t code_bytes = 0;
  const float* fp32 = nullptr;  // one of the three is set
  const std::uint16_t* bf16 = nullptr;
  const std::int8_t* int8 = nullptr;
  const float* row_scale = nullptr;  // with int8
  bool quantize = false;             // with int8: multiply as int8 where the kernels can, rounding the inputs

  std::size_t kept() const { return n ? columns / m * n : columns; }  // values of a row
  float value(std::size_t at) const {
    if (fp32) return fp32[at];
    if (int8) return static_cast<float>(int8[at]);
    return std::bit_cast<float>(std::uint32_t{bf16[at]} << 16);
  }
};

struct FreeAligned {
  void operator()(void* p) const;
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

struct KernelTiming;

class Vit {
 public:
  // `weights` by timm's names (<layer>.weight of every linear layer and of the patch embedding, flattened to two
  // dimensions); `vectors` holds everything else. Both are complete and of the right shapes: the caller has checked the
  // file. Throws std::invalid_argument for codes out of range or an unknown instruction set.
  Vit(const VitConfig&, const std::map<std::string, Weights>&, const std::map<std::string, std::vector<float>>&,
      std::size_t threads, const std::string& isa);
  // The same weights for images of another size, a multiple of the patch: positions are resampled as timm does.
  Vit(const Vit&, std::size_t height, std::size_t width);
  ~Vit();

  // images [batch][in_chans][H][W]; out [batch][outputs()], or [batch][tokens()][embed_dim] with `features`. Calls
  // are serialized. A segmenter's outputs are [rows][columns][classes].
  void forward(const float* images, std::size_t batch, float* out, bool features);
  // work(i) for i in [0, count), shared by all threads.
  void parallel(std::size_t count, const std::function<void(std::size_t)>& work);

  std::size_t outputs() const {
    if (config_.head) return config_.rows() * config_.columns() * config_.head->classes;
    return config_.num_classes ? config_.num_classes : config_.embed_dim;
  }
  std::size_t tokens() const { return geometry_.tokens; }
  const VitConfig& config() const { return config_; }
  const Kernels& kernels() const { return *kernels_; }
  std::size_t threads() const { return pool_.size(); }

  friend std::vector<KernelTiming> time_kernels(Vit&, std::size_t rounds);

 private:
  struct Layer {
    Linear view;
    Aligned<char> data;
    std::vector<std::size_t> offsets;
    std::vector<float> scale, bias;
  };
  struct Norm {
    std::vector<float> weight, bias;
  };
  struct Block {
    Norm norm1, norm2;
    Layer qkv, proj, fc1, fc2;
  };
  struct Net {  // what does not depend on the size of the image
    Layer embed;
    std::optional<Norm> norm_pre, norm, fc_norm;
    std::vector<Block> blocks;
    std::vector<float> head_weight, head_bias;
    std::vector<float> positions, patch_bias, class_token, registers;
    std::size_t rows, columns;  // of the positions
    // of a segmenter
    std::vector<Norm> tap_norms;
    std::vector<Layer> projections;
    std::optional<Norm> fuse_norm;
    Layer fuse, classifier;
  };
  struct State;      // of one image, between two steps: what a block reads, and what it leaves
  struct Workspace;  // what a step has to itself
  struct Stages;     // how the threads of one image share the stages of a step
  struct Call;
  struct Image;  // what a step works on

  using Vectors = std::map<std::string, std::vector<float>>;
  void set_geometry();
  void set_up();  // once the net is there
  Layer build_layer(const Kernels&, const Weights&, const std::vector<std::int64_t>& rows,
                    const std::vector<float>* bias, const std::vector<float>* gain, float input_bound) const;
  void build_base();
  void reserve(std::size_t states, std::size_t spaces);
  // Step 0 is the embedding, the last one the head, between them is one for each block.
  std::size_t steps() const { return net_->blocks.size() + 2; }
  void run_step(std::size_t step, Image&, Stages&, void* scratch) const;
  void run_embedding(Image&, Stages&, void* scratch) const;
  void run_block(const Block&, Image&, Stages&, void* scratch) const;
  void run_norm(const Norm&, const Layer& next, Image&, Stages&) const;
  // g: as wide as what is written, where that is a residual.
  // quantized: where the inputs are rounded to, or null.
  void run_linear(const Geometry& g, const Kernels&, const Layer&, const void* input, void* quantized, Output,
                  const float* residual, void* output, Stages&, void* scratch) const;
  void run_head(Image&, Stages&) const;
  void run_tap(std::size_t block, Image&, Stages&, void* scratch) const;
  void run_dense_head(Image&, Stages&, void* scratch) const;

  VitConfig config_;
  Geometry geometry_, fused_, logits_;  // of the blocks; the same as wide as a segmenter's fused map, and its logits
  const Kernels *kernels_,
      *embedding_;  // of the blocks; of the patch embedding and a segmenter's head, which are dense
  std::shared_ptr<const Net> net_;
  Aligned<float> base_;  // the residual before the patches are added: positions, biases, class and register tokens
  std::size_t residual_size_ = 0;
  std::vector<std::unique_ptr<State>> states_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;
  std::vector<Aligned<char>> scratch_;  // one per thread
  ThreadPool pool_;                     // the last one: it ends before what its threads use
};

}  // namespace sparsemae
