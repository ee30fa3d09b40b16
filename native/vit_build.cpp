// Building a model: codes to positions, rows to the layout of the chosen kernels, constants folded into scales and
// biases.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <stdexcept>

#include "bounds.h"
#include "codes.h"
#include "dispatch.h"
#include "preprocess.h"
#include "vit.h"
#include "vit_state.h"

namespace sparsemae {

void FreeAligned::operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }

namespace {

constexpr const char* kEmbedding = "patch_embed.proj.weight";
constexpr const char* kDenseHead = "decode_head.";

// Rows of a weight matrix in the order of the kernels' physical rows. The rows of one block are decoded when it is
// first asked for.
class RowDecoder {
 public:
  // `max_row_sum`: how large the sum of a row's magnitudes may become; 0: values are passed on as they are.
  RowDecoder(const Weights& weights, const std::vector<std::int64_t>& rows, float max_row_sum)
      : weights_(weights), rows_(rows), max_row_sum_(max_row_sum), scale_(rows.size()) {
    if (weights.n)
      positions_ = decode_positions(weights.codes, weights.code_bytes, weights.rows * (weights.columns / weights.m),
                                    weights.n, weights.m);
  }
  RowSource source() {
    return {this, [](void* self, std::size_t row) { return static_cast<RowDecoder*>(self)->row(row); }};
  }
  // What the values of a physical row, which has been read, are to be multiplied by.
  float scale(std::size_t physical) const { return scale_[physical]; }

 private:
  Row row(std::size_t physical) {
    if (physical / kRowBlock != block_) {
      block_ = physical / kRowBlock;
      for (std::size_t r = 0; r < kRowBlock; ++r) decode(block_ * kRowBlock + r, r);
    }
    const std::size_t r = physical % kRowBlock;
    return {index_[r].data(), value_[r].data(), index_[r].size()};
  }

  void decode(std::size_t physical, std::size_t slot) {
    auto& index = index_[slot];
    auto& value = value_[slot];
    index.clear();
    value.clear();
    if (physical >= rows_.size() || rows_[physical] < 0) return;
    const std::size_t groups = weights_.n ? weights_.columns / weights_.m : 1;
    const std::size_t per_group = weights_.n ? weights_.n : weights_.columns;
    const std::size_t count = groups * per_group, first = static_cast<std::size_t>(rows_[physical]) * count;
    index.resize(count);
    value.resize(count);
    for (std::size_t g = 0, i = 0; g < groups; ++g)
      for (std::size_t j = 0; j < per_group; ++j, ++i)
        index[i] = static_cast<std::uint32_t>(weights_.n ? g * weights_.m + positions_[first + i] : j);
    for (std::size_t i = 0; i < count; ++i) value[i] = weights_.value(first + i);
    scale_[physical] = weights_.row_scale ? weights_.row_scale[rows_[physical]] : 1.0f;
    if (max_row_sum_ > 0.0f) scale_up(value, scale_[physical]);
  }

  // Multiplies with the scale and a power of two, which becomes the scale. It is limited, so that fp16 can hold its
  // inverse.
  void scale_up(std::vector<float>& values, float& scale) const {
    float sum = 0.0f;
    for (const float v : values) sum += std::abs(v * scale);
    const int exponent = sum > 0.0f ? std::min(14, std::ilogb(max_row_sum_ / sum)) : 0;
    for (float& v : values) v = std::ldexp(v * scale, exponent);
    scale = std::ldexp(1.0f, -exponent);
  }

  const Weights& weights_;
  const std::vector<std::int64_t>& rows_;
  const float max_row_sum_;
  std::vector<float> scale_;
  std::vector<std::uint8_t> positions_;
  std::size_t block_ = static_cast<std::size_t>(-1);
  std::vector<std::uint32_t> index_[kRowBlock];
  std::vector<float> value_[kRowBlock];
};

std::vector<std::int64_t> identity_rows(std::size_t count) {
  std::vector<std::int64_t> rows(round_up(count, kRowBlock), -1);
  for (std::size_t i = 0; i < count; ++i) rows[i] = static_cast<std::int64_t>(i);
  return rows;
}

// [head][q, k, v][padded_head_dim], from timm's [q, k, v][head][head_dim].
std::vector<std::int64_t> head_rows(const Geometry& g) {
  std::vector<std::int64_t> rows(g.heads * 3 * g.padded_head_dim, -1);
  for (std::size_t h = 0; h < g.heads; ++h)
    for (std::size_t part = 0; part < 3; ++part)
      for (std::size_t d = 0; d < g.head_dim; ++d)
        rows[(h * 3 + part) * g.padded_head_dim + d] = static_cast<std::int64_t>(part * g.width + h * g.head_dim + d);
  return rows;
}

// The patch embedding's weights [rows][C][P][P], and after each row the means of its columns, [C][P].
std::vector<float> with_column_means(const Weights& weights, std::size_t channels, std::size_t side) {
  std::vector<float> all;
  for (std::size_t r = 0; r < weights.rows; ++r) {
    const std::size_t first = r * weights.columns;
    for (std::size_t i = 0; i < weights.columns; ++i) all.push_back(weights.value(first + i));
    for (std::size_t c = 0; c < channels; ++c)
      for (std::size_t x = 0; x < side; ++x) {
        float sum = 0.0f;
        for (std::size_t y = 0; y < side; ++y) sum += weights.value(first + (c * side + y) * side + x);
        all.push_back(sum / static_cast<float>(side));
      }
  }
  return all;
}

#if defined(__wasm__)
// One thread and no exceptions: a task is done where it is named, and the module is 20 KB smaller.
struct Tasks {
  template <class Task>
  void emplace_back(const Task& task) {
    task();
  }
};
void run_all(ThreadPool&, const Tasks&) {}
#else
using Tasks = std::vector<std::function<void()>>;

// Runs the tasks on all threads; throws what the first failing one (in their order) has thrown.
void run_all(ThreadPool& pool, const Tasks& tasks) {
  struct Call {
    const Tasks& tasks;
    std::vector<std::exception_ptr> failures;
    std::atomic<std::size_t> next{0};
  } call{tasks, std::vector<std::exception_ptr>(tasks.size())};
  pool.run(
      [](void* context, std::size_t) {
        auto& c = *static_cast<Call*>(context);
        for (std::size_t i; (i = c.next.fetch_add(1)) < c.tasks.size();) {
          try {
            c.tasks[i]();
          } catch (...) {
            c.failures[i] = std::current_exception();
          }
        }
      },
      &call);
  for (const auto& failure : call.failures)
    if (failure) std::rethrow_exception(failure);
}
#endif

}  // namespace

Vit::Layer Vit::build_layer(const Kernels& kernels, const Weights& weights, const std::vector<std::int64_t>& rows,
                            const std::vector<float>* bias, const std::vector<float>* gain, float input_bound) const {
  // the weights themselves stay below the bound, too
  RowDecoder decoder(weights, rows, kernels.max_magnitude / std::max(1.0f, input_bound));
  const RowSource source = decoder.source();
  Layer layer;
  const std::size_t blocks = rows.size() / kRowBlock;
  layer.view.columns = weights.columns;
  layer.view.quantize = weights.quantize && kernels.quantize;
  layer.view.exact = weights.fp32;
  layer.view.dense = weights.n == 0;
  std::size_t total = 0, capacity = 0;
  for (std::size_t block = 0; block < blocks; ++block) {  // one at a time, so that its rows are decoded once
    const std::size_t bytes = kernels.pack_block(source, layer.view, block, nullptr);
    if (total + bytes > capacity) {
      capacity =
          block ? 2 * (total + bytes) : bytes * blocks;  // blocks are alike: the first guess is nearly always right
      auto larger = aligned_array<char>(capacity);
      std::copy_n(layer.data.get(), total, larger.get());
      layer.data = std::move(larger);
    }
    kernels.pack_block(source, layer.view, block, layer.data.get() + total);
    layer.offsets.push_back(total);
    total += bytes;
  }
  layer.scale.assign(rows.size(), 0.0f);
  layer.bias.assign(rows.size(), 0.0f);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (rows[r] < 0) continue;
    const auto from = static_cast<std::size_t>(rows[r]);
    const float factor = gain ? (*gain)[from] : 1.0f;
    layer.scale[r] = decoder.scale(r) * factor;
    layer.bias[r] = bias ? (*bias)[from] * factor : 0.0f;
  }
  layer.view.rows = rows.size();
  layer.view.used = static_cast<std::size_t>(
      std::find_if(rows.rbegin(), rows.rend(), [](auto r) { return r >= 0; }).base() - rows.begin());
  layer.view.data = layer.data.get();
  layer.view.offsets = layer.offsets.data();
  layer.view.scale = layer.scale.data();
  layer.view.bias = layer.bias.data();
  return layer;
}

void Vit::build_base() {
  const Geometry& g = geometry_;
  const Net& net = *net_;
  base_ = aligned_array<float>(residual_size_);
  const std::size_t first = config_.no_embed_class ? 0 : g.prefix;  // positions of other tokens than patches
  std::vector<float> resampled;
  // a segmenter alone looks at other sizes
  const bool same = !config_.head || (config_.rows() == net.rows && config_.columns() == net.columns);
  if (!same)
    resampled = resize_bicubic(net.positions.data() + first * g.width, net.rows, net.columns, config_.rows(),
                               config_.columns(), g.width);
  const float* patches = same ? net.positions.data() + first * g.width : resampled.data();
  for (std::size_t t = 0; t < g.tokens; ++t)
    for (std::size_t d = 0; d < g.width; ++d) {
      float value = 0.0f;
      if (t >= g.prefix)
        value = patches[(t - g.prefix) * g.width + d] + (config_.patch_bias ? net.patch_bias[d] : 0.0f);
      else if (config_.class_token && t == 0)
        value = (first ? net.positions[d] : 0.0f) + net.class_token[d];
      else
        value = (first ? net.positions[t * g.width + d] : 0.0f) +
                net.registers[(t - (config_.class_token ? 1 : 0)) * g.width + d];
      base_[residual_index(*kernels_, g, t, d)] = value;
    }
}

void Vit::set_geometry() {
  Geometry& g = geometry_;
  const VitConfig& config = config_;
  g.width = config.embed_dim;
  g.heads = config.num_heads;
  g.head_dim = g.width / g.heads;
  g.channels = config.in_chans;
  g.image_height = config.image_height;
  g.image_width = config.image_width;
  g.patch = config.patch_size;
  g.prefix = config.reg_tokens + (config.class_token ? 1 : 0);
  g.tokens = g.prefix + config.rows() * config.columns();
  g.padded_tokens = std::max<std::size_t>(round_up(g.tokens, kTokenUnit), 2 * kTokenUnit);
}

void Vit::set_up() {
  Geometry& g = geometry_;
  g.padded_head_dim = round_up(g.head_dim, kernels_->head_step);
  residual_size_ = residual_size(g);
  fused_ = logits_ = g;
  if (config_.head) fused_.width = config_.head->width, logits_.width = config_.head->classes;
  build_base();
  // a fork or another thread while one is added must not find the others moved
  states_.reserve(2 * pool_.size() + 2);
  workspaces_.reserve(pool_.size() + 1);
  const std::size_t scratch = std::max(kernels_->scratch_bytes(g), embedding_->scratch_bytes(g));
  for (std::size_t t = 0; t < pool_.size(); ++t) scratch_.push_back(aligned_array<char>(scratch));
}

Vit::Vit(const Vit& other, std::size_t height, std::size_t width)
    : config_(other.config_),
      kernels_(other.kernels_),
      embedding_(other.embedding_),
      net_(other.net_),
      pool_(other.pool_.size()) {
  config_.image_height = height, config_.image_width = width;
  set_geometry();
  set_up();
}

Vit::Vit(const VitConfig& config, const std::map<std::string, Weights>& weights, const Vectors& vectors,
         std::size_t threads, const std::string& isa)
    : config_(config), pool_(threads) {
  set_geometry();
  const Geometry& g = geometry_;
  Needs needs;
  needs.odd_heads = g.head_dim % 2 != 0;
  for (const auto& [name, w] : weights) {
    if (name == kEmbedding || name.rfind(kDenseHead, 0) == 0) continue;
    needs.exact = needs.exact || (w.n && w.fp32);
    needs.quantize = needs.quantize || w.quantize;
    needs.density = std::max(needs.density, w.n ? static_cast<float>(w.n) / static_cast<float>(w.m) : 1.0f);
  }
  std::vector<InputBounds> bounds;
  for (std::size_t i = 0; i < config.depth; ++i) {
    bounds.push_back(input_bounds(weights, vectors, "blocks." + std::to_string(i) + ".", g.width));
    needs.max_input = std::max(needs.max_input, bounds.back().max());
  }
  kernels_ = choose_kernels(isa, needs);
  embedding_ = kernels_->embedding ? kernels_->embedding() : kernels_;
  geometry_.padded_head_dim = round_up(g.head_dim, kernels_->head_step);

  const auto norm = [&](const std::string& name) {
    return Norm{vectors.at(name + ".weight"), vectors.at(name + ".bias")};
  };
  const auto optional_vector = [&](const std::string& name) {
    const auto found = vectors.find(name);
    return found == vectors.end() ? nullptr : &found->second;
  };
  const auto vector_or_none = [&](const std::string& name) {
    const auto* found = optional_vector(name);
    return found ? *found : std::vector<float>{};
  };
  const auto qkv_rows = head_rows(g), wide = identity_rows(g.width), hidden = identity_rows(config.mlp_hidden);
  std::vector<float> query_gain(3 * g.width, 1.0f);
  std::fill_n(query_gain.begin(), g.width, 1.0f / std::sqrt(static_cast<float>(g.head_dim)));

  const auto net = std::make_shared<Net>();
  Tasks layers;
  const auto layer = [&](Layer& to, const Kernels& kernels, const std::string& name, const auto& rows,
                         const std::vector<float>* gain, float bound) {
    layers.emplace_back([&to, &kernels, &rows, gain, bound, name, &weights, &optional_vector, this] {
      try {
        to = build_layer(kernels, weights.at(name + ".weight"), rows, optional_vector(name + ".bias"), gain, bound);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(name + ".weight: " + error.what());
      }
    });
  };
  layers.emplace_back([&] {
    Weights embedding = weights.at(kEmbedding);
    std::vector<float> extended;
    if (embedding_->rounds_pixels) {
      extended = with_column_means(embedding, g.channels, g.patch);
      embedding.columns = patch_inputs(g, true);
      embedding.fp32 = extended.data();
    }
    net->embed = build_layer(*embedding_, embedding, wide, nullptr, nullptr, 0.0f);
  });
  net->blocks.resize(config.depth);
  for (std::size_t i = 0; i < config.depth; ++i) {
    const std::string name = "blocks." + std::to_string(i) + ".";
    Block& block = net->blocks[i];
    block.norm1 = norm(name + "norm1");
    block.norm2 = norm(name + "norm2");
    layer(block.qkv, *kernels_, name + "attn.qkv", qkv_rows, &query_gain, bounds[i].qkv);
    layer(block.proj, *kernels_, name + "attn.proj", wide, optional_vector(name + "ls1.gamma"), bounds[i].proj);
    layer(block.fc1, *kernels_, name + "mlp.fc1", hidden, nullptr, bounds[i].fc1);
    layer(block.fc2, *kernels_, name + "mlp.fc2", wide, optional_vector(name + "ls2.gamma"), bounds[i].fc2);
  }
  const std::string head = kDenseHead;
  const auto fused = identity_rows(config.head ? config.head->width : 0),
             classes = identity_rows(config.head ? config.head->classes : 0);
  if (config.head) {
    layer(net->classifier, *embedding_, head + "classifier", classes, nullptr, 0.0f);
    if (config.head->fused) {
      net->projections.resize(config.head->taps.size());
      for (std::size_t k = 0; k < config.head->taps.size(); ++k) {
        net->tap_norms.push_back(norm(head + "norms." + std::to_string(k)));
        layer(net->projections[k], *embedding_, head + "projections." + std::to_string(k), fused, nullptr, 0.0f);
      }
      net->fuse_norm = norm(head + "norm");
      layer(net->fuse, *embedding_, head + "fuse", fused, nullptr, 0.0f);
    }
  }
  run_all(pool_, layers);
  net->positions = vectors.at("pos_embed");
  net->rows = config.rows(), net->columns = config.columns();
  net->patch_bias = vector_or_none("patch_embed.proj.bias");
  net->class_token = vector_or_none("cls_token");
  net->registers = vector_or_none("reg_token");
  if (config.pre_norm) net->norm_pre = norm("norm_pre");
  if (config.final_norm) net->norm = norm("norm");
  if (config.fc_norm) net->fc_norm = norm("fc_norm");
  if (config.num_classes) net->head_weight = vectors.at("head.weight"), net->head_bias = vectors.at("head.bias");
  net_ = net;
  set_up();
}

Vit::~Vit() = default;

}  // namespace sparsemae
