// include/sparsemae.h over the forward, for C and whatever calls it, and for WebAssembly pages.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench.h"
#include "codes.h"
#include "dispatch.h"
#include "masks.h"
#include "packed_file.h"
#include "processor.h"
#include "sparsemae.h"
#include "vit.h"

#if defined(__wasm__)
#include <cstdlib>
#define EXPORT(name) __attribute__((export_name(#name)))
#else
#include <cerrno>
#include <cstdio>
#include <thread>
#define EXPORT(name)
#endif

using namespace sparsemae;

namespace {

// In a network with narrower int8 layers inputs stay as they are: rounding takes most from its logits, saves least.
constexpr std::size_t kLeastRounded = 192;

bool is_wide(const PackedFile& file) {
  return std::all_of(file.weights.begin(), file.weights.end(),
                     [](const auto& entry) { return !entry.second.quantize || entry.second.columns >= kLeastRounded; });
}

thread_local char last_error[256];
#if !defined(__wasm__)
thread_local std::vector<KernelTiming> timings;
#endif

void remember(const char* what) { std::strncpy(last_error, what, sizeof last_error - 1); }

// What `call` gives; what it throws is remembered, and `failed` given.
template <class Result, class Call>
Result guarded(Result failed, const Call& call) {
#if defined(__wasm__)
  return call();  // its C++ library has no exceptions
#else
  try {
    return call();
  } catch (const std::bad_alloc&) {
    remember("out of memory");
  } catch (const std::exception& error) {
    remember(error.what());
  } catch (...) {
    remember("unknown error");
  }
  return failed;
#endif
}

bool is_image(std::uint32_t width, std::uint32_t height, std::uint32_t channels) {
  const bool is = width && height && (channels == 1 || channels == 3 || channels == 4);
  if (!is) remember("wanted an image of at least one pixel and 1, 3 or 4 channels");
  return is;
}

std::size_t default_threads(const VitConfig& c) {
#if defined(__wasm__)
  return 1;
#else
  const std::size_t tokens = (c.image_height / c.patch_size) * (c.image_width / c.patch_size) + c.reg_tokens + 1;
  return std::clamp<std::size_t>((tokens + 15) / 16, 1, std::max(1u, std::thread::hardware_concurrency()));
#endif
}

}  // namespace

struct sparsemae_model {
  sparsemae_model(PackedFile&& file, std::size_t threads, const char* isa)
      : vit(file.vit, file.weights, file.vectors, threads ? threads : default_threads(file.vit), isa ? isa : ""),
        preprocess(std::move(file.preprocess)),
        class_names(std::move(file.class_names)),
        config(std::move(file.config)) {
    const VitConfig& c = vit.config();
    for (const std::string& name : class_names) names.push_back(name.c_str());
#if !defined(__wasm__)
    if (file.inference) segmenter.emplace(vit, preprocess, std::move(*file.inference));
#endif
    const std::size_t outputs = c.all_tokens && !c.head ? vit.tokens() * c.embed_dim : vit.outputs();
    description = {static_cast<std::uint32_t>(c.in_chans),
                   static_cast<std::uint32_t>(c.image_height),
                   static_cast<std::uint32_t>(c.image_width),
                   static_cast<std::uint32_t>(c.head ? c.head->classes : c.num_classes),
                   static_cast<std::uint32_t>(outputs),
                   static_cast<std::uint32_t>(vit.threads()),
                   vit.kernels().name,
                   names.empty() ? nullptr : names.data(),
                   config.c_str(),
                   static_cast<std::uint32_t>(c.head ? c.rows() : 0),
                   static_cast<std::uint32_t>(c.head ? c.columns() : 0)};
  }

  Vit vit;
  Preprocess preprocess;
  std::optional<Segmenter> segmenter;
  std::vector<std::string> class_names;
  std::string config;
  std::vector<const char*> names;
  sparsemae_description description;
};

extern "C" {

#if !defined(__wasm__)
struct sparsemae_kernel_timing {
  const char *kernel, *instructions;
  double seconds, peak;
  int zeros;
};
SPARSEMAE_API
#endif
// quantize: whether the inputs of int8 layers are rounded; negative: where the network is wide.
sparsemae_model* sparsemae_open_as(const void* bytes, size_t size, uint32_t threads, const char* isa, int quantize) {
  return guarded<sparsemae_model*>(nullptr, [&]() -> sparsemae_model* {
    const auto* at = static_cast<const std::uint8_t*>(bytes);
    std::vector<std::uint64_t> copy;
    if (reinterpret_cast<std::uintptr_t>(bytes) % 8) {
      copy.resize((size + 7) / 8);
      std::memcpy(copy.data(), bytes, size);
      at = reinterpret_cast<const std::uint8_t*>(copy.data());
    }
    PackedFile file;
    const std::string wrong = read_packed(at, size, file);
    const bool rounded = quantize < 0 ? is_wide(file) : quantize;
    for (auto& [name, weights] : file.weights) weights.quantize = weights.quantize && rounded;
    if (wrong.empty() && threads <= 1024) return new sparsemae_model(std::move(file), threads, isa);
    remember((wrong.empty() ? "threads: wanted at most 1024"
                            : "wanted a packed model, got one that cannot be used: " + wrong)
                 .c_str());
    return nullptr;
  });
}

EXPORT(sparsemae_open_memory)
sparsemae_model* sparsemae_open_memory(const void* bytes, size_t size, uint32_t threads, const char* isa) {
  return sparsemae_open_as(bytes, size, threads, isa, -1);
}

#if !defined(__wasm__)
sparsemae_model* sparsemae_open(const char* path, uint32_t threads, const char* isa) {
  return guarded<sparsemae_model*>(nullptr, [&]() -> sparsemae_model* {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    std::vector<std::uint64_t> bytes;  // aligned
    std::size_t size = 0;
    while (file && !std::ferror(file.get())) {
      bytes.resize(std::max<std::size_t>(1 << 16, bytes.size() * 2));
      const std::size_t room = bytes.size() * 8 - size;
      const std::size_t got = std::fread(reinterpret_cast<char*>(bytes.data()) + size, 1, room, file.get());
      size += got;
      const bool packed = reinterpret_cast<const char*>(bytes.data())[8] == '{';  // or a device may have no end
      if (got < room || !packed) break;
    }
    if (file && !std::ferror(file.get())) return sparsemae_open_memory(bytes.data(), size, threads, isa);
    remember(std::strerror(errno));
    return nullptr;
  });
}
#endif

EXPORT(sparsemae_describe) const sparsemae_description* sparsemae_describe(const sparsemae_model* m) {
  return &m->description;
}

EXPORT(sparsemae_prepare)
int sparsemae_prepare(const sparsemae_model* m, const uint8_t* pixels, uint32_t width, uint32_t height,
                      uint32_t channels, float* out) {
  return guarded(1, [&] {
    if (!is_image(width, height, channels)) return 1;
    if (m->segmenter) return remember("wanted a classifier or an encoder: a segmenter's windows are its own"), 1;
    const VitConfig& c = m->vit.config();
    if (c.in_chans != 3) {
      remember("wanted a model of 3 channels to prepare an image for, got one of another number");
      return 1;
    }
    prepare(m->preprocess, pixels, width, height, channels, c.image_width, c.image_height, out);
    return 0;
  });
}

EXPORT(sparsemae_forward)
int sparsemae_forward(sparsemae_model* m, const float* images, size_t batch, float* out) {
  return guarded(1, [&] {
    m->vit.forward(images, batch, out, m->vit.config().all_tokens && !m->segmenter);
    return 0;
  });
}

#if !defined(__wasm__)
int sparsemae_segment(sparsemae_model* m, const uint8_t* pixels, uint32_t width, uint32_t height, uint32_t channels,
                      uint8_t* out) {
  return guarded(1, [&] {
    if (!m->segmenter) return remember("wanted a segmenter, got another model"), 1;
    if (!is_image(width, height, channels)) return 1;
    m->segmenter->classes(pixels, width, height, channels, out);
    return 0;
  });
}

// What sparsemae/runtime/native.py calls beside the header: no promise to others.
SPARSEMAE_API int sparsemae_features(sparsemae_model* m, const float* images, size_t batch, float* out) {
  return guarded(1, [&] {
    m->vit.forward(images, batch, out, true);
    return 0;
  });
}

// Of a segmenter, out [batch][rows][columns][classes]; the images' sides are whole patches.
SPARSEMAE_API int sparsemae_scores(sparsemae_model* m, const float* images, size_t batch, size_t height, size_t width,
                                   float* out) {
  return guarded(1, [&] {
    if (!m->segmenter) return remember("wanted a segmenter, got another model"), 1;
    m->segmenter->scores(images, batch, height, width, out);
    return 0;
  });
}

// Tokens and embed_dim of its features, and whether they are its output.
SPARSEMAE_API void sparsemae_features_shape(const sparsemae_model* m, uint32_t* shape) {
  const VitConfig& c = m->vit.config();
  shape[0] = static_cast<uint32_t>(m->vit.tokens()), shape[1] = static_cast<uint32_t>(c.embed_dim);
  shape[2] = c.all_tokens && !c.head;
}

SPARSEMAE_API const char* sparsemae_math(const sparsemae_model* m) { return m->vit.kernels().math; }

SPARSEMAE_API const char* sparsemae_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* table : usable_kernels()) joined += (joined.empty() ? "" : " ") + std::string(table->name);
    return joined;
  }();
  return names.c_str();
}

SPARSEMAE_API const char* sparsemae_processor(void) {
  static const std::string line = [] {
    std::string joined = this_processor().name() + "\n";
    for (const std::string& feature : this_processor().features()) joined += feature + " ";
    return joined;
  }();
  return line.c_str();
}

// Times of the kernels into `out`, as many as there is room for; their number, or -1. The strings live until the next.
SPARSEMAE_API int sparsemae_time_kernels(sparsemae_model* m, size_t rounds, sparsemae_kernel_timing* out, int room) {
  return guarded(-1, [&] {
    timings = time_kernels(m->vit, rounds);
    int count = 0;
    for (const KernelTiming& t : timings)
      if (count < room) out[count++] = {t.kernel.c_str(), t.instructions.c_str(), t.seconds, t.peak, t.zeros};
    return count;
  });
}

// Of a training step: masks.h.
SPARSEMAE_API int sparsemae_select_kept(const float* weights, size_t groups, size_t m, size_t n, size_t threads,
                                        uint8_t* mask, uint16_t* kept) {
  return guarded(1, [&] { return select_kept(weights, groups, m, n, threads, mask, kept), 0; });
}

SPARSEMAE_API int sparsemae_kept_bf16(const float* weights, const uint8_t* mask, size_t count, size_t threads,
                                      uint16_t* out) {
  return guarded(1, [&] { return kept_bf16(weights, mask, count, threads, out), 0; });
}

SPARSEMAE_API int sparsemae_pull_pruned(float* gradients, const float* weights, const uint8_t* mask, size_t count,
                                        float strength, size_t threads) {
  return guarded(1, [&] { return pull_pruned(gradients, weights, mask, count, strength, threads), 0; });
}

SPARSEMAE_API int sparsemae_decode_positions(const uint8_t* codes, size_t size, size_t groups, unsigned n, unsigned k,
                                             uint8_t* out) {
  return guarded(1, [&] {
    const auto positions = decode_positions(codes, size, groups, n, k);
    std::copy(positions.begin(), positions.end(), out);
    return 0;
  });
}
#endif

EXPORT(sparsemae_close) void sparsemae_close(sparsemae_model* m) { delete m; }
EXPORT(sparsemae_error) const char* sparsemae_error(void) { return last_error; }

#if defined(__wasm__)
EXPORT(sparsemae_alloc) void* sparsemae_alloc(size_t bytes) { return std::malloc(bytes); }
EXPORT(sparsemae_free) void sparsemae_free(void* memory) { std::free(memory); }

// The C++ library here has no exceptions: what is thrown leaves its message and ends the module.
void* __cxa_allocate_exception(size_t bytes) { return std::malloc(bytes); }
void __cxa_free_exception(void*) {}
[[noreturn]] void __cxa_throw(void* error, void*, void (*)(void*)) {
  remember(static_cast<std::exception*>(error)->what());
  __builtin_trap();
}
#endif

}  // extern "C"

#if defined(__wasm__)
// What the C++ library would print when it ends brings 16 KB along, and nobody reads it.
[[noreturn]] void std::__libcpp_verbose_abort(const char*, ...) noexcept { __builtin_trap(); }
#endif
