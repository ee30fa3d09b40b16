/* Opens each file of its arguments as a packed model, from memory, and runs it: one line for each. */
#include <stdio.h>
#include <stdlib.h>

#include "sparsemae.h"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    FILE* file = fopen(argv[i], "rb");
    size_t room = 1 << 20;
    char* bytes = malloc(room);
    size_t size = fread(bytes, 1, room, file);
    fclose(file);
    bytes = realloc(bytes, size ? size : 1); /* a byte too far is found */
    sparsemae_model* model = sparsemae_open_memory(bytes, size, 1, NULL);
    free(bytes);
    if (!model) {
      printf("refused: %s\n", sparsemae_error());
      continue;
    }
    const sparsemae_description* d = sparsemae_describe(model);
    const uint8_t pixels[12] = {255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9};
    float* input = malloc(sizeof(float) * d->channels * d->height * d->width);
    float* out = malloc(sizeof(float) * d->outputs);
    int failed;
    if (d->rows) {
      uint8_t classes[4];
      failed = sparsemae_segment(model, pixels, 2, 2, 3, classes);
      out[0] = failed ? 0 : classes[0];
    } else {
      failed = sparsemae_prepare(model, pixels, 2, 2, 3, input) || sparsemae_forward(model, input, 1, out);
    }
    if (failed)
      printf("refused: %s\n", sparsemae_error());
    else
      printf("%.9g\n", out[0]);
    free(input), free(out);
    sparsemae_close(model);
  }
  return 0;
}
