#include "c_api.h"

#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "vit.h"

#if defined(__wasm__)
#include <cstdlib>
#define EXPORT(name) __attribute__((export_name(#name)))
#else
#define EXPORT(name)
#endif

using namespace sparsemae;

namespace {

thread_local char last_error[256];

void remember(const std::exception& error) { std::strncpy(last_error, error.what(), sizeof last_error - 1); }

}  // namespace

struct sparsemae_builder {
  VitConfig config{};
  std::map<std::string, Weights> weights;
  std::map<std::string, std::vector<float>> vectors;
};

struct sparsemae_model {
  Vit vit;
};

extern "C" {

EXPORT(sparsemae_begin) sparsemae_builder* sparsemae_begin(const sparsemae_shape* s) {
  auto* b = new sparsemae_builder;
  b->config = {
      .embed_dim = s->embed_dim,
      .depth = s->depth,
      .num_heads = s->num_heads,
      .mlp_hidden = s->mlp_hidden,
      .patch_size = s->patch_size,
      .image_height = s->image_height,
      .image_width = s->image_width,
      .in_chans = s->in_chans,
      .num_classes = s->num_classes,
      .reg_tokens = s->reg_tokens,
      .class_token = s->class_token != 0,
      .no_embed_class = s->no_embed_class != 0,
      .pre_norm = s->pre_norm != 0,
      .final_norm = s->final_norm != 0,
      .fc_norm = s->fc_norm != 0,
      .patch_bias = s->patch_bias != 0,
      .pool_include_prefix = s->pool_include_prefix != 0,
      .average_pool = s->average_pool != 0,
      .all_tokens = s->all_tokens != 0,
      .norm_eps = s->norm_eps,
  };
  return b;
}

EXPORT(sparsemae_vector)
void sparsemae_vector(sparsemae_builder* b, const char* name, const float* values, size_t count) {
  b->vectors[name].assign(values, values + count);
}

EXPORT(sparsemae_dense)
void sparsemae_dense(sparsemae_builder* b, const char* name, const float* values, size_t rows, size_t columns) {
  Weights& w = b->weights[name];
  w.rows = rows, w.columns = columns, w.fp32 = values;
}

EXPORT(sparsemae_sparse)
void sparsemae_sparse(sparsemae_builder* b, const char* name, size_t rows, size_t columns, unsigned n, unsigned m,
                      const uint8_t* codes, size_t code_bytes, sparsemae_type type, const void* values,
                      const float* scale, int quantize) {
  Weights& w = b->weights[name];
  w.rows = rows, w.columns = columns, w.n = n, w.m = m;
  w.codes = codes, w.code_bytes = code_bytes;
  if (type == SPARSEMAE_FP32) w.fp32 = static_cast<const float*>(values);
  if (type == SPARSEMAE_BF16) w.bf16 = static_cast<const std::uint16_t*>(values);
  if (type == SPARSEMAE_INT8) {
    w.int8 = static_cast<const std::int8_t*>(values);
    w.row_scale = scale;
    w.quantize = quantize != 0;
  }
}

EXPORT(sparsemae_build) sparsemae_model* sparsemae_build(sparsemae_builder* b, size_t threads, const char* isa) {
  const std::unique_ptr<sparsemae_builder> owner(b);
  try {
    return new sparsemae_model{{b->config, b->weights, b->vectors, threads, isa}};
  } catch (const std::exception& error) {
    remember(error);
    return nullptr;
  }
}

EXPORT(sparsemae_error) const char* sparsemae_error(void) { return last_error; }
EXPORT(sparsemae_isa) const char* sparsemae_isa(const sparsemae_model* m) { return m->vit.kernels().name; }
EXPORT(sparsemae_outputs) size_t sparsemae_outputs(const sparsemae_model* m) { return m->vit.outputs(); }

EXPORT(sparsemae_forward)
void sparsemae_forward(sparsemae_model* m, const float* images, size_t batch, float* out) {
  m->vit.forward(images, batch, out, false);
}

EXPORT(sparsemae_end) void sparsemae_end(sparsemae_model* m) { delete m; }

#if defined(__wasm__)
EXPORT(sparsemae_alloc) void* sparsemae_alloc(size_t bytes) { return std::malloc(bytes); }
EXPORT(sparsemae_free) void sparsemae_free(void* memory) { std::free(memory); }

// The C++ library here has no exceptions: what is thrown leaves its message and ends the module.
void* __cxa_allocate_exception(size_t bytes) { return std::malloc(bytes); }
void __cxa_free_exception(void*) {}
[[noreturn]] void __cxa_throw(void* error, void*, void (*)(void*)) {
  remember(*static_cast<std::exception*>(error));
  __builtin_trap();
}
#endif

}  // extern "C"
