// Everything between a head's scores and the class of a pixel is linear: bilinear from tokens to the window's pixels,
// the mean of all windows over a pixel, bilinear from the resized image to the image's own size. Each acts on rows and
// columns by themselves. So the three are one list of weights for every row and one for every column, and neither a
// window nor the resized image is ever made.
#include "segmenter.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace sparsemae {
namespace {

constexpr std::size_t kMostPixels = std::size_t{1} << 25;  // of a resized image, and how many windows it may have
constexpr std::size_t kMostWindows = std::size_t{1} << 14;
constexpr std::size_t kMostScores = std::size_t{1} << 28;  // of all its windows
constexpr std::size_t kWindows = 8;                        // in a call of the forward, or one for each thread
constexpr std::size_t kTile = 64;                          // columns of an image that a thread takes at a time

// Starts of windows along a length; the last ends with it.
std::vector<std::size_t> window_starts(std::size_t length, std::size_t window, std::size_t stride) {
  std::vector<std::size_t> starts;
  const std::size_t last = length > window ? length - window : 0;
  for (std::size_t at = 0; at < last; at += stride) starts.push_back(at);
  starts.push_back(last);
  return starts;
}

// What each pixel along a side is made of: tokens of windows, one window after the other.
struct Axis {
  struct Part {
    std::size_t token;
    float weight;
  };
  std::vector<std::vector<Part>> pixels;
  std::size_t tokens = 0;
};

// The two inputs of an output of bilinear resizing, and the share of the second (torch's, align_corners=False).
struct Pair {
  std::size_t first, second;
  double share;
};

Pair bilinear(std::size_t at, std::size_t in, std::size_t out) {
  const double center =
      std::max(0.0, (static_cast<double>(at) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5);
  const std::size_t first = std::min(static_cast<std::size_t>(center), in - 1);
  return {first, std::min(first + 1, in - 1), center - static_cast<double>(first)};
}

// `length`: of the resized image, in windows of `window` px (their last token may reach beyond it); `own`: of the
// image.
Axis make_axis(std::size_t own, std::size_t length, std::size_t window, const std::vector<std::size_t>& starts,
               std::size_t patch, bool flip) {
  const std::size_t tokens = (window + patch - 1) / patch;
  Axis axis{std::vector<std::vector<Axis::Part>>(own), tokens * starts.size()};
  for (std::size_t x = 0; x < own; ++x) {
    auto& parts = axis.pixels[x];
    const auto add = [&](std::size_t token, double weight) {
      if (weight == 0.0) return;
      const auto found =
          std::find_if(parts.begin(), parts.end(), [&](const auto& part) { return part.token == token; });
      if (found == parts.end())
        parts.push_back({token, static_cast<float>(weight)});
      else
        found->weight += static_cast<float>(weight);
    };
    const auto resized = [&](std::size_t at, double weight) {
      if (flip) at = length - 1 - at;
      double over = 0.0;
      for (const std::size_t start : starts) over += at >= start && at < start + window;
      for (std::size_t i = 0; i < starts.size(); ++i) {
        if (at < starts[i] || at >= starts[i] + window) continue;
        const Pair pair = bilinear(at - starts[i], tokens, tokens * patch);
        add(i * tokens + pair.first, weight / over * (1.0 - pair.share));
        add(i * tokens + pair.second, weight / over * pair.share);
      }
    };
    const Pair pair = bilinear(x, length, own);
    resized(pair.first, 1.0 - pair.share);
    if (pair.share > 0.0) resized(pair.second, pair.share);
  }
  return axis;
}

}  // namespace

struct Segmenter::View {
  Axis rows, columns;
  std::size_t window_rows, window_columns;  // tokens of a window
  std::vector<float> scores;                // [windows down][windows across][rows][columns][classes]

  // Scores of all tokens of a column of tokens, resized to the image's columns [begin, begin + width):
  // [rows.tokens][classes][kTile].
  void tile(std::size_t begin, std::size_t width, std::size_t classes, std::vector<float>& out) const {
    out.assign(rows.tokens * classes * kTile, 0.0f);
    const std::size_t across = columns.tokens / window_columns;
    for (std::size_t row = 0; row < rows.tokens; ++row)
      for (std::size_t x = 0; x < width; ++x)
        for (const auto& [token, weight] : columns.pixels[begin + x]) {
          const std::size_t window = row / window_rows * across + token / window_columns;
          const float* from =
              scores.data() +
              ((window * window_rows + row % window_rows) * window_columns + token % window_columns) * classes;
          float* to = out.data() + row * classes * kTile + x;
          for (std::size_t c = 0; c < classes; ++c) to[c * kTile] += weight * from[c];
        }
  }

  // Logits of one row of the image, [kTile].
  void row(const std::vector<float>& tile, std::size_t y, std::size_t c, std::size_t classes, float* out) const {
    std::fill_n(out, kTile, 0.0f);
    for (const auto& [token, weight] : rows.pixels[y]) {
      const float* from = tile.data() + (token * classes + c) * kTile;
      for (std::size_t x = 0; x < kTile; ++x) out[x] += weight * from[x];
    }
  }
};

std::shared_ptr<Vit> Segmenter::of_size(std::size_t height, std::size_t width) {
  const VitConfig& c = vit_.config();
  if (height == c.image_height && width == c.image_width) return {&vit_, [](Vit*) {}};
#if !defined(__wasm__)
  const std::lock_guard lock(mutex_);
#endif
  if (!other_ || other_->config().image_height != height || other_->config().image_width != width)
    other_ = std::make_shared<Vit>(vit_, height, width);
  return other_;
}

void Segmenter::scores(const float* images, std::size_t batch, std::size_t height, std::size_t width, float* out) {
  of_size(height, width)->forward(images, batch, out, false);
}

Segmenter::View Segmenter::look(const std::uint8_t* pixels, std::size_t width, std::size_t height, std::size_t channels,
                                double scale, bool flip) {
  const VitConfig& c = vit_.config();
  const auto w = static_cast<double>(width), h = static_cast<double>(height);
  const double factor =
      std::min(inference_.short_side * scale / std::min(h, w), inference_.long_side * scale / std::max(h, w));
  const auto side = [&](double own) { return static_cast<std::size_t>(std::max(1.0, std::nearbyint(own * factor))); };
  const std::size_t to_width = side(w), to_height = side(h), patch = c.patch_size;
  if (to_width > kMostPixels / to_height)
    throw std::invalid_argument("wanted a resized image of at most 2^25 pixels, got " + std::to_string(to_width) +
                                " x " + std::to_string(to_height));
  const auto rgb = resized_rgb(preprocess_, pixels, width, height, channels, to_width, to_height);

  const auto window_of = [&](std::size_t length, std::size_t most) {
    return inference_.slide ? std::min(length, most) : length;
  };
  const std::size_t window_height = window_of(to_height, c.image_height),
                    window_width = window_of(to_width, c.image_width);
  const auto tops = window_starts(to_height, window_height, inference_.stride),
             lefts = window_starts(to_width, window_width, inference_.stride);
  View view{make_axis(height, to_height, window_height, tops, patch, false),
            make_axis(width, to_width, window_width, lefts, patch, flip),
            (window_height + patch - 1) / patch,
            (window_width + patch - 1) / patch,
            {}};

  const std::size_t padded_height = view.window_rows * patch, padded_width = view.window_columns * patch;
  const std::size_t plane = padded_height * padded_width, windows = tops.size() * lefts.size();
  const std::size_t outputs = view.window_rows * view.window_columns * c.head->classes;
  if (windows > kMostWindows || windows > kMostScores / outputs)
    throw std::invalid_argument("wanted fewer windows (a larger inference.stride), got " + std::to_string(windows));
  view.scores.resize(windows * outputs);
  const std::size_t at_once = std::max(kWindows, vit_.threads());
  std::vector<float> images(std::min(windows, at_once) * c.in_chans * plane);  // what is padded is 0
  for (std::size_t first = 0; first < windows; first += at_once) {
    const std::size_t count = std::min(at_once, windows - first);
    float* to = images.data();
    for (std::size_t i = first; i < first + count; ++i)
      for (std::size_t channel = 0; channel < c.in_chans; ++channel, to += plane) {
        const std::size_t top = tops[i / lefts.size()], left = lefts[i % lefts.size()];
        const float mean = 255.0f * preprocess_.mean[channel], std = 255.0f * preprocess_.std[channel];
        for (std::size_t y = 0; y < window_height; ++y)
          for (std::size_t x = 0; x < window_width; ++x) {
            const std::size_t column = flip ? to_width - 1 - left - x : left + x;
            to[y * padded_width + x] =
                (static_cast<float>(rgb[((top + y) * to_width + column) * c.in_chans + channel]) - mean) / std;
          }
      }
    scores(images.data(), count, padded_height, padded_width, view.scores.data() + first * outputs);
  }
  if (!std::all_of(view.scores.begin(), view.scores.end(), [](float score) { return std::isfinite(score); }))
    throw std::invalid_argument("wanted finite logits, got NaN or infinite ones");
  return view;
}

void Segmenter::classes(const std::uint8_t* pixels, std::size_t width, std::size_t height, std::size_t channels,
                        std::uint8_t* out) {
  std::vector<View> views;
  for (const double scale : inference_.scales)
    for (int flip = 0; flip <= inference_.flip; ++flip)
      views.push_back(look(pixels, width, height, channels, scale, flip));
  const std::size_t classes = vit_.config().head->classes;
  vit_.parallel((width + kTile - 1) / kTile, [&](std::size_t part) {
    const std::size_t begin = part * kTile, count = std::min(kTile, width - begin);
    std::vector<std::vector<float>> tiles(views.size());
    for (std::size_t v = 0; v < views.size(); ++v) views[v].tile(begin, count, classes, tiles[v]);
    std::vector<float> one(classes * kTile), sum(views.size() > 1 ? classes * kTile : 0);
    for (std::size_t y = 0; y < height; ++y) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      float best[kTile];
      std::int32_t which[kTile] = {};
      for (std::size_t v = 0; v < views.size(); ++v) {
        for (std::size_t c = 0; c < classes; ++c) views[v].row(tiles[v], y, c, classes, &one[c * kTile]);
        if (views.size() == 1) break;
        std::copy_n(one.data(), kTile, best);  // the mean of probabilities
        for (std::size_t c = 1; c < classes; ++c)
          for (std::size_t x = 0; x < kTile; ++x) best[x] = std::max(best[x], one[c * kTile + x]);
        float total[kTile] = {};
        for (std::size_t c = 0; c < classes; ++c)
          for (std::size_t x = 0; x < kTile; ++x)
            total[x] += one[c * kTile + x] = std::exp(one[c * kTile + x] - best[x]);
        for (std::size_t c = 0; c < classes; ++c)
          for (std::size_t x = 0; x < kTile; ++x) sum[c * kTile + x] += one[c * kTile + x] / total[x];
      }
      const float* scores = views.size() == 1 ? one.data() : sum.data();
      std::copy_n(scores, kTile, best);
      for (std::size_t c = 1; c < classes; ++c)
        for (std::size_t x = 0; x < kTile; ++x) {
          const bool better = scores[c * kTile + x] > best[x];
          best[x] = better ? scores[c * kTile + x] : best[x];
          which[x] = better ? static_cast<std::int32_t>(c) : which[x];
        }
      for (std::size_t x = 0; x < count; ++x) out[y * width + begin + x] = static_cast<std::uint8_t>(which[x]);
    }
  });
}

}  // namespace sparsemae
