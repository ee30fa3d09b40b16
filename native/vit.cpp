// The forward. One image at a time: shared by all threads, step by step, or, where a batch has as many images as
// there are threads, by one thread each without any barrier (its activations stay in its own cache).
#include "vit.h"

#include <algorithm>
#include <cmath>

#include "vit_state.h"

namespace sparsemae {

constexpr std::size_t kTasksPerThread = 8;  // of a linear layer

struct Vit::Image {
  const State& in;  // of the step before; the same as out where nobody else could read it again
  State& out;
  Workspace& w;
  const float* pixels;
  float* result;
  bool features;
};

// A stage is a number of units, ordered by tokens or by heads. Each thread starts with its own part of them, the same
// part of the image in stage after stage, so that what it reads is mostly what it wrote, in its own cache. When it is
// done it helps the others, one of whom may be held up.
//
// Only attention looks at other tokens. Where the kernels have at least as many parts of tokens as there are threads,
// each thread takes its own parts from one attention to the next, and nobody waits or fetches what is in another core's
// cache.
struct Vit::Stages {
  Crew* crew;  // null: this thread has the image for itself
  std::size_t thread, rank = 0, stage = 0;
  enum { first, own, shared } before = first;  // the stage before: of whose tokens
  bool token_partitioned = false;
  std::size_t first_part = 0, last_part = 0, first_token = 0, last_token = 0;  // of this thread, if token_partitioned

  static Stages of(Crew& crew, std::size_t thread, const Kernels& kernels, const Geometry& g) {
    Stages s{&crew, thread, crew.rank(thread)};
    const std::size_t parts = kernels.token_parts(g);
    s.token_partitioned = parts >= crew.size;
    s.first_part = parts * s.rank / crew.size;
    s.last_part = parts * (s.rank + 1) / crew.size;
    s.first_token = kernels.part_begin(g, s.first_part);
    s.last_token = kernels.part_begin(g, s.last_part);
    return s;
  }

  // Whether the thread has anything to do in the stage that is next.
  bool begins(bool after_others) {
    if (stage++ < crew->first_stage) return false;
    if (after_others) crew->barrier(thread);
    crew->begin_stage(stage - 1);
    return !crew->left_behind();
  }
  template <class F>
  void run(std::size_t units, std::size_t chunk, const F& work) {
    if (!crew) return work(std::size_t{0}, units);
    if (!begins(before != Stages::first)) return;
    before = shared;
    for (std::size_t i = 0; i < crew->size; ++i) {
      const std::size_t owner = (rank + i) % crew->size, end = units * (owner + 1) / crew->size,
                        begin = units * owner / crew->size;
      auto& counter = crew->counter(owner, stage - 1);
      for (std::size_t at; !crew->left_behind() && (at = begin + counter.fetch_add(static_cast<std::uint32_t>(chunk),
                                                                                   std::memory_order_relaxed)) < end;)
        work(at, std::min(at + chunk, end));
    }
  }
  // What needs the thread's own tokens only.
  template <class F>
  void run_own(const F& work) {
    if (!begins(before == shared)) return;
    before = own;
    work();
  }
  // work(first, last) for all tokens.
  template <class F>
  void run_tokens(const Geometry& g, const F& work) {
    if (token_partitioned) return run_own([&] { work(first_token, last_token); });
    run(g.padded_tokens / kTokenUnit, 1,
        [&](std::size_t first, std::size_t last) { work(first * kTokenUnit, last * kTokenUnit); });
  }
  // In how many ranges of rows a layer is cut when its tokens are in so many parts: enough pieces to even out between
  // the threads.
  std::size_t ranges(std::size_t blocks, std::size_t parts) const {
    return std::min(blocks, (kTasksPerThread * crew->size + parts - 1) / parts);
  }
};

void Vit::reserve(std::size_t states, std::size_t spaces) {
  const Geometry& g = geometry_;
  // an int8 copy is at most as long as the activation itself, and has a scale per token
  const auto quantized = [&](std::size_t features) {
    return kernels_->quantize
               ? aligned_array<char>(kernels_->activation_bytes(features, g) + g.padded_tokens * sizeof(float))
               : Aligned<char>{};
  };
  while (states_.size() < states) {
    auto s = std::make_unique<State>();
    s->residual = aligned_array<float>(residual_size_);
    if (config_.head && config_.head->fused) s->fused = aligned_array<float>(residual_size(fused_));
    s->normed = aligned_array<char>(kernels_->activation_bytes(g.width, g));
    s->quantized = quantized(g.width);
    states_.push_back(std::move(s));
  }
  while (workspaces_.size() < spaces) {
    auto w = std::make_unique<Workspace>();
    w->patches = aligned_array<char>(embedding_->activation_bytes(patch_inputs(g, embedding_->rounds_pixels), g));
    w->attended = aligned_array<char>(kernels_->activation_bytes(g.width, g));
    w->hidden = aligned_array<char>(kernels_->activation_bytes(config_.mlp_hidden, g));
    w->quantized = quantized(g.width);
    w->quantized_hidden = quantized(config_.mlp_hidden);
    if (config_.head) {
      const std::size_t widest = std::max(g.width, fused_.width);
      w->head_input = aligned_array<char>(embedding_->activation_bytes(widest, g));
      w->head_hidden = aligned_array<char>(embedding_->activation_bytes(widest, g));
      w->logits = aligned_array<float>(residual_size(logits_));
    }
    w->pooled.resize(2 * g.width);
    w->result.resize(std::max(outputs(), g.tokens * g.width));
    workspaces_.push_back(std::move(w));
  }
}

struct Vit::Call {
  Vit* model;
  const float* images;
  float* out;
  std::size_t image_size, out_size, batch;
  bool features;
  std::atomic<std::size_t> next{0};

  // Images one by one.
  void take_images(std::size_t thread) {
    model->kernels_->thread_begin();
    State& state = *model->states_[thread];
    for (std::size_t i; (i = next.fetch_add(1)) < batch;) {
      Image image{state, state, *model->workspaces_[thread], images + i * image_size, out + i * out_size, features};
      Stages stages{};
      for (std::size_t step = 0; step < model->steps(); ++step)
        model->run_step(step, image, stages, model->scratch_[thread].get());
    }
    model->kernels_->thread_end();
  }
  // A step of the one image.
  void take_step(std::size_t thread, Crew& crew) const {
    model->kernels_->thread_begin();
    Workspace& w = *model->workspaces_[crew.space];
    Image image{*model->states_[crew.input], *model->states_[crew.output], w, images, w.result.data(), features};
    Stages stages = Stages::of(crew, thread, *model->kernels_, model->geometry_);
    model->run_step(crew.step, image, stages, model->scratch_[thread].get());
    model->kernels_->thread_end();
  }
};

void Vit::forward(const float* images, std::size_t batch, float* out, bool features) {
  const auto lock = pool_.acquire();
  const Geometry& g = geometry_;
  const std::size_t image_size = g.channels * g.image_height * g.image_width;
  const std::size_t out_size = features ? g.tokens * g.width : outputs();
  // A lone thread, or one image per thread: nothing is shared.
  const std::size_t per_image = batch - batch % threads();
  if (per_image) {
    reserve(threads(), threads());
    Call call{this, images, out, image_size, out_size, per_image, features};
    pool_.run([](void* context, std::size_t thread) { static_cast<Call*>(context)->take_images(thread); }, &call);
  }
  const Job job{
      [](const void* call, std::size_t thread, Crew& crew) { static_cast<const Call*>(call)->take_step(thread, crew); },
      [](const void* call, std::size_t states, std::size_t spaces) {
        static_cast<const Call*>(call)->model->reserve(states, spaces);
      },
      steps()};
  for (std::size_t i = per_image; i < batch; ++i) {
    const std::shared_ptr<const Call> call(
        new Call{this, images + i * image_size, nullptr, image_size, out_size, 1, features});
    const auto result = pool_.run_steps(job, call);
    std::copy_n(workspaces_[result.space]->result.data(), out_size, out + i * out_size);
  }
}

void Vit::parallel(std::size_t count, const std::function<void(std::size_t)>& work) {
  const auto lock = pool_.acquire();
  struct Context {
    std::size_t count;
    const std::function<void(std::size_t)>& work;
    std::atomic<std::size_t> next{0};
  } context{count, work};
  pool_.run(
      [](void* at, std::size_t) {
        auto& c = *static_cast<Context*>(at);
        for (std::size_t i; (i = c.next.fetch_add(1)) < c.count;) c.work(i);
      },
      &context);
}

void Vit::run_step(std::size_t step, Image& image, Stages& stages, void* scratch) const {
  const Geometry& g = geometry_;
  const bool scores = config_.head && !image.features;
  if (step == net_->blocks.size() + 1) return scores ? run_dense_head(image, stages, scratch) : run_head(image, stages);
  if (step == 0)
    run_embedding(image, stages, scratch);
  else
    run_block(net_->blocks[step - 1], image, stages, scratch);
  if (scores && config_.head->fused) run_tap(step, image, stages, scratch);
  if (step < net_->blocks.size()) return run_norm(net_->blocks[step].norm1, net_->blocks[step].qkv, image, stages);
  if (net_->norm && (image.features || config_.average_pool || (config_.all_tokens && !config_.head)))
    stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
      float* residual = image.out.residual.get();
      kernels_->norm_residual(g, residual, net_->norm->weight.data(), net_->norm->bias.data(), config_.norm_eps,
                              residual, first, last);
    });
}

void Vit::run_embedding(Image& image, Stages& stages, void* scratch) const {
  const Geometry& g = geometry_;
  const std::size_t token_units = g.padded_tokens / kTokenUnit;
  float* residual = image.out.residual.get();
  stages.run(token_units, 1, [&](std::size_t first, std::size_t last) {
    std::copy(base_.get() + residual_size_ * first / token_units, base_.get() + residual_size_ * last / token_units,
              residual + residual_size_ * first / token_units);
    for (std::size_t u = first; u < last; ++u)
      embedding_->patches(g, image.pixels, image.w.patches.get(), u * kTokenUnit);
  });
  run_linear(g, *embedding_, net_->embed, image.w.patches.get(), nullptr, Output::residual, residual, residual, stages,
             scratch);
  if (net_->norm_pre)
    stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
      kernels_->norm_residual(g, residual, net_->norm_pre->weight.data(), net_->norm_pre->bias.data(), config_.norm_eps,
                              residual, first, last);
    });
}

void Vit::run_norm(const Norm& norm, const Layer& next, Image& image, Stages& stages) const {
  stages.run_tokens(geometry_, [&](std::size_t first, std::size_t last) {
    State& s = image.out;
    kernels_->norm(geometry_, s.residual.get(), norm.weight.data(), norm.bias.data(), config_.norm_eps, s.normed.get(),
                   first, last);
    if (next.view.quantize)
      kernels_->quantize(geometry_, geometry_.width, s.normed.get(), s.quantized.get(), first, last);
  });
}

void Vit::run_linear(const Geometry& g, const Kernels& kernels, const Layer& layer, const void* input, void* quantized,
                     Output kind, const float* residual, void* output, Stages& stages, void* scratch) const {
  const std::size_t parts = kernels.token_parts(g), blocks = layer.view.rows / kRowBlock;
  const auto all_rows = [&](std::size_t first, std::size_t last) {
    linear_rounded(kernels, g, layer.view, input, quantized, kind, residual, output, first, last, scratch);
  };
  if (!stages.crew) return all_rows(0, parts);
  if (stages.token_partitioned && &kernels == kernels_)
    return stages.run_own([&] { all_rows(stages.first_part, stages.last_part); });
  if (quantized) {
    stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
      kernels.quantize(g, layer.view.columns, input, quantized, first, last);
    });
    input = quantized;
  }
  const std::size_t ranges = stages.ranges(blocks, parts);
  stages.run(parts * ranges, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t unit = first; unit < last; ++unit) {
      const std::size_t part = unit / ranges, range = unit % ranges;
      kernels.linear(g, layer.view, input, kind, residual, output, part, part + 1, blocks * range / ranges,
                     blocks * (range + 1) / ranges, scratch);
    }
  });
}

void Vit::run_block(const Block& block, Image& image, Stages& stages, void* scratch) const {
  const Geometry& g = geometry_;
  Workspace& w = image.w;
  State& out = image.out;
  const auto normed_for = [](const Layer& layer, const State& s) {
    return layer.view.quantize ? s.quantized.get() : s.normed.get();
  };
  const auto add_to_residual = [&](const Layer& layer, const Aligned<char>& input, const Aligned<char>& quantized,
                                   const State& from) {
    run_linear(g, *kernels_, layer, input.get(), layer.view.quantize ? quantized.get() : nullptr, Output::residual,
               from.residual.get(), out.residual.get(), stages, scratch);
  };
  const char* normed = normed_for(block.qkv, image.in);
  stages.run(g.heads, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t head = first; head < last; ++head) {
      kernels_->project_head(g, block.qkv.view, normed, head, scratch);
      kernels_->attend_head(g, w.attended.get(), head, scratch);
    }
  });
  add_to_residual(block.proj, w.attended, w.quantized, image.in);
  run_norm(block.norm2, block.fc1, image, stages);
  run_linear(g, *kernels_, block.fc1, normed_for(block.fc1, out), nullptr, Output::gelu, nullptr, w.hidden.get(),
             stages, scratch);
  add_to_residual(block.fc2, w.hidden, w.quantized_hidden, out);
}

// What the head reads of a step's tokens is added to the sum that the step before has left.
void Vit::run_tap(std::size_t step, Image& image, Stages& stages, void* scratch) const {
  const auto& taps = config_.head->taps;
  const auto found = std::find(taps.begin(), taps.end(), step - 1);
  const std::size_t units = fused_.padded_tokens / kTokenUnit, unit = residual_size(fused_) / units;
  float* sum = image.out.fused.get();
  const float* before = image.in.fused.get();
  if (step == 0 || found == taps.end()) {
    if (step && before == sum) return;
    return stages.run(units, 1, [&](std::size_t first, std::size_t last) {
      if (step)
        std::copy(before + first * unit, before + last * unit, sum + first * unit);
      else
        std::fill(sum + first * unit, sum + last * unit, 0.0f);
    });
  }
  const auto k = static_cast<std::size_t>(found - taps.begin());
  const Norm& norm = net_->tap_norms[k];
  stages.run_tokens(geometry_, [&](std::size_t first, std::size_t last) {
    embedding_->norm(geometry_, image.out.residual.get(), norm.weight.data(), norm.bias.data(), config_.norm_eps,
                     image.w.head_input.get(), first, last);
  });
  run_linear(fused_, *embedding_, net_->projections[k], image.w.head_input.get(), nullptr, Output::residual, before,
             sum, stages, scratch);
}

void Vit::run_dense_head(Image& image, Stages& stages, void* scratch) const {
  const bool fused = config_.head->fused;
  const Geometry& g = fused ? fused_ : geometry_;
  const Norm& norm = fused ? *net_->fuse_norm : *net_->norm;
  Workspace& w = image.w;
  float* logits = w.logits.get();
  const std::size_t units = g.padded_tokens / kTokenUnit, unit = residual_size(logits_) / units;
  stages.run(units, 1, [&](std::size_t first, std::size_t last) {
    std::fill(logits + first * unit, logits + last * unit, 0.0f);
  });
  stages.run_tokens(g, [&](std::size_t first, std::size_t last) {
    const float* from = fused ? image.in.fused.get() : image.in.residual.get();
    embedding_->norm(g, from, norm.weight.data(), norm.bias.data(), config_.norm_eps, w.head_input.get(), first, last);
  });
  if (fused)
    run_linear(g, *embedding_, net_->fuse, w.head_input.get(), nullptr, Output::gelu, nullptr, w.head_hidden.get(),
               stages, scratch);
  run_linear(logits_, *embedding_, net_->classifier, (fused ? w.head_hidden : w.head_input).get(), nullptr,
             Output::residual, logits, logits, stages, scratch);
  stages.run(g.tokens, kTokenUnit, [&](std::size_t first, std::size_t last) {
    const std::size_t classes = config_.head->classes;
    for (std::size_t t = std::max(first, g.prefix); t < last; ++t)
      for (std::size_t c = 0; c < classes; ++c)
        image.result[(t - g.prefix) * classes + c] = logits[residual_index(*kernels_, logits_, t, c)];
  });
}

void Vit::run_head(Image& image, Stages& stages) const {
  const Geometry& g = geometry_;
  const bool features = image.features;
  const float* residual = image.in.residual.get();
  float* out = image.result;
  if (net_->norm && !features && !config_.average_pool && !config_.all_tokens) {  // else the last block has done it
    stages.run(1, 1, [&](std::size_t, std::size_t) {
      kernels_->norm_residual(g, residual, net_->norm->weight.data(), net_->norm->bias.data(), config_.norm_eps,
                              image.out.residual.get(), 0, kTokenUnit);
    });
    residual = image.out.residual.get();
  }
  const auto at = [&](std::size_t token, std::size_t d) { return residual[residual_index(*kernels_, g, token, d)]; };
  if (features) {
    stages.run(g.tokens, kTokenUnit, [&](std::size_t first, std::size_t last) {
      for (std::size_t t = first; t < last; ++t)
        for (std::size_t d = 0; d < g.width; ++d) out[t * g.width + d] = at(t, d);
    });
    return;
  }
  float *pooled = image.w.pooled.data(), *input = net_->fc_norm ? pooled + g.width : pooled;
  if (!config_.num_classes && !net_->fc_norm) input = pooled;
  stages.run(1, 1, [&](std::size_t, std::size_t) {
    const std::size_t first = config_.average_pool && !config_.pool_include_prefix ? g.prefix : 0;
    const std::size_t last = config_.average_pool ? g.tokens : 1;
    std::fill_n(pooled, g.width, 0.0f);
    for (std::size_t unit = first / kTokenUnit * kTokenUnit; unit < last; unit += kTokenUnit)
      for (std::size_t d = 0; d < g.width; ++d)
        for (std::size_t t = std::max(unit, first); t < std::min(unit + kTokenUnit, last); ++t) pooled[d] += at(t, d);
    for (std::size_t d = 0; d < g.width; ++d) pooled[d] /= static_cast<float>(last - first);
    if (net_->fc_norm) {
      double mean = 0.0, variance = 0.0;
      for (std::size_t d = 0; d < g.width; ++d) mean += pooled[d];
      mean /= static_cast<double>(g.width);
      for (std::size_t d = 0; d < g.width; ++d) variance += (pooled[d] - mean) * (pooled[d] - mean);
      const double scale = 1.0 / std::sqrt(variance / static_cast<double>(g.width) + config_.norm_eps);
      for (std::size_t d = 0; d < g.width; ++d)
        input[d] = static_cast<float>((pooled[d] - mean) * scale) * net_->fc_norm->weight[d] + net_->fc_norm->bias[d];
    }
    if (!config_.num_classes) std::copy(input, input + g.width, out);
  });
  if (config_.num_classes)
    stages.run(config_.num_classes, 64, [&](std::size_t first, std::size_t last) {
      kernels_->dense_rows(net_->head_weight.data(), net_->head_bias.data(), input, g.width, out, first, last);
    });
}

}  // namespace sparsemae
