// How a segmenter looks at an image: resized views of it, whole or by windows, whose scores become the class of each
// pixel. The twin of sparsemae/tasks/sliding_window.py, which has them in torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "preprocess.h"
#include "vit.h"

#if !defined(__wasm__)
#include <mutex>
#endif

namespace sparsemae {

struct Inference {
  double short_side = 0.0, long_side = 0.0;  // that an image is resized to, px
  bool slide = true, flip = false;           // slide: by windows of the model's size
  std::size_t stride = 1;
  std::vector<double> scales;
};

class Segmenter {
 public:
  // The model has a head, and outlives this.
  Segmenter(Vit& vit, Preprocess preprocess, Inference inference)
      : vit_(vit), preprocess_(std::move(preprocess)), inference_(std::move(inference)) {}

  const Vit& model() const { return vit_; }
  // Pixels as for prepare() of preprocess.h; out [height][width]. Throws std::invalid_argument on scores that are not
  // finite.
  void classes(const std::uint8_t* pixels, std::size_t width, std::size_t height, std::size_t channels,
               std::uint8_t* out);
  // images [batch][in_chans][height][width] of any size, a multiple of the patch; out
  // [batch][height / patch][width / patch][classes].
  void scores(const float* images, std::size_t batch, std::size_t height, std::size_t width, float* out);

 private:
  struct View;
  View look(const std::uint8_t* pixels, std::size_t width, std::size_t height, std::size_t channels, double scale,
            bool flip);
  std::shared_ptr<Vit> of_size(std::size_t height, std::size_t width);

  Vit& vit_;
  Preprocess preprocess_;
  Inference inference_;
  std::shared_ptr<Vit> other_;  // of the last other size
#if !defined(__wasm__)
  std::mutex mutex_;  // of who that is
#endif
};

}  // namespace sparsemae
