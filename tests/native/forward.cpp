// Runs a packed file through the C interface: forward FILE IMAGES BATCH THREADS ISA, logits to standard output.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "sparsemae.h"

int main(int, char** argv) {
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> images{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  sparsemae_model* model =
      sparsemae_open(argv[1], static_cast<std::uint32_t>(std::strtoul(argv[4], nullptr, 10)), argv[5]);
  if (!model) {
    std::fprintf(stderr, "%s\n", sparsemae_error());
    return 1;
  }
  const sparsemae_description* described = sparsemae_describe(model);
  std::fprintf(stderr, "%s\n", described->isa);
  const std::size_t batch = std::strtoul(argv[3], nullptr, 10);
  std::vector<float> out(batch * described->outputs);
  if (sparsemae_forward(model, reinterpret_cast<const float*>(images.data()), batch, out.data())) return 1;
  std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  sparsemae_close(model);
}
