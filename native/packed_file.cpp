#include "packed_file.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <set>
#include <string_view>

#include "codes.h"
#include "json.h"

namespace sparsemae {
namespace {

constexpr std::size_t kMaxHeader = 100'000'000;
constexpr std::size_t kMaxGroup = 256;

struct Tensor {
  std::string dtype;
  std::vector<std::size_t> shape;
  const std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
};

std::size_t item_size(const std::string& dtype) {
  return dtype == "F32" ? 4 : dtype == "U16" ? 2 : dtype == "U8" || dtype == "I8" ? 1 : 0;
}

using Kind = Json::Kind;
constexpr std::pair<const char*, Kind> kDocument[] = {{"architecture", Kind::string}, {"overrides", Kind::object},
                                                      {"vit", Kind::object},          {"preprocess", Kind::object},
                                                      {"class_names", Kind::array},   {"source", Kind::string},
                                                      {"license", Kind::string},      {"patterns", Kind::object},
                                                      {"dtypes", Kind::object},       {"data", Kind::object}};
constexpr std::size_t kVitFields = 22;

class Reader {
 public:
  Reader(const std::uint8_t* bytes, std::size_t size, PackedFile& out) : bytes_(bytes), size_(size), out_(out) {}

  std::string read() {
    if (header() && metadata() && tensors()) return "";
    return error_.empty() ? "damaged" : error_;
  }

 private:
  bool fail(const std::string& what) {
    if (error_.empty()) error_ = what;
    return false;
  }

  bool header() {
    std::uint64_t length = 0;
    if (size_ < 8) return fail("wanted a safetensors file, got " + std::to_string(size_) + " bytes");
    std::memcpy(&length, bytes_, 8);
    if (length > kMaxHeader || length > size_ - 8)
      return fail("wanted a safetensors file, got a header beyond its end");
    auto parsed = parse_json({reinterpret_cast<const char*>(bytes_ + 8), static_cast<std::size_t>(length)});
    if (!parsed || parsed->kind != Kind::object) return fail("wanted a safetensors file, got a header of no JSON");
    data_ = bytes_ + 8 + length;
    const std::size_t available = size_ - 8 - length;
    std::vector<std::pair<std::size_t, std::size_t>> spans;
    for (const auto& [name, entry] : parsed->members) {
      if (name == "__metadata__") continue;
      if (!tensor(name, entry, available)) return fail(name + ": wanted a tensor inside the file, got another entry");
      spans.emplace_back(tensors_[name].data - data_, tensors_[name].bytes);
    }
    std::make_heap(spans.begin(), spans.end());  // of a page's module std::sort would be 5 KB
    std::sort_heap(spans.begin(), spans.end());
    std::size_t end = 0;
    for (const auto& [begin, bytes] : spans) {
      if (begin != end) return fail("wanted tensors one after the other, got a gap or an overlap");
      end += bytes;
    }
    if (end != available) return fail("wanted tensors up to the end, got other bytes after them");
    const Json* found = parsed->find("__metadata__");
    for (const char* name : {"format", "version", "config"}) {
      const Json* value = found ? found->find(name) : nullptr;
      if (!value || value->kind != Kind::string) return fail("wanted metadata of format 'sparsemae-packed', got none");
      metadata_[name] = value->string;
    }
    return true;
  }

  bool tensor(const std::string& name, const Json& entry, std::size_t available) {
    const Json *dtype = entry.find("dtype"), *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
    if (!dtype || !shape || !offsets || shape->kind != Kind::array || offsets->items.size() != 2) return false;
    Tensor t{dtype->string, {}, nullptr, 0};
    std::size_t count = item_size(t.dtype);
    if (!count) return false;
    for (const Json& side : shape->items) {
      const auto value = whole(&side, 0, 1e9);
      if (!value || (*value && count > available / *value)) return false;
      t.shape.push_back(*value), count *= *value;
    }
    const auto begin = whole(&offsets->items[0], 0, static_cast<double>(available));
    const auto end = whole(&offsets->items[1], 0, static_cast<double>(available));
    if (!begin || !end || *end < *begin || *end - *begin != count) return false;
    t.data = data_ + *begin, t.bytes = count;
    if (reinterpret_cast<std::uintptr_t>(t.data) % item_size(t.dtype)) return false;
    tensors_[name] = t;
    return true;
  }

  bool metadata() {
    if (metadata_["format"] != "sparsemae-packed")
      return fail("wanted metadata of format 'sparsemae-packed', got another");
    const std::string& version = metadata_["version"];
    if (version != "1" && version != "2" && version != "3")
      return fail("format version: wanted 1 to 3, got '" + version.substr(0, 20) + "'");
    auto parsed = parse_json(metadata_["config"]);
    if (!parsed || parsed->kind != Kind::object) return fail("config: wanted a JSON object, got another text");
    document_ = std::move(*parsed);
    second_ = version != "1", segmenter_ = version == "3";
    std::size_t there = 0;
    for (const auto& [name, kind] : kDocument) {
      const Json* value = document_.find(name);
      there += value != nullptr;
      if (value ? value->kind != kind : second_ || std::string_view(name) != "data")
        return fail(std::string("config.") + name + ": wanted another kind of value");
    }
    const Json* segment = document_.find("segment");
    if (segmenter_ && (!segment || segment->kind != Kind::object))
      return fail("config.segment: wanted another kind of value");
    if (there + segmenter_ != document_.members.size())
      return fail("config: wanted the fields of the format only, got one more");
    out_.config = metadata_["config"];
    return vit() && (!segmenter_ || checked_segment(*segment)) && preprocess() && names() &&
           strings("patterns", patterns_) && strings("dtypes", dtypes_);
  }

  bool vit() {
    VitConfig& c = out_.vit;
    const Json* fields = document_.find("vit");
    if (fields->members.size() != kVitFields) return fail("vit: wanted the fields of the format, got others");
    const struct {
      const char* name;
      std::size_t* to;
      double least, most;
    } sizes[] = {
        {"embed_dim", &c.embed_dim, 1, 1 << 14},     {"depth", &c.depth, 1, 512},
        {"num_heads", &c.num_heads, 1, 1 << 10},     {"mlp_hidden", &c.mlp_hidden, 1, 1 << 17},
        {"patch_size", &c.patch_size, 1, 1 << 10},   {"image_height", &c.image_height, 1, 1 << 14},
        {"image_width", &c.image_width, 1, 1 << 14}, {"in_chans", &c.in_chans, 1, 64},
        {"num_classes", &c.num_classes, 0, 1 << 20}, {"reg_tokens", &c.reg_tokens, 0, 1 << 10},
    };
    for (const auto& field : sizes) {
      const auto value = whole(fields->find(field.name), field.least, field.most);
      if (!value)
        return fail(std::string("vit.") + field.name + ": wanted a number within its limits, got another value");
      *field.to = *value;
    }
    const std::pair<const char*, bool*> flags[] = {
        {"class_token", &c.class_token}, {"no_embed_class", &c.no_embed_class},
        {"pre_norm", &c.pre_norm},       {"final_norm", &c.final_norm},
        {"fc_norm", &c.fc_norm},         {"patch_bias", &c.patch_bias},
        {"layer_scale", &layer_scale_},  {"qkv_bias", &qkv_bias_},
        {"proj_bias", &proj_bias_},      {"pool_include_prefix", &c.pool_include_prefix},
    };
    for (const auto& [name, to] : flags) {
      const Json* value = fields->find(name);
      if (!value || value->kind != Kind::boolean) return fail(std::string("vit.") + name + ": wanted true or false");
      *to = value->boolean;
    }
    const Json *eps = fields->find("norm_eps"), *pool = fields->find("global_pool");
    if (!is_real(eps) || !(eps->number > 0 && eps->number < 1))
      return fail("vit.norm_eps: wanted more than 0 and below 1, got another value");
    c.norm_eps = static_cast<float>(eps->number);
    if (!pool || pool->kind != Kind::string) return fail("vit.global_pool: wanted a string");
    c.average_pool = pool->string == "avg", c.all_tokens = pool->string.empty();
    const bool by_token = pool->string == "token" && c.class_token;
    if (!c.average_pool && !by_token && !(c.all_tokens && !c.num_classes))
      return fail("vit.global_pool: wanted 'avg', 'token' with a class token, or '' of an encoder");
    if (c.all_tokens && c.fc_norm) return fail("vit.fc_norm: wanted false where nothing is pooled, got true");
    if (c.embed_dim % c.num_heads || c.image_height % c.patch_size || c.image_width % c.patch_size)
      return fail("vit: wanted heads that divide embed_dim, and patches that divide the image");
    return true;
  }

  bool checked_segment(const Json& fields) {
    const std::string wrong = read_segment(fields, out_.vit, out_.inference.emplace());
    return wrong.empty() || fail(wrong);
  }

  bool preprocess() {
    const std::string wrong =
        read_preprocess(*document_.find("preprocess"), metadata_["version"], out_.vit.in_chans, out_.preprocess);
    return wrong.empty() || fail(wrong);
  }

  bool names() {
    const Json* values = document_.find("class_names");
    const auto& head = out_.vit.head;
    if (head ? values->items.size() != head->classes
             : values->items.size() && values->items.size() != out_.vit.num_classes)
      return fail("class_names: wanted none or one per class, got another number");
    for (const Json& value : values->items) {
      if (value.kind != Kind::string) return fail("class_names: wanted strings, got another value");
      out_.class_names.push_back(value.string);
    }
    return true;
  }

  bool strings(const char* name, std::map<std::string, std::string>& to) {
    const Json* values = document_.find(name);
    for (const auto& [key, value] : values->members) {
      if (value.kind != Kind::string) return fail(std::string(name) + ": wanted strings by name");
      to[key] = value.string;
    }
    return true;
  }

  // The tensors that follow from the metadata, and no others.
  bool tensors() {
    const VitConfig& c = out_.vit;
    const std::size_t d = c.embed_dim, hidden = c.mlp_hidden, prefix = c.reg_tokens + (c.class_token ? 1 : 0);
    const std::size_t patches = (c.image_height / c.patch_size) * (c.image_width / c.patch_size);
    if (!take("patch_embed.proj.weight", {d, c.in_chans, c.patch_size, c.patch_size}) ||
        !take("pos_embed", {1, c.no_embed_class ? patches : patches + prefix, d}))
      return false;
    if (c.patch_bias && !take("patch_embed.proj.bias", {d})) return false;
    if (c.class_token && !take("cls_token", {1, 1, d})) return false;
    if (c.reg_tokens && !take("reg_token", {1, c.reg_tokens, d})) return false;
    const auto norm = [&](const std::string& name, bool there) {
      return !there || (take(name + ".weight", {d}) && take(name + ".bias", {d}));
    };
    if (!norm("norm_pre", c.pre_norm) || !norm("norm", c.final_norm) || !norm("fc_norm", c.fc_norm)) return false;
    for (std::size_t i = 0; i < c.depth; ++i) {
      const std::string block = "blocks." + std::to_string(i) + ".";
      const auto linear = [&](const char* name, std::size_t rows, std::size_t columns, bool bias) {
        return take(block + name + ".weight", {rows, columns}, true) && (!bias || take(block + name + ".bias", {rows}));
      };
      if (!norm(block + "norm1", true) || !norm(block + "norm2", true) || !linear("attn.qkv", 3 * d, d, qkv_bias_) ||
          !linear("attn.proj", d, d, proj_bias_) || !linear("mlp.fc1", hidden, d, proj_bias_) ||
          !linear("mlp.fc2", d, hidden, proj_bias_))
        return false;
      if (layer_scale_ && (!take(block + "ls1.gamma", {d}) || !take(block + "ls2.gamma", {d}))) return false;
    }
    if (c.num_classes && (!take("head.weight", {c.num_classes, d}) || !take("head.bias", {c.num_classes})))
      return false;
    for (const auto& [name, shape] : head_shapes(c))
      if (!take(name, shape, shape.size() > 1)) return false;
    if (!tensors_.empty()) return fail(tensors_.begin()->first + ": wanted the model's tensors only, got one more");
    if (!dtypes_.empty()) return fail("dtypes: wanted the stored tensors only, got " + dtypes_.begin()->first);
    if (!patterns_.empty()) return fail("patterns: wanted layers of the blocks only, got " + patterns_.begin()->first);
    return true;
  }

  // The next tensor of a name, shape and type, which is not there any more then; null where it is another.
  std::optional<Tensor> stored(const std::string& name, const std::vector<std::size_t>* shape,
                               const std::string& dtype) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return fail(name + ": wanted a tensor of this name, got none"), std::nullopt;
    Tensor t = found->second;
    if (t.dtype != dtype || (shape && t.shape != *shape) || t.shape.empty())
      return fail(name + ": wanted another shape or type"), std::nullopt;
    tensors_.erase(found);
    if (!finite(t)) return fail(name + ": wanted finite values, got NaN or infinity"), std::nullopt;
    return t;
  }

  static bool finite(const Tensor& t) {
    if (t.dtype == "F32") {
      const auto* values = reinterpret_cast<const float*>(t.data);
      return std::all_of(values, values + t.bytes / 4, [](float v) { return std::isfinite(v); });
    }
    const auto* values = reinterpret_cast<const std::uint16_t*>(t.data);
    return t.dtype != "U16" || std::all_of(values, values + t.bytes / 2, [](auto v) { return (v & 0x7FFF) < 0x7F80; });
  }

  std::optional<std::string> dtype_of(const std::string& name, bool sparse) {
    const auto found = dtypes_.find(name);
    const std::string kind = found == dtypes_.end() ? "" : found->second;
    if (kind != "fp32" && kind != "bf16" && !(sparse && kind == "int8"))
      return fail("dtypes: " + name + ": wanted fp32 or bf16" + (sparse ? " or int8" : "")), std::nullopt;
    dtypes_.erase(found);
    return kind == "fp32" ? "F32" : kind == "bf16" ? "U16" : "I8";
  }

  bool take(const std::string& name, const std::vector<std::size_t>& shape, bool linear = false) {
    const bool can_be_sparse = linear && name.rfind("blocks.", 0) == 0;
    const auto pattern = can_be_sparse ? patterns_.find(name.substr(0, name.size() - 7)) : patterns_.end();
    if (pattern != patterns_.end()) {
      const std::string text = pattern->second;
      patterns_.erase(pattern);
      return sparse(name, shape, text);
    }
    const auto dtype = dtype_of(name, false);
    const auto t = dtype ? stored(name, &shape, *dtype) : std::nullopt;
    if (!t) return false;
    const bool matrix = linear || name == "patch_embed.proj.weight";
    std::vector<float> values;
    if (*dtype == "F32" && !matrix) {
      const auto* from = reinterpret_cast<const float*>(t->data);
      values.assign(from, from + t->bytes / 4);
    } else if (*dtype == "U16") {
      const auto* from = reinterpret_cast<const std::uint16_t*>(t->data);
      values.resize(t->bytes / 2);
      std::transform(from, from + values.size(), values.begin(),
                     [](std::uint32_t bits) { return std::bit_cast<float>(bits << 16); });
    }
    if (!matrix) {
      out_.vectors[name] = std::move(values);
      return true;
    }
    Weights& w = out_.weights[name];
    w.rows = shape[0], w.columns = t->bytes / item_size(*dtype) / shape[0];
    if (*dtype == "F32")
      w.fp32 = reinterpret_cast<const float*>(t->data);
    else
      w.fp32 = (out_.floats[name] = std::move(values)).data();
    return true;
  }

  bool sparse(const std::string& name, const std::vector<std::size_t>& shape, const std::string& text) {
    unsigned n = 0, m = 0;
    if (!pattern(text, n, m))
      return fail(name + ": wanted a pattern 'n:m' with 1 <= n <= m <= 256, got '" + text.substr(0, 20) + "'");
    if (shape[1] % m) return fail(name + ": wanted rows of a multiple of the m of " + text);
    const auto dtype = dtype_of(name + ".values", true);
    const std::vector<std::size_t> kept{shape[0], shape[1] / m * n}, rows{shape[0]};
    const auto codes = dtype ? stored(name + ".codes", nullptr, "U8") : std::nullopt;
    const auto values = codes && codes->shape.size() == 1 ? stored(name + ".values", &kept, *dtype) : std::nullopt;
    if (!values) return fail(name + ".codes: wanted another shape");
    Weights& w = out_.weights[name];
    w.rows = shape[0], w.columns = shape[1], w.n = n, w.m = m, w.codes = codes->data, w.code_bytes = codes->bytes;
    if (*dtype == "F32") w.fp32 = reinterpret_cast<const float*>(values->data);
    if (*dtype == "U16") w.bf16 = reinterpret_cast<const std::uint16_t*>(values->data);
    if (*dtype == "I8") {
      const auto scale = stored(name + ".scale", &rows, "F32");
      if (!scale) return false;
      w.int8 = reinterpret_cast<const std::int8_t*>(values->data);
      w.row_scale = reinterpret_cast<const float*>(scale->data);
      w.quantize = true;
      if (*std::min_element(w.row_scale, w.row_scale + w.rows) <= 0.0f)
        return fail(name + ".scale: wanted more than 0");
    }
    const std::string wrong = wrong_codes(w.codes, w.code_bytes, w.rows * (w.columns / m), n, m);
    return wrong.empty() || fail(name + ".codes: " + wrong);
  }

  static bool pattern(const std::string& text, unsigned& n, unsigned& m) {
    const std::size_t colon = text.find(':');
    if (colon == std::string::npos || text.size() > 9) return false;
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (i == colon) continue;
      if (text[i] < '0' || text[i] > '9') return false;
      unsigned& part = i < colon ? n : m;
      part = 10 * part + static_cast<unsigned>(text[i] - '0');
    }
    return n >= 1 && n <= m && m <= kMaxGroup;
  }

  const std::uint8_t* bytes_;
  std::size_t size_;
  PackedFile& out_;
  const std::uint8_t* data_ = nullptr;
  std::string error_;
  std::map<std::string, Tensor> tensors_;  // those that nobody has asked for yet
  std::map<std::string, std::string> metadata_, patterns_, dtypes_;
  Json document_;
  bool second_ = true, segmenter_ = false, layer_scale_ = false, qkv_bias_ = false, proj_bias_ = false;
};

}  // namespace

std::string read_packed(const std::uint8_t* bytes, std::size_t size, PackedFile& out) {
  return Reader(bytes, size, out).read();
}

}  // namespace sparsemae
