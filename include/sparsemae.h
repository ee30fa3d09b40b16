/* Packed models in C: open, describe, prepare an image, forward, close. docs/deploy.md has a whole program.
 *
 * What fails returns null, or a number that is not 0, and sparsemae_error() says why; nothing is thrown, and a damaged
 * or hostile file is such an error. A model may be used by several threads: its forwards take turns. */
#ifndef SPARSEMAE_H
#define SPARSEMAE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SPARSEMAE_API __declspec(dllexport)
#else
#define SPARSEMAE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sparsemae_model sparsemae_model;

/* What a model is. All pointers live as long as it does. */
typedef struct {
  uint32_t channels, height, width; /* of its input, px */
  uint32_t classes;                 /* 0: an encoder */
  uint32_t outputs;                 /* floats an image: logits; of an encoder its features; of a segmenter scores
                                       [rows][columns][classes], one row and column for each patch */
  uint32_t threads;                 /* that compute */
  const char* isa;                  /* the instruction set in use */
  const char* const* class_names;   /* UTF-8, one per class; null: the file names none */
  const char* config;               /* the file's metadata, JSON: docs/packed-format.md */
  uint32_t rows, columns;           /* of a segmenter's scores; 0: no segmenter */
} sparsemae_description;

/* A model of a file, or of a file's bytes, which may go afterwards. threads 0: one per processor, as far as there is
 * work; isa null: the fastest instruction set (docs/packed-format.md names them). */
SPARSEMAE_API sparsemae_model* sparsemae_open(const char* path, uint32_t threads, const char* isa);
SPARSEMAE_API sparsemae_model* sparsemae_open_memory(const void* bytes, size_t size, uint32_t threads, const char* isa);
SPARSEMAE_API const sparsemae_description* sparsemae_describe(const sparsemae_model*);
/* An image as the model's input, float [channels][height][width]: resized, cropped and normalized as the file says, to
 * the pixel as in Python. pixels: 8 bits, [height][width][channels], gray (1), RGB (3) or RGB and alpha (4). */
SPARSEMAE_API int sparsemae_prepare(const sparsemae_model*, const uint8_t* pixels, uint32_t width, uint32_t height,
                                    uint32_t channels, float* out);
/* images [batch][channels][height][width], prepared; out [batch][outputs]. */
SPARSEMAE_API int sparsemae_forward(sparsemae_model*, const float* images, size_t batch, float* out);
/* Of a segmenter: the class of each pixel, out [height][width], by windows over the resized image as the file says.
 * pixels: as for sparsemae_prepare, which it does not need. */
SPARSEMAE_API int sparsemae_segment(sparsemae_model*, const uint8_t* pixels, uint32_t width, uint32_t height,
                                    uint32_t channels, uint8_t* out);
SPARSEMAE_API void sparsemae_close(sparsemae_model*);
/* What went wrong last on this thread. */
SPARSEMAE_API const char* sparsemae_error(void);

#ifdef __cplusplus
}
#endif
#endif
