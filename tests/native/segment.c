/* The class of each pixel of an image of fixed colors by a packed segmenter, a row a line; then its scores' sizes. */
#include <stdio.h>
#include <stdlib.h>

#include "sparsemae.h"

int main(int argc, char** argv) {
  sparsemae_model* model = argc == 4 ? sparsemae_open(argv[1], 2, NULL) : NULL;
  if (!model) {
    fprintf(stderr, "%s\n", sparsemae_error());
    return 1;
  }
  const unsigned width = (unsigned)atoi(argv[2]), height = (unsigned)atoi(argv[3]);
  uint8_t *pixels = malloc(3 * width * height), *classes = malloc(width * height);
  for (unsigned i = 0; i < 3 * width * height; ++i)
    pixels[i] = (uint8_t)(i / 3 % width * 7 + i / 3 / width * 3 + i % 3);
  if (sparsemae_segment(model, pixels, width, height, 3, classes)) {
    fprintf(stderr, "%s\n", sparsemae_error());
    return 1;
  }
  for (unsigned i = 0; i < width * height; ++i) printf("%d%c", classes[i], (i + 1) % width ? ' ' : '\n');
  const sparsemae_description* d = sparsemae_describe(model);
  printf("%u %u %u %u\n", d->rows, d->columns, d->classes, d->outputs);
  float* input = malloc(sizeof(float) * d->channels * d->height * d->width);
  if (!sparsemae_prepare(model, pixels, width, height, 3, input)) return 1; /* its windows are its own */
  printf("%s\n", sparsemae_error());
  sparsemae_close(model);
  free(pixels), free(classes), free(input);
  return 0;
}
