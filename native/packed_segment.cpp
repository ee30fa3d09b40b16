// What version 3 of the packed format has of a segmenter; the twin of sparsemae/packing/segmenter.py.
#include "json.h"
#include "packed_file.h"

namespace sparsemae {

#if defined(__wasm__)

std::string read_segment(const Json&, VitConfig&, Inference&) {
  return "a page has no segmenter, whose code would be a fifth of its module";
}

std::vector<std::pair<std::string, std::vector<std::size_t>>> head_shapes(const VitConfig&) { return {}; }

#else

namespace {

using Kind = Json::Kind;
constexpr std::size_t kMaps = 4, kMostScales = 16;

}  // namespace

std::string read_segment(const Json& fields, VitConfig& c, Inference& look) {
  const Json *head = fields.find("head"), *inference = fields.find("inference"), *palette = fields.find("palette"),
             *zero = fields.find("reduce_zero_label");
  if (fields.members.size() != 6 || !head || head->members.size() != 4 || !inference ||
      inference->members.size() != 4 || !palette || !zero || zero->kind != Kind::boolean)
    return "segment: wanted the fields of the format, got others";
  DenseHead& h = c.head.emplace();
  const Json *kind = head->find("kind"), *taps = head->find("out_indices");
  if (!kind || (kind->string != "linear" && kind->string != "segformer"))
    return "segment.head.kind: wanted linear or segformer, got another value";
  h.fused = kind->string == "segformer";
  const auto width = whole(head->find("width"), 1, 1 << 14), classes = whole(head->find("num_classes"), 1, 255);
  if (!width || !classes) return "segment.head: wanted a width and a number of classes within their limits";
  h.width = *width, h.classes = *classes;
  for (const Json& tap : taps ? taps->items : std::vector<Json>{}) {
    const auto block =
        whole(&tap, h.taps.empty() ? 0.0 : static_cast<double>(h.taps.back() + 1), static_cast<double>(c.depth - 1));
    if (!block) break;
    h.taps.push_back(*block);
  }
  if (!taps || taps->items.size() != kMaps || h.taps.size() != kMaps || h.taps.back() != c.depth - 1)
    return "segment.head.out_indices: wanted four ascending blocks up to the last";
  if (c.num_classes || !c.all_tokens || c.fc_norm || c.image_height != c.image_width || c.final_norm == h.fused)
    return "vit: wanted a segmenter's encoder, square and without a pool and a head, got another";

  const Json *mode = inference->find("mode"), *flip = inference->find("flip"), *scales = inference->find("scales");
  const auto stride = whole(inference->find("stride"), 1, 1 << 16),
             short_side = whole(fields.find("short_side"), 1, 1 << 14),
             long_side = whole(fields.find("long_side"), 1, 1 << 16);
  if (!short_side || !long_side) return "segment: wanted a short and a long side within their limits";
  if (!mode || (mode->string != "slide" && mode->string != "whole") || !flip || flip->kind != Kind::boolean)
    return "segment.inference: wanted slide or whole, and whether to flip, got other values";
  look = {static_cast<double>(*short_side),
          static_cast<double>(*long_side),
          mode->string == "slide",
          flip->boolean,
          stride.value_or(1),
          {}};
  if (!stride || (look.slide && look.stride > c.image_height))
    return "segment.inference.stride: wanted at least 1 and at most the window, got another value";
  for (const Json& scale : scales ? scales->items : std::vector<Json>{}) {
    if (!is_real(&scale) || !(scale.number > 0.0 && scale.number <= 16.0)) break;
    look.scales.push_back(scale.number);
  }
  if (!scales || look.scales.empty() || look.scales.size() != scales->items.size() || look.scales.size() > kMostScales)
    return "segment.inference.scales: wanted 1 to 16 numbers above 0 and up to 16";
  bool colors = palette->items.size() == h.classes;
  for (const Json& color : palette->items) {
    colors = colors && color.items.size() == 3;
    for (const Json& value : color.items) colors = colors && whole(&value, 0, 255);
  }
  return colors ? "" : "segment.palette: wanted a color of three bytes for each class";
}

std::vector<std::pair<std::string, std::vector<std::size_t>>> head_shapes(const VitConfig& c) {
  std::vector<std::pair<std::string, std::vector<std::size_t>>> shapes;
  if (!c.head) return shapes;
  const std::size_t d = c.embed_dim, width = c.head->fused ? c.head->width : d;
  const auto add = [&](const std::string& name, const std::vector<std::size_t>& shape) {
    shapes.emplace_back("decode_head." + name, shape);
  };
  if (c.head->fused) {
    for (std::size_t k = 0; k < kMaps; ++k) {
      const std::string at = std::to_string(k);
      add("norms." + at + ".weight", {d}), add("norms." + at + ".bias", {d});
      add("projections." + at + ".weight", {width, d});
    }
    add("norm.weight", {width}), add("norm.bias", {width});
    add("fuse.weight", {width, width}), add("fuse.bias", {width});
  }
  add("classifier.weight", {c.head->classes, width}), add("classifier.bias", {c.head->classes});
  return shapes;
}

#endif

}  // namespace sparsemae
