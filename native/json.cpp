#include "json.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <set>

namespace sparsemae {
namespace {

constexpr int kMaxDepth = 32;
constexpr int kMaxDigits = 64;  // of a number

class Parser {
 public:
  explicit Parser(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  bool document(Json& out) {
    if (!value(out, 0)) return false;
    skip_space();
    return at_ == end_;
  }

 private:
  bool value(Json& out, int depth) {
    skip_space();
    if (at_ == end_ || depth > kMaxDepth) return false;
    switch (*at_) {
      case '{':
        return object(out, depth);
      case '[':
        return array(out, depth);
      case '"':
        out.kind = Json::Kind::string;
        return string(out.string);
      case 't':
      case 'f':
        out.kind = Json::Kind::boolean;
        out.boolean = *at_ == 't';
        return word(out.boolean ? "true" : "false");
      case 'n':
        return word("null");
      default:
        return number(out);
    }
  }

  bool object(Json& out, int depth) {
    out.kind = Json::Kind::object;
    ++at_;
    std::set<std::string, std::less<>> names;
    skip_space();
    if (take('}')) return true;
    do {
      std::string name;
      skip_space();
      if (!string(name) || !names.insert(name).second) return false;
      skip_space();
      if (!take(':')) return false;
      out.members.emplace_back(std::move(name), Json{});
      if (!value(out.members.back().second, depth + 1)) return false;
      skip_space();
    } while (take(','));
    return take('}');
  }

  bool array(Json& out, int depth) {
    out.kind = Json::Kind::array;
    ++at_;
    skip_space();
    if (take(']')) return true;
    do {
      if (!value(out.items.emplace_back(), depth + 1)) return false;
      skip_space();
    } while (take(','));
    return take(']');
  }

  // Within a unit in the last place of a double, which is exact for up to 15 digits: strtod would be a fifth of the
  // WebAssembly module.
  bool number(Json& out) {
    const bool negative = take('-');
    std::uint64_t digits = 0;
    int exponent = 0, written = 0;
    const auto read = [&](bool fraction) {
      const char* first = at_;
      for (; at_ < end_ && *at_ >= '0' && *at_ <= '9'; ++at_, ++written) {
        if (digits < 1'000'000'000'000'000'000)
          digits = 10 * digits + static_cast<std::uint64_t>(*at_ - '0'), exponent -= fraction;
        else
          exponent += !fraction;
      }
      return at_ != first && written < kMaxDigits;
    };
    if (!read(false)) return false;
    out.kind = Json::Kind::number;
    out.integer = !take('.');
    if (!out.integer && !read(true)) return false;
    if (take('e') || take('E')) {
      out.integer = false;
      const bool small = at_ < end_ && *at_ == '-';
      if (!take('-')) take('+');
      int power = 0;
      const char* first = at_;
      for (; at_ < end_ && *at_ >= '0' && *at_ <= '9' && power < 1000; ++at_) power = 10 * power + (*at_ - '0');
      if (at_ == first || power >= 1000) return false;
      exponent += small ? -power : power;
    }
    double scale = 1.0;
    for (int i = std::abs(exponent); i > 0; --i) scale *= 10.0;  // exact up to 10^22
    out.number = exponent < 0 ? static_cast<double>(digits) / scale : static_cast<double>(digits) * scale;
    if (negative) out.number = -out.number;
    return std::isfinite(out.number);
  }

  bool string(std::string& out) {
    if (!take('"')) return false;
    while (at_ < end_ && *at_ != '"') {
      if (static_cast<unsigned char>(*at_) < 0x20) return false;
      if (*at_ != '\\') {
        out += *at_++;
        continue;
      }
      if (++at_ == end_) return false;
      const char escaped = *at_++;
      constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
      std::uint32_t code = 0;
      if (const auto found = kNames.find(escaped); found != std::string_view::npos)
        out += kMeant[found];
      else if (escaped == 'u' && unicode(code))
        append(out, code);
      else
        return false;
    }
    return take('"');
  }

  // Four digits, and four more where they are the first half of a pair.
  bool unicode(std::uint32_t& code) {
    if (!digits(code)) return false;
    if (code < 0xD800 || code > 0xDFFF) return true;
    std::uint32_t low = 0;
    const char* before = at_;
    if (code < 0xDC00 && take('\\') && take('u') && digits(low) && low >= 0xDC00 && low <= 0xDFFF) {
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else {
      at_ = before;
      code = 0xFFFD;
    }
    return true;
  }

  bool digits(std::uint32_t& code) {
    if (end_ - at_ < 4) return false;
    for (int i = 0; i < 4; ++i) {
      const char c = *at_++;
      const int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
      if (digit < 0) return false;
      code = code * 16 + static_cast<std::uint32_t>(digit);
    }
    return true;
  }

  static void append(std::string& out, std::uint32_t code) {
    const auto byte = [&](std::uint32_t bits) { out += static_cast<char>(bits); };
    const auto rest = [&](int shift) { byte(0x80 | ((code >> shift) & 0x3F)); };
    if (code < 0x80) {
      byte(code);
    } else if (code < 0x800) {
      byte(0xC0 | (code >> 6)), rest(0);
    } else if (code < 0x10000) {
      byte(0xE0 | (code >> 12)), rest(6), rest(0);
    } else {
      byte(0xF0 | (code >> 18)), rest(12), rest(6), rest(0);
    }
  }

  bool word(std::string_view wanted) {
    if (static_cast<std::size_t>(end_ - at_) < wanted.size() || std::string_view(at_, wanted.size()) != wanted)
      return false;
    at_ += wanted.size();
    return true;
  }

  bool take(char c) {
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }

  void skip_space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }

  const char *at_, *end_;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& [key, value] : members)
    if (key == name) return &value;
  return nullptr;
}

std::optional<Json> parse_json(std::string_view text) {
  Json out;
  return Parser(text).document(out) ? std::optional(std::move(out)) : std::nullopt;
}

bool is_real(const Json* value) { return value && value->kind == Json::Kind::number && !value->integer; }

std::optional<std::size_t> whole(const Json* value, double least, double most) {
  if (!value || value->kind != Json::Kind::number || !value->integer) return std::nullopt;
  if (value->number < least || value->number > most) return std::nullopt;
  return static_cast<std::size_t>(value->number);
}

}  // namespace sparsemae
