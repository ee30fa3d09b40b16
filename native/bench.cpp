#include "bench.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>
#include <optional>

#include "vit_state.h"

namespace sparsemae {
namespace {

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::vector<KernelTiming> time_kernels(Vit& model, std::size_t rounds) {
  const Geometry& g = model.geometry_;
  const Kernels& kernels = *model.kernels_;
  const Vit::Block& block = model.net_->blocks.at(0);
  std::vector<float> image(g.channels * g.image_height * g.image_width), out(g.tokens * g.width);
  model.forward(image.data(), 1, out.data(), true);  // activations that are not all zero
  const auto lock = model.pool_.acquire();
  model.reserve(1, 1);
  Vit::State& state = *model.states_[0];
  Vit::Workspace& w = *model.workspaces_[0];
  void* scratch = model.scratch_[0].get();

  const auto normed_for = [&](const Vit::Layer& layer) {
    return layer.view.quantize ? state.quantized.get() : state.normed.get();
  };
  const auto linear = [&](const Vit::Layer& layer, const void* input, void* quantized, Output kind, void* output) {
    linear_rounded(kernels, g, layer.view, input, layer.view.quantize ? quantized : nullptr, kind, state.residual.get(),
                   output, 0, kernels.token_parts(g), scratch);
  };
  const auto norm = [&] {
    kernels.norm(g, state.residual.get(), block.norm1.weight.data(), block.norm1.bias.data(), model.config_.norm_eps,
                 state.normed.get(), 0, g.padded_tokens);
    if (block.qkv.view.quantize)
      kernels.quantize(g, g.width, state.normed.get(), state.quantized.get(), 0, g.padded_tokens);
  };
  const auto qkv = [&] {
    for (std::size_t head = 0; head < g.heads; ++head)
      kernels.project_head(g, block.qkv.view, normed_for(block.qkv), head, scratch);
  };
  const auto attention = [&] {
    for (std::size_t head = 0; head < g.heads; ++head) kernels.attend_head(g, w.attended.get(), head, scratch);
  };
  const auto proj = [&] {
    linear(block.proj, w.attended.get(), w.quantized.get(), Output::residual, state.residual.get());
  };
  const auto fc1 = [&] { linear(block.fc1, normed_for(block.fc1), nullptr, Output::gelu, w.hidden.get()); };
  const auto fc2 = [&] {
    linear(block.fc2, w.hidden.get(), w.quantized_hidden.get(), Output::residual, state.residual.get());
  };
  struct Subject {
    const char* kernel;
    std::optional<Product> product;
    std::function<void()> run;
  };
  const auto product_of = [](const Vit::Layer& layer) { return layer.view.quantize ? Product::int8 : Product::sparse; };
  const Subject subjects[] = {
      {"norm", std::nullopt, norm},
      {"qkv", product_of(block.qkv), qkv},
      {"attention", Product::dense, attention},
      {"proj", product_of(block.proj), proj},
      {"fc1", product_of(block.fc1), fc1},
      {"fc2", product_of(block.fc2), fc2},
  };

  std::vector<KernelTiming> timings;
  for (const Subject& subject : subjects) {
    timings.emplace_back().kernel = subject.kernel;
    timings.back().seconds = std::numeric_limits<double>::infinity();
  }
  constexpr std::size_t kPeakRounds = 10000;
  kernels.thread_begin();
  for (std::size_t i = 0; i < rounds; ++i)
    for (std::size_t s = 0; s < timings.size(); ++s) {
      KernelTiming& timing = timings[s];
      timing.seconds = std::min(timing.seconds, seconds_of(subjects[s].run));
      if (!subjects[s].product) continue;
      alignas(64) float sink[16] = {};
      Peak peak{};
      const double seconds = seconds_of([&] { peak = kernels.peak(*subjects[s].product, kPeakRounds, sink); });
      timing.instructions = peak.instructions;
      timing.peak = std::max(timing.peak, static_cast<double>(peak.multiply_adds) / seconds);
      timing.zeros = peak.zeros;
    }
  kernels.thread_end();
  return timings;
}

}  // namespace sparsemae
