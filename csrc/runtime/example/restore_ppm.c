/* restore_ppm FOLDER in.ppm out.ppm [seed]: a photo (binary PPM, P6) restored with an exported folder. */
#include <stdio.h>
#include <stdlib.h>

#include "../dtpm.h"

static int fail(const char* what, const char* why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  return 1;
}

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    fprintf(stderr, "usage: restore_ppm FOLDER in.ppm out.ppm [seed]\n");
    return 2;
  }
  int width = 0, height = 0, top = 0;
  FILE* in = fopen(argv[2], "rb");
  if (in == NULL) return fail(argv[2], "cannot be opened");
  if (fscanf(in, "P6 %d %d %d", &width, &height, &top) != 3 || top != 255 || fgetc(in) == EOF || width < 1 || height < 1 ||
      width > 1 << 15 || height > 1 << 15) {
    fclose(in);
    return fail(argv[2], "not a binary PPM with 8 bits a colour");
  }
  const size_t size = (size_t)width * (size_t)height * 3;
  uint8_t* photo = malloc(size);
  const size_t got = photo == NULL ? 0 : fread(photo, 1, size, in);
  fclose(in);
  int code = 1;
  dtpm_restorer* restorer = NULL;
  if (got != size) {
    fail(argv[2], "ends too early");
  } else if (dtpm_open(argv[1], &restorer) != DTPM_OK) {
    fail("dtpm_open", dtpm_last_error());
  } else {
    fprintf(stderr, "%s\n", dtpm_about(restorer));
    const uint64_t seed = argc == 5 ? strtoull(argv[4], NULL, 10) : 0;
    if (dtpm_restore(restorer, photo, height, width, seed, photo) != DTPM_OK) {
      fail("dtpm_restore", dtpm_last_error());
    } else {
      FILE* out = fopen(argv[3], "wb");
      if (out == NULL) {
        fail(argv[3], "cannot be written");
      } else {
        fprintf(out, "P6\n%d %d\n255\n", width, height);
        code = fwrite(photo, 1, size, out) == size ? 0 : fail(argv[3], "could not be written");
        if (fclose(out) != 0) code = fail(argv[3], "could not be written");
      }
    }
  }
  dtpm_close(restorer);
  free(photo);
  return code;
}
