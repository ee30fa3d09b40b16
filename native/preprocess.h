// An image as a model's input, to the pixel as Pillow and timm make it; the twin of sparsemae/runtime/preprocess.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sparsemae {

struct Preprocess {
  std::vector<float> mean, std;  // of 0 to 1
  std::string interpolation;     // Pillow's name, in lower case
  double crop_pct = 1.0;
  std::optional<std::array<std::uint8_t, 3>>
      background;  // what transparent images are drawn on; none: alpha is dropped
};

// Pixels [height][width][channels], 8 bits: gray (1), RGB (3) or RGB and alpha (4); out float
// [3][out_height][out_width]. The shorter side is resized, the center cropped, and the whole normalized. None of the
// sizes may be 0.
void prepare(const Preprocess&, const std::uint8_t* pixels, std::size_t width, std::size_t height, std::size_t channels,
             std::size_t out_width, std::size_t out_height, float* out);

// The same pixels as RGB, then resized to these sides by Pillow's bilinear filter: [out_height][out_width][3].
std::vector<std::uint8_t> resized_rgb(const Preprocess&, const std::uint8_t* pixels, std::size_t width,
                                      std::size_t height, std::size_t channels, std::size_t out_width,
                                      std::size_t out_height);

// Vectors [rows][columns][width] on another grid, by the antialiased bicubic filter with which timm resamples
// positions.
std::vector<float> resize_bicubic(const float* values, std::size_t rows, std::size_t columns, std::size_t out_rows,
                                  std::size_t out_columns, std::size_t width);

}  // namespace sparsemae
