/* forward FILE IMAGES ISA: logits of prepared images, float, to standard output. */
#include <stdio.h>
#include <stdlib.h>

#include "sparsemae.h"

int main(int argc, char** argv) {
  sparsemae_model* model = argc == 4 ? sparsemae_open(argv[1], 2, argv[3]) : NULL;
  if (!model) {
    fprintf(stderr, "%s\n", sparsemae_error());
    return 1;
  }
  const sparsemae_description* it = sparsemae_describe(model);
  FILE* file = fopen(argv[2], "rb");
  float* image = malloc(sizeof(float) * it->channels * it->height * it->width);
  float* logits = malloc(sizeof(float) * it->outputs);
  while (file && fread(image, sizeof(float), it->channels * it->height * it->width, file)) {
    if (sparsemae_forward(model, image, 1, logits)) return 1;
    fwrite(logits, sizeof(float), it->outputs, stdout);
  }
  fclose(file);
  sparsemae_close(model);
  free(image), free(logits);
  return 0;
}
