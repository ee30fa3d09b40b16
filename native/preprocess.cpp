#include "preprocess.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace sparsemae {
namespace {

constexpr std::size_t kChannels = 3;
constexpr int kPrecision = 32 - 8 - 2;  // Pillow's: bits of a weight's fraction

// Python's round(): half to even.
std::int64_t rounded(double value) { return static_cast<std::int64_t>(std::nearbyint(value)); }

double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= std::numbers::pi;
  return std::sin(x) / x;
}

struct Filter {
  const char* name;
  double support;
  double (*weight)(double);
};

constexpr Filter kFilters[] = {
    {"box", 0.5, [](double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }},
    {"bilinear", 1.0, [](double x) { return std::max(0.0, 1.0 - std::abs(x)); }},
    {"hamming", 1.0,
     [](double x) {
       x = std::abs(x);
       if (x == 0.0) return 1.0;
       if (x >= 1.0) return 0.0;
       x *= std::numbers::pi;
       return std::sin(x) / x * (0.54 + 0.46 * std::cos(x));
     }},
    {"bicubic", 2.0,
     [](double x) {
       constexpr double a = -0.5;
       x = std::abs(x);
       if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
       if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
       return 0.0;
     }},
    {"lanczos", 3.0, [](double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }},
};

// What each output of one direction is made of: `count` inputs from `first` on, times weights of kPrecision bits. One
// that is made of nothing is black.
struct Taps {
  std::vector<std::size_t> first, count;
  std::vector<std::int32_t> weights;  // [output][width]
  std::vector<double> exact;          // the same before they are rounded
  std::size_t width;
};

const Filter* filter_of(const std::string& name) {
  const auto* found =
      std::find_if(std::begin(kFilters), std::end(kFilters), [&](const Filter& filter) { return name == filter.name; });
  return found == std::end(kFilters) ? nullptr : found;
}

// Outputs [begin, begin + wanted) of `in` resized to `out`; those outside of it are made of nothing.
Taps make_taps(const Filter* filter, std::size_t in, std::size_t out, std::int64_t begin, std::size_t wanted) {
  const double scale = static_cast<double>(in) / static_cast<double>(out), filter_scale = std::max(1.0, scale);
  const double support = filter ? filter->support * filter_scale : 0.0;
  Taps taps{std::vector<std::size_t>(wanted), std::vector<std::size_t>(wanted), {}, {}, 0};
  taps.width = static_cast<std::size_t>(std::ceil(support)) * 2 + 1;
  taps.weights.resize(wanted * taps.width);
  taps.exact.resize(wanted * taps.width);
  std::vector<double> weights(taps.width);
  double nearest = scale * 0.5;  // added up, as Pillow does
  for (std::int64_t x = filter ? std::max<std::int64_t>(0, begin) : 0; x < static_cast<std::int64_t>(out); ++x) {
    const auto slot = static_cast<std::size_t>(x - begin);
    const double at = nearest, center = (static_cast<double>(x) + 0.5) * scale;
    nearest += scale;
    if (x < begin) continue;
    if (slot >= wanted) break;
    if (!filter || in == out) {
      taps.first[slot] = in == out ? static_cast<std::size_t>(x) : std::min(in - 1, static_cast<std::size_t>(at));
      taps.count[slot] = 1;
      taps.weights[slot * taps.width] = 1 << kPrecision;
      taps.exact[slot * taps.width] = 1.0;
      continue;
    }
    const auto first = std::max<std::int64_t>(0, static_cast<std::int64_t>(center - support + 0.5));
    const auto last =
        std::min<std::int64_t>(static_cast<std::int64_t>(in), static_cast<std::int64_t>(center + support + 0.5));
    const auto count = static_cast<std::size_t>(last - first);
    double sum = 0.0;
    for (std::size_t i = 0; i < count; ++i) {
      const double distance = static_cast<double>(first) + static_cast<double>(i) - center + 0.5;
      sum += weights[i] = filter->weight(distance * (1.0 / filter_scale));
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (sum != 0.0) weights[i] /= sum;
      taps.exact[slot * taps.width + i] = weights[i];
      const double fixed = weights[i] * (1 << kPrecision);
      taps.weights[slot * taps.width + i] = static_cast<std::int32_t>(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
    taps.first[slot] = static_cast<std::size_t>(first);
    taps.count[slot] = count;
  }
  return taps;
}

// `lines` of outputs, out_stride apart, of inputs in_stride apart; a line's are in_line and out_line apart.
void resample(const Taps& taps, const std::uint8_t* in, std::size_t in_line, std::size_t in_stride, std::uint8_t* out,
              std::size_t out_line, std::size_t out_stride, std::size_t lines) {
  for (std::size_t line = 0; line < lines; ++line)
    for (std::size_t x = 0; x < taps.first.size(); ++x) {
      const std::int32_t* weights = &taps.weights[x * taps.width];
      const std::uint8_t* from = in + line * in_line + taps.first[x] * in_stride;
      for (std::size_t c = 0; c < kChannels; ++c) {
        std::int32_t sum = 1 << (kPrecision - 1);
        for (std::size_t i = 0; i < taps.count[x]; ++i) sum += from[i * in_stride + c] * weights[i];
        out[line * out_line + x * out_stride + c] =
            static_cast<std::uint8_t>(std::clamp(sum >> kPrecision, std::int32_t{0}, std::int32_t{255}));
      }
    }
}

// Pillow's alpha_composite on an opaque background.
std::uint8_t composed(std::uint32_t source, std::uint32_t alpha, std::uint32_t below) {
  if (alpha == 0) return static_cast<std::uint8_t>(below);
  const std::uint32_t part = alpha * 255 * 255 * (1 << 7) / (255 * 255), rest = 255 * (1 << 7) - part;
  const std::uint32_t sum = source * part + below * rest + (0x80 << 7);
  return static_cast<std::uint8_t>(((sum >> 8) + sum) >> 8 >> 7);
}

// Gray is repeated, alpha composed or dropped.
std::vector<std::uint8_t> to_rgb(const Preprocess& p, const std::uint8_t* pixels, std::size_t count,
                                 std::size_t channels) {
  std::vector<std::uint8_t> rgb(count * kChannels);
  for (std::size_t i = 0; i < count; ++i)
    for (std::size_t c = 0; c < kChannels; ++c) {
      const std::uint8_t* pixel = pixels + i * channels;
      const std::uint8_t value = pixel[channels == 1 ? 0 : c];
      rgb[i * kChannels + c] = channels == 4 && p.background ? composed(value, pixel[3], (*p.background)[c]) : value;
    }
  return rgb;
}

// Only what the outputs are made of; rounded to 8 bits between the directions, of which Pillow (since 13) takes the
// vertical one first where the height shrinks much more.
std::vector<std::uint8_t> resample_both(const std::vector<std::uint8_t>& rgb, std::size_t width, std::size_t height,
                                        const Taps& columns, const Taps& rows, bool vertical_first) {
  const std::size_t out_width = columns.first.size(), out_height = rows.first.size();
  std::vector<std::uint8_t> crop(out_width * out_height * kChannels);
  std::vector<std::uint8_t> between((vertical_first ? width * out_height : out_width * height) * kChannels);
  const std::size_t stride = (vertical_first ? width : out_width) * kChannels;
  if (vertical_first) {
    resample(rows, rgb.data(), kChannels, width * kChannels, between.data(), kChannels, stride, width);
    resample(columns, between.data(), stride, kChannels, crop.data(), out_width * kChannels, kChannels, out_height);
  } else {
    resample(columns, rgb.data(), width * kChannels, kChannels, between.data(), stride, kChannels, height);
    resample(rows, between.data(), kChannels, stride, crop.data(), kChannels, out_width * kChannels, out_width);
  }
  return crop;
}

}  // namespace

std::vector<std::uint8_t> resized_rgb(const Preprocess& p, const std::uint8_t* pixels, std::size_t width,
                                      std::size_t height, std::size_t channels, std::size_t out_width,
                                      std::size_t out_height) {
  auto rgb = to_rgb(p, pixels, width * height, channels);
  if (width == out_width && height == out_height) return rgb;
  const Filter* filter = filter_of("bilinear");
  const auto shrinks = [](std::size_t from, std::size_t to) {
    return static_cast<std::int64_t>(from) - static_cast<std::int64_t>(to);
  };
  const bool vertical_first =
      shrinks(height, out_height) > 0 && shrinks(height, out_height) > 2 * shrinks(width, out_width);
  return resample_both(rgb, width, height, make_taps(filter, width, out_width, 0, out_width),
                       make_taps(filter, height, out_height, 0, out_height), vertical_first);
}

std::vector<float> resize_bicubic(const float* values, std::size_t rows, std::size_t columns, std::size_t out_rows,
                                  std::size_t out_columns, std::size_t width) {
  const Filter* filter = filter_of("bicubic");
  const Taps across = make_taps(filter, columns, out_columns, 0, out_columns),
             down = make_taps(filter, rows, out_rows, 0, out_rows);
  std::vector<float> out(out_rows * out_columns * width);
  std::vector<double> sums(width);
  for (std::size_t y = 0; y < out_rows; ++y)
    for (std::size_t x = 0; x < out_columns; ++x) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (std::size_t i = 0; i < down.count[y]; ++i)
        for (std::size_t j = 0; j < across.count[x]; ++j) {
          const double weight = down.exact[y * down.width + i] * across.exact[x * across.width + j];
          const float* from = values + ((down.first[y] + i) * columns + across.first[x] + j) * width;
          for (std::size_t d = 0; d < width; ++d) sums[d] += weight * static_cast<double>(from[d]);
        }
      std::transform(sums.begin(), sums.end(), out.begin() + static_cast<std::ptrdiff_t>((y * out_columns + x) * width),
                     [](double sum) { return static_cast<float>(sum); });
    }
  return out;
}

void prepare(const Preprocess& p, const std::uint8_t* pixels, std::size_t width, std::size_t height,
             std::size_t channels, std::size_t out_width, std::size_t out_height, float* out) {
  const double scaled_height = std::floor(static_cast<double>(out_height) / p.crop_pct);
  const double scaled_width = std::floor(static_cast<double>(out_width) / p.crop_pct);
  const auto w = static_cast<double>(width), h = static_cast<double>(height);
  double to_width, to_height;
  if (scaled_height == scaled_width) {
    const double longer = std::floor(scaled_height * std::max(w, h) / std::min(w, h));
    to_width = w <= h ? scaled_height : longer, to_height = w <= h ? longer : scaled_height;
  } else {
    const double ratio = std::min(h / scaled_height, w / scaled_width);
    to_width = static_cast<double>(rounded(w / ratio)), to_height = static_cast<double>(rounded(h / ratio));
  }
  const Filter* filter = filter_of(p.interpolation);
  // Where the image is smaller than the crop it is padded, half of it before.
  const auto taps_of = [&](std::size_t in, double side, std::size_t wanted) {
    const auto to = static_cast<std::size_t>(side);
    const std::size_t full = std::max(to, wanted);
    const std::int64_t begin = rounded(static_cast<double>(full - wanted) / 2.0);
    return make_taps(filter, in, to, begin - static_cast<std::int64_t>((full - to) / 2), wanted);
  };
  const Taps columns = taps_of(width, to_width, out_width), rows = taps_of(height, to_height, out_height);
  const bool vertical_first = to_height < h && h - to_height > 2 * (w - to_width);
  const auto crop =
      resample_both(to_rgb(p, pixels, width * height, channels), width, height, columns, rows, vertical_first);
  for (std::size_t c = 0; c < kChannels; ++c)
    for (std::size_t i = 0; i < out_width * out_height; ++i)
      out[c * out_width * out_height + i] =
          (static_cast<float>(crop[i * kChannels + c]) / 255.0f - p.mean[c]) / p.std[c];
}

}  // namespace sparsemae
