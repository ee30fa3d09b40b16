// The forward. One image at a time: shared by all threads, stage by stage, or, where a batch has as many images as
// there are threads, by one thread each without any barrier (its activations stay in its own cache).
#include "vit.h"

#include <algorithm>
#include <cmath>

#include "vit_state.h"

namespace sparsemae {

constexpr std::size_t kTasksPerThread = 8;  // of a linear layer

// A stage is a number of units, ordered by tokens or by heads. Each thread starts with its own part of them, the same
// part of the image in stage after stage, so that what it reads is mostly what it wrote, in its own cache. When it is
// done it helps the others, one of whom may be held up.
//
// Only attention looks at other tokens. Where the kernels have at least as many parts of tokens as there are threads,
// each thread takes its own parts from one attention to the next, and nobody waits or fetches what is in another core's
// cache.
struct Vit::Stages {
  ThreadPool* pool;                      // null: this thread has the image for itself
  std::atomic<std::uint32_t>* counters;  // [threads][stages]
  std::size_t count, thread, stage = 0;
  bool token_partitioned = false;
  std::size_t first_part = 0, last_part = 0, first_token = 0, last_token = 0;  // of this thread, if token_partitioned

  template <class F>
  void run(std::size_t units, std::size_t chunk, const F& work) {
    if (!pool) return work(std::size_t{0}, units);
    const std::size_t threads = pool->size();
    for (std::size_t i = 0; i < threads; ++i) {
      const std::size_t owner = (thread + i) % threads, end = units * (owner + 1) / threads,
                        begin = units * owner / threads;
      auto& counter = counters[owner * count + stage];
      for (std::size_t first;
           (first = begin + counter.fetch_add(static_cast<std::uint32_t>(chunk), std::memory_order_relaxed)) < end;)
        work(first, std::min(first + chunk, end));
    }
    ++stage;
    pool->barrier();
  }
  // work(first, last) for all tokens.
  template <class F>
  void run_tokens(const Geometry& g, const F& work) {
    if (token_partitioned) return work(first_token, last_token);
    run(g.padded_tokens / kTokenUnit, 1,
        [&](std::size_t first, std::size_t last) { work(first * kTokenUnit, last * kTokenUnit); });
  }
  // Before a stage that reads what other threads have written.
  void barrier() {
    if (token_partitioned) pool->barrier();
  }
  // In how many ranges of rows a layer is cut when its tokens are in so many parts: enough pieces to even out between
  // the threads.
  std::size_t ranges(std::size_t blocks, std::size_t parts) const {
    return std::min(blocks, (kTasksPerThread * pool->size() + parts - 1) / parts);
  }
};

Vit::Workspace& Vit::workspace(std::size_t index) {
  while (workspaces_.size() <= index) {
    const Geometry& g = geometry_;
    auto w = std::make_unique<Workspace>();
    w->residual = aligned_array<float>(residual_size_);
    w->patches = aligned_array<char>(kernels_->activation_bytes(g.channels * g.patch * g.patch, g));
    w->normed = aligned_array<char>(kernels_->activation_bytes(g.width, g));
    w->attended = aligned_array<char>(kernels_->activation_bytes(g.width, g));
    w->hidden = aligned_array<char>(kernels_->activation_bytes(config_.mlp_hidden, g));
    if (kernels_->quantize) {
      // an int8 copy is at most as long as the activation itself, and has a scale per token
      const auto quantized_bytes = [&](std::size_t features) {
        return kernels_->activation_bytes(features, g) + g.padded_tokens * sizeof(float);
      };
      w->quantized = aligned_array<char>(quantized_bytes(g.width));
      w->quantized_hidden = aligned_array<char>(quantized_bytes(config_.mlp_hidden));
    }
    w->pooled.resize(2 * g.width);
    workspaces_.push_back(std::move(w));
  }
  return *workspaces_[index];
}

void Vit::forward(const float* images, std::size_t batch, float* out, bool features) {
  const auto lock = pool_.acquire();
  const Geometry& g = geometry_;
  const std::size_t image_size = g.channels * g.image_height * g.image_width;
  const std::size_t out_size = features ? g.tokens * g.width : outputs();
  struct Call {
    Vit* model;
    const float* images;
    float* out;
    std::size_t image_size, out_size, batch, per_image;
    bool features;
    std::atomic<std::size_t> next{0};
  } call{this, images, out, image_size, out_size, batch, threads() > 1 ? batch - batch % threads() : batch, features};
  // A lone thread, or one image per thread: nothing is shared.
  for (std::size_t t = 0; t < (call.per_image ? threads() : 1); ++t) workspace(t);
  const auto per_image = [](void* context, std::size_t thread) {
    auto& c = *static_cast<Call*>(context);
    c.model->kernels_->thread_begin();
    for (std::size_t i; (i = c.next.fetch_add(1)) < c.per_image;) {
      Stages stages{};
      c.model->forward_image(*c.model->workspaces_[thread], stages, c.images + i * c.image_size, c.out + i * c.out_size,
                             c.features, c.model->scratch_[thread].get());
    }
    c.model->kernels_->thread_end();
  };
  const auto shared = [](void* context, std::size_t thread) {
    auto& c = *static_cast<Call*>(context);
    c.model->kernels_->thread_begin();
    const Geometry& g = c.model->geometry_;
    const Kernels& kernels = *c.model->kernels_;
    const std::size_t parts = kernels.token_parts(g), threads = c.model->threads();
    Stages stages{&c.model->pool_, c.model->counters_.data(), c.model->counters_.size() / threads, thread};
    stages.token_partitioned = threads > 1 && parts >= threads;
    stages.first_part = parts * thread / threads;
    stages.last_part = parts * (thread + 1) / threads;
    stages.first_token = kernels.part_begin(g, stages.first_part);
    stages.last_token = kernels.part_begin(g, stages.last_part);
    c.model->forward_image(*c.model->workspaces_[0], stages, c.images, c.out, c.features,
                           c.model->scratch_[thread].get());
    c.model->kernels_->thread_end();
  };
  if (call.per_image) pool_.run(per_image, &call);
  for (std::size_t i = call.per_image; i < batch; ++i) {
    for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
    call.images = images + i * image_size;
    call.out = out + i * out_size;
    pool_.run(shared, &call);
  }
}

void Vit::forward_image(Workspace& w, Stages& stages, const float* image, float* out, bool features,
                        void* scratch) const {
  const Geometry& g = geometry_;
  const std::size_t token_units = g.padded_tokens / kTokenUnit;
  stages.run(token_units, 1, [&](std::size_t first, std::size_t last) {
    std::copy(base_.get() + residual_size_ * first / token_units, base_.get() + residual_size_ * last / token_units,
              w.residual.get() + residual_size_ * first / token_units);
    for (std::size_t u = first; u < last; ++u) embedding_->patches(g, image, w.patches.get(), u * kTokenUnit);
  });
  run_linear(stages, *embedding_, embed_, w.patches.get(), Output::residual, w.residual.get(), scratch);
  if (norm_pre_)
    stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
      kernels_->norm_residual(g, w.residual.get(), norm_pre_->weight.data(), norm_pre_->bias.data(), config_.norm_eps,
                              w.residual.get(), first, last);
    });
  for (const Block& block : blocks_) forward_block(w, stages, block, scratch);
  run_head(w, stages, out, features);
}

void Vit::run_linear(Stages& stages, const Kernels& kernels, const Layer& layer, const void* input, Output kind,
                     void* output, void* scratch) const {
  const Geometry& g = geometry_;
  const std::size_t parts = kernels.token_parts(g), blocks = layer.view.rows / kRowBlock;
  const auto multiply = [&](std::size_t first_part, std::size_t last_part, std::size_t first, std::size_t last) {
    kernels.linear(g, layer.view, input, kind, output, first_part, last_part, first, last, scratch);
  };
  if (!stages.pool) return multiply(0, parts, 0, blocks);
  if (stages.token_partitioned && &kernels == kernels_) return multiply(stages.first_part, stages.last_part, 0, blocks);
  const std::size_t ranges = stages.ranges(blocks, parts);
  stages.run(parts * ranges, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t unit = first; unit < last; ++unit) {
      const std::size_t part = unit / ranges, range = unit % ranges;
      multiply(part, part + 1, blocks * range / ranges, blocks * (range + 1) / ranges);
    }
  });
}

void Vit::forward_block(Workspace& w, Stages& stages, const Block& block, void* scratch) const {
  const Geometry& g = geometry_;
  const auto norm = [&](const Norm& n, const Layer& next) {
    stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
      kernels_->norm(g, w.residual.get(), n.weight.data(), n.bias.data(), config_.norm_eps, w.normed.get(), first,
                     last);
      if (next.view.quantize) kernels_->quantize(g, g.width, w.normed.get(), w.quantized.get(), first, last);
    });
    return next.view.quantize ? w.quantized.get() : w.normed.get();
  };
  const auto quantized = [&](const Layer& next, const Aligned<char>& activation, const Aligned<char>& copy) {
    if (!next.view.quantize) return activation.get();
    stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
      kernels_->quantize(g, next.view.columns, activation.get(), copy.get(), first, last);
    });
    return copy.get();
  };
  const auto linear = [&](const Layer& layer, const void* input, Output kind, void* output) {
    run_linear(stages, *kernels_, layer, input, kind, output, scratch);
  };
  const char* normed = norm(block.norm1, block.qkv);
  stages.barrier();
  stages.run(g.heads, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t head = first; head < last; ++head) {
      kernels_->project_head(g, block.qkv.view, normed, head, scratch);
      kernels_->attend_head(g, w.attended.get(), head, scratch);
    }
  });
  linear(block.proj, quantized(block.proj, w.attended, w.quantized), Output::residual, w.residual.get());
  linear(block.fc1, norm(block.norm2, block.fc1), Output::gelu, w.hidden.get());
  linear(block.fc2, quantized(block.fc2, w.hidden, w.quantized_hidden), Output::residual, w.residual.get());
}

void Vit::run_head(Workspace& w, Stages& stages, float* out, bool features) const {
  const Geometry& g = geometry_;
  const auto at = [&](std::size_t token, std::size_t d) { return w.residual[residual_index(*kernels_, g, token, d)]; };
  if (norm_) {
    const bool all = features || config_.average_pool || config_.all_tokens;
    const auto normalize = [&](std::size_t first, std::size_t last) {
      kernels_->norm_residual(g, w.residual.get(), norm_->weight.data(), norm_->bias.data(), config_.norm_eps,
                              w.residual.get(), first, last);
    };
    if (all) stages.run_tokens(g, normalize);
    stages.barrier();
    if (!all) stages.run(1, 1, [&](std::size_t, std::size_t) { normalize(0, kTokenUnit); });
  } else {
    stages.barrier();
  }
  if (features) {
    stages.run(g.tokens, kTokenUnit, [&](std::size_t first, std::size_t last) {
      for (std::size_t t = first; t < last; ++t)
        for (std::size_t d = 0; d < g.width; ++d) out[t * g.width + d] = at(t, d);
    });
    return;
  }
  float *pooled = w.pooled.data(), *input = fc_norm_ ? pooled + g.width : pooled;
  if (!config_.num_classes && !fc_norm_) input = pooled;
  stages.run(1, 1, [&](std::size_t, std::size_t) {
    const std::size_t first = config_.average_pool && !config_.pool_include_prefix ? g.prefix : 0;
    const std::size_t last = config_.average_pool ? g.tokens : 1;
    std::fill_n(pooled, g.width, 0.0f);
    for (std::size_t unit = first / kTokenUnit * kTokenUnit; unit < last; unit += kTokenUnit)
      for (std::size_t d = 0; d < g.width; ++d)
        for (std::size_t t = std::max(unit, first); t < std::min(unit + kTokenUnit, last); ++t) pooled[d] += at(t, d);
    for (std::size_t d = 0; d < g.width; ++d) pooled[d] /= static_cast<float>(last - first);
    if (fc_norm_) {
      double mean = 0.0, variance = 0.0;
      for (std::size_t d = 0; d < g.width; ++d) mean += pooled[d];
      mean /= static_cast<double>(g.width);
      for (std::size_t d = 0; d < g.width; ++d) variance += (pooled[d] - mean) * (pooled[d] - mean);
      const double scale = 1.0 / std::sqrt(variance / static_cast<double>(g.width) + config_.norm_eps);
      for (std::size_t d = 0; d < g.width; ++d)
        input[d] = static_cast<float>((pooled[d] - mean) * scale) * fc_norm_->weight[d] + fc_norm_->bias[d];
    }
    if (!config_.num_classes) std::copy(input, input + g.width, out);
  });
  if (config_.num_classes)
    stages.run(config_.num_classes, 64, [&](std::size_t first, std::size_t last) {
      kernels_->dense_rows(head_weight_.data(), head_bias_.data(), input, g.width, out, first, last);
    });
}

}  // namespace sparsemae
