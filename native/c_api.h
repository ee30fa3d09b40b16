/* The packed forward for C, and so for whatever calls C: WebAssembly pages, other languages.
 *
 * A model is built from a file's tensors by their names there; nothing of the file has been checked here but what the
 * forward relies on. Tensors but those of sparsemae_vector must stay where they are until sparsemae_build returns. */
#ifndef SPARSEMAE_C_API_H
#define SPARSEMAE_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The fields of "vit" in the file's metadata; average_pool and all_tokens are global_pool "avg" and "". */
typedef struct {
  uint32_t embed_dim, depth, num_heads, mlp_hidden, patch_size, image_height, image_width, in_chans, num_classes;
  uint32_t reg_tokens, class_token, no_embed_class, pre_norm, final_norm, fc_norm, patch_bias, pool_include_prefix;
  uint32_t average_pool, all_tokens;
  float norm_eps;
} sparsemae_shape;

typedef enum { SPARSEMAE_FP32, SPARSEMAE_BF16, SPARSEMAE_INT8 } sparsemae_type;

typedef struct sparsemae_builder sparsemae_builder;
typedef struct sparsemae_model sparsemae_model;

sparsemae_builder* sparsemae_begin(const sparsemae_shape* shape);
/* Biases, norms, positions, tokens and the head. */
void sparsemae_vector(sparsemae_builder*, const char* name, const float* values, size_t count);
/* Linear layers and the patch embedding, fp32 [rows][columns]. */
void sparsemae_dense(sparsemae_builder*, const char* name, const float* values, size_t rows, size_t columns);
/* Sparse ones: `codes`, values [rows][columns / m * n], and of int8 a scale per row. quantize: round the inputs of int8
 * layers to int8, where the processor multiplies int8. */
void sparsemae_sparse(sparsemae_builder*, const char* name, size_t rows, size_t columns, unsigned n, unsigned m,
                      const uint8_t* codes, size_t code_bytes, sparsemae_type type, const void* values,
                      const float* scale, int quantize);
/* Ends the builder. isa: "" for the fastest instruction set. Null where it cannot be had: see sparsemae_error. */
sparsemae_model* sparsemae_build(sparsemae_builder*, size_t threads, const char* isa);
/* What went wrong last on this thread. */
const char* sparsemae_error(void);

const char* sparsemae_isa(const sparsemae_model*);
/* Floats per image. */
size_t sparsemae_outputs(const sparsemae_model*);
/* images [batch][in_chans][image_height][image_width], preprocessed; out [batch][outputs]. */
void sparsemae_forward(sparsemae_model*, const float* images, size_t batch, float* out);
void sparsemae_end(sparsemae_model*);

#ifdef __cplusplus
}
#endif
#endif
