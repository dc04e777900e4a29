/* restore_ppm FOLDER in.ppm out.ppm [seed]: a photo (binary PPM, P6) restored with an exported folder. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

#include "../dtpm.h"

static int fail(const char* what, const char* why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  return 1;
}

/* The next number of a header; comments, as GIMP writes them, run from # to the end of their line. */
static int number(FILE* in) {
  int value = 0, c = fgetc(in);
  for (; c == '#' || isspace(c); c = fgetc(in))
    if (c == '#')
      while (c != '\n' && c != EOF) c = fgetc(in);
  ungetc(c, in);
  return fscanf(in, "%d", &value) == 1 ? value : 0;
}

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    fprintf(stderr, "usage: restore_ppm FOLDER in.ppm out.ppm [seed]\n");
    return 2;
  }
  char* end = "";
  const uint64_t seed = argc == 5 ? strtoull(argv[4], &end, 10) : 0;
  if (*end != '\0' || (argc == 5 && *argv[4] == '\0')) return fail(argv[4], "the seed must be a whole number");
  FILE* in = fopen(argv[2], "rb");
  if (in == NULL) return fail(argv[2], "cannot be opened");
  const int known = fgetc(in) == 'P' && fgetc(in) == '6';
  const int width = number(in), height = number(in), top = number(in);
  if (!known || top != 255 || fgetc(in) == EOF || width < 1 || height < 1 || width > 1 << 15 || height > 1 << 15) {
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
