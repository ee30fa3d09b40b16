// Runs a model through the C interface: forward MODEL IMAGES BATCH THREADS ISA, logits to standard output.
// MODEL is written by blob.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "c_api.h"

namespace {

std::vector<char> contents(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Record {
  std::uint32_t kind, rows, columns, n, m, type, bytes[4];  // of name, codes, values, scale, each padded to 8
};

}  // namespace

int main(int, char** argv) {
  std::vector<char> blob = contents(argv[1]), images = contents(argv[2]);
  const char* p = blob.data();
  sparsemae_builder* builder = sparsemae_begin(reinterpret_cast<const sparsemae_shape*>(p));
  p += sizeof(sparsemae_shape);
  while (p < blob.data() + blob.size()) {
    Record r;
    std::memcpy(&r, p, sizeof r);
    p += sizeof r;
    const char* part[4];
    for (int i = 0; i < 4; ++i) {
      part[i] = p;
      p += (r.bytes[i] + 7) / 8 * 8;
    }
    const std::string name(part[0], r.bytes[0]);
    const auto* values = reinterpret_cast<const float*>(part[2]);
    if (r.kind == 0) sparsemae_vector(builder, name.c_str(), values, r.bytes[2] / sizeof(float));
    if (r.kind == 1) sparsemae_dense(builder, name.c_str(), values, r.rows, r.columns);
    if (r.kind == 2)
      sparsemae_sparse(builder, name.c_str(), r.rows, r.columns, r.n, r.m,
                       reinterpret_cast<const std::uint8_t*>(part[1]), r.bytes[1], static_cast<sparsemae_type>(r.type),
                       values, reinterpret_cast<const float*>(part[3]), 1);
  }
  sparsemae_model* model = sparsemae_build(builder, std::strtoul(argv[4], nullptr, 10), argv[5]);
  if (!model) {
    std::fprintf(stderr, "%s\n", sparsemae_error());
    return 1;
  }
  std::fprintf(stderr, "%s\n", sparsemae_isa(model));
  const std::size_t batch = std::strtoul(argv[3], nullptr, 10);
  std::vector<float> out(batch * sparsemae_outputs(model));
  sparsemae_forward(model, reinterpret_cast<const float*>(images.data()), batch, out.data());
  std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  sparsemae_end(model);
}
