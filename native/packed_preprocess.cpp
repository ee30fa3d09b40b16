// How an image becomes a model's input, from a packed file's metadata; the twin of sparsemae/packing/metadata.py.
#include <algorithm>

#include "json.h"
#include "packed_file.h"

namespace sparsemae {

std::string read_preprocess(const Json& fields, const std::string& version, std::size_t channels, Preprocess& p) {
  using Kind = Json::Kind;
  const bool second = version != "1", segmenter = version == "3";
  const Json *exif = fields.find("exif_transpose"), *bits = fields.find("bits");
  if (!exif || (exif->kind != Kind::boolean && !(segmenter && exif->kind == Kind::null)))
    return "preprocess.exif_transpose: wanted true or false";
  if (bits ? bits->kind != Kind::null && !whole(bits, 9, 16) : second)
    return "preprocess.bits: wanted null or 9 to 16, got another value";
  const auto each = [&](const char* name, std::size_t count, double least, double most, bool integer,
                        std::vector<float>& to) {
    const Json* values = fields.find(name);
    if (!values || values->items.size() != count) return false;
    for (const Json& value : values->items) {
      if (value.kind != Kind::number || value.integer != integer || value.number < least || value.number > most)
        return false;
      to.push_back(static_cast<float>(value.number));
    }
    return true;
  };
  if (!each("mean", channels, -1e6, 1e6, false, p.mean) || !each("std", channels, 1e-6, 1e6, false, p.std))
    return "preprocess: wanted a mean and a std of a number for each channel";
  const Json *crop = fields.find("crop_pct"), *interpolation = fields.find("interpolation");
  if (!is_real(crop) || crop->number < 0.1 || crop->number > 1.0)
    return "preprocess.crop_pct: wanted 0.1 to 1, got another value";
  p.crop_pct = crop->number;
  constexpr const char* kNames[] = {"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"};
  if (!interpolation || std::find(std::begin(kNames), std::end(kNames), interpolation->string) == std::end(kNames))
    return "preprocess.interpolation: wanted one of Pillow's, got another value";
  p.interpolation = interpolation->string;
  std::vector<float> color;
  const Json* background = fields.find("background");
  if (!background && second) return "preprocess.background: wanted null or a color, got none";
  if (background && background->kind != Kind::null) {
    if (!each("background", 3, 0, 255, true, color))
      return "preprocess.background: wanted three numbers from 0 to 255, got another value";
    p.background.emplace();
    for (int i = 0; i < 3; ++i) (*p.background)[i] = static_cast<std::uint8_t>(color[i]);
  }
  const std::size_t known = 5 + (bits != nullptr) + (background != nullptr);
  return known == fields.members.size() ? "" : "preprocess: wanted the fields of the format only, got one more";
}

}  // namespace sparsemae
