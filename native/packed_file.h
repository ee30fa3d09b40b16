// A packed file in memory, looked through before anything of it is believed: docs/packed-format.md. The twin of
// sparsemae/packing/format.py and metadata.py. No exceptions: what is wrong is said in one line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "preprocess.h"
#include "segmenter.h"
#include "vit.h"

namespace sparsemae {

struct PackedFile {
  VitConfig vit{};
  Preprocess preprocess;
  std::optional<Inference> inference;    // a segmenter's
  std::vector<std::string> class_names;  // none, or one per class
  std::string config;                    // the metadata's JSON
  // For Vit. They point into the file's bytes, or into `floats`.
  std::map<std::string, Weights> weights;
  std::map<std::string, std::vector<float>> vectors;
  std::map<std::string, std::vector<float>> floats;  // dense matrices that are stored as bfloat16
};

struct Json;
// The head and how it looks at an image, from the metadata's `segment`, for a ViT that has been read; what is wrong
// with it, or nothing.
std::string read_segment(const Json& fields, VitConfig&, Inference&);
// How an image is prepared for `channels`, from the metadata's `preprocess`; what is wrong with it, or nothing.
std::string read_preprocess(const Json& fields, const std::string& version, std::size_t channels, Preprocess&);
// Names and shapes of the head's tensors, if there is one.
std::vector<std::pair<std::string, std::vector<std::size_t>>> head_shapes(const VitConfig&);

// What is wrong with the bytes, which must be aligned to 8; empty: `out` can be used while they stay.
std::string read_packed(const std::uint8_t* bytes, std::size_t size, PackedFile& out);

}  // namespace sparsemae
