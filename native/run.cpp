// sparsemae-run [--logits] FILE image.ppm...: the classes of images, or of their pixels, by a packed file. PPM and PGM
// of 8 bits, binary; an image that cannot be read is named, the others are done, and the status is 2.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "sparsemae.h"

namespace {

constexpr std::size_t kBest = 3, kMaxSide = 65'535;

struct Pixels {
  std::uint32_t width = 0, height = 0, channels = 0;
  std::vector<std::uint8_t> values;
};

// A number of the header, after spaces and comments; 0 where there is none.
std::uint32_t number(std::FILE* file) {
  int c = std::fgetc(file);
  while (c == '#' || c == ' ' || c == '\n' || c == '\r' || c == '\t') {
    if (c == '#')
      while (c != '\n' && c != EOF) c = std::fgetc(file);
    c = std::fgetc(file);
  }
  std::uint32_t value = 0;
  for (; c >= '0' && c <= '9' && value <= kMaxSide; c = std::fgetc(file))
    value = 10 * value + static_cast<std::uint32_t>(c - '0');
  return value;  // the one space after the last number is taken
}

// What is wrong with a file; empty: nothing.
std::string read(const char* path, Pixels& out) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
  if (!file) return "no such file";
  const int mark = std::fgetc(file.get()), kind = std::fgetc(file.get());
  if (mark != 'P' || (kind != '5' && kind != '6')) return "wanted a binary PPM or PGM";
  out.channels = kind == '6' ? 3 : 1;
  out.width = number(file.get()), out.height = number(file.get());
  const std::uint32_t most = number(file.get());
  if (!out.width || !out.height || out.width > kMaxSide || out.height > kMaxSide || most != 255)
    return "wanted sides of 1 to 65535 px and values up to 255";
  const std::size_t bytes = std::size_t{out.width} * out.height * out.channels;
  for (std::size_t have = 0; have < bytes;) {  // as far as the file goes, whatever its header says
    out.values.resize(std::min(bytes, have + (std::size_t{1} << 20)));
    const std::size_t got = std::fread(&out.values[have], 1, out.values.size() - have, file.get());
    if (!got) return "wanted " + std::to_string(bytes) + " bytes of pixels, got " + std::to_string(have);
    have += got;
  }
  return "";
}

// One line of a name: control characters are escaped.
std::string printable(const std::string& name) {
  std::string shown;
  for (const char c : name) {
    const auto code = static_cast<unsigned char>(c);
    char escaped[5] = {c};
    if (code < 0x20 || code == 0x7f) std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned>(code));
    shown += c == '\n' ? "\\n" : c == '\t' ? "\\t" : c == '\r' ? "\\r" : escaped;
  }
  return shown;
}

void print_best(const char* path, const sparsemae_description& d, const std::vector<float>& logits) {
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - logits[order[0]]);
  std::printf("%s: ", path);
  for (std::size_t i = 0; i < std::min(kBest, order.size()); ++i) {
    const std::string name = d.class_names ? printable(d.class_names[order[i]]) : std::to_string(order[i]);
    const double probability = std::exp(static_cast<double>(logits[order[i]]) - logits[order[0]]) / sum;
    std::printf("%s%s %.1f%%", i ? ", " : "", name.c_str(), 100.0 * probability);
  }
  std::printf("\n");
}

// The largest classes of an image's pixels.
void print_areas(const char* path, const sparsemae_description& d, const std::vector<std::uint8_t>& classes) {
  std::vector<std::size_t> counts(d.classes), order(d.classes);
  for (const std::uint8_t c : classes) ++counts[c];
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return counts[a] > counts[b]; });
  std::printf("%s: ", path);
  for (std::size_t i = 0; i < std::min(kBest, order.size()) && counts[order[i]]; ++i)
    std::printf("%s%s %.1f%%", i ? ", " : "", printable(d.class_names[order[i]]).c_str(),
                100.0 * static_cast<double>(counts[order[i]]) / static_cast<double>(classes.size()));
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const bool raw = argc > 1 && !std::strcmp(argv[1], "--logits");
  if (argc < 3 + raw) {
    std::fprintf(stderr, "usage: sparsemae-run [--logits] FILE image.ppm...\n");
    return 2;
  }
  const char* path = argv[1 + raw];
  sparsemae_model* model = sparsemae_open(path, 0, nullptr);
  if (!model) {
    std::fprintf(stderr, "sparsemae-run: error: %s: %s\n", path, sparsemae_error());
    return 2;
  }
  const sparsemae_description& d = *sparsemae_describe(model);
  if (!raw && !d.classes) {
    std::fprintf(stderr, "sparsemae-run: error: %s: wanted a model with classes, got an encoder\n", path);
    return 2;
  }
  std::vector<float> input(std::size_t{d.channels} * d.height * d.width), logits(d.outputs);
  int status = 0;
  for (int i = 2 + raw; i < argc; ++i) {
    Pixels image;
    std::string wrong = read(argv[i], image);
    if (wrong.empty() && d.rows) {
      std::vector<std::uint8_t> classes(std::size_t{image.width} * image.height);
      if (!sparsemae_segment(model, image.values.data(), image.width, image.height, image.channels, classes.data())) {
        print_areas(argv[i], d, classes);
        continue;
      }
      wrong = sparsemae_error();
    }
    if (wrong.empty() &&
        (sparsemae_prepare(model, image.values.data(), image.width, image.height, image.channels, input.data()) ||
         sparsemae_forward(model, input.data(), 1, logits.data())))
      wrong = sparsemae_error();
    if (wrong.empty() && !raw && !std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }))
      wrong = "wanted finite logits, got NaN or infinite ones";
    if (!wrong.empty()) {
      std::fprintf(stderr, "sparsemae-run: %s: %s\n", argv[i], wrong.c_str());
      status = 2;
    } else if (raw) {
      for (std::size_t c = 0; c < logits.size(); ++c)
        std::printf("%.*g%s", std::numeric_limits<float>::max_digits10, static_cast<double>(logits[c]),
                    c + 1 < logits.size() ? " " : "\n");
    } else {
      print_best(argv[i], d, logits);
    }
  }
  sparsemae_close(model);
  return status;
}
