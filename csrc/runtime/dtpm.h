/* Restores photos with a folder that `dtpm-export --format aoti` or `tensorrt` wrote: image in, image out, no Python.
 *
 * Every function that can fail returns one of the codes below; dtpm_last_error() then says why, in one line. A restorer
 * may be used by one thread at a time; several restorers are independent. The folder holds native code: open only
 * folders from a source you trust. */
#ifndef DTPM_H
#define DTPM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  DTPM_OK = 0,
  DTPM_BAD_ARGUMENT = 1, /* a null pointer, or a side that is not positive */
  DTPM_BAD_FOLDER = 2,   /* no export, a changed file, or a kind that this build does not run */
  DTPM_BACKEND = 3,      /* the compiled model could not be loaded or run */
  DTPM_NO_MEMORY = 4
};

typedef struct dtpm_restorer dtpm_restorer;

/* Opens a folder: checks its hashes and loads its graphs, on the device that they were compiled for. */
int dtpm_open(const char* folder, dtpm_restorer** restorer);

/* rgb and restored: height x width x 3 bytes, rows without gaps; any size, the two may be the same. The noise depends
 * on the seed and the size only, and is the noise of dtpm_fast.Restorer. */
int dtpm_restore(dtpm_restorer* restorer, const uint8_t* rgb, int height, int width, uint64_t seed, uint8_t* restored);

/* Task, steps, precision and device in one line; lives as long as the restorer. */
const char* dtpm_about(const dtpm_restorer* restorer);

/* Why the last call of this thread failed; "" when it did not. */
const char* dtpm_last_error(void);

/* Null is allowed. */
void dtpm_close(dtpm_restorer* restorer);

#ifdef __cplusplus
}
#endif
#endif
