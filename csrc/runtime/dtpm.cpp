#include "dtpm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "backend.hpp"
#include "noise.hpp"

struct dtpm_restorer {
  dtpm::Manifest manifest;
  std::string about;
  std::unique_ptr<dtpm::Backend> backend;
};

namespace {

thread_local std::string last_error;

int failed(int code, const std::string& why) {
  last_error = why.substr(0, why.find('\n'));
  return code;
}

int failed(const std::exception& error, const std::string& before) {
  const bool memory = std::strstr(error.what(), "not enough memory") || std::strstr(error.what(), "out of memory");
  return failed(memory ? DTPM_NO_MEMORY : DTPM_BACKEND, before + error.what());
}

// Where the pixels of a side come from that is mirrored to `padded`, as often as it takes; one pixel is repeated.
std::vector<int64_t> mirrored(int64_t side, int64_t padded) {
  std::vector<int64_t> from(padded);
  const int64_t period = side > 1 ? 2 * (side - 1) : 1;
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t at = i % period;
    from[i] = at < side ? at : period - at;
  }
  return from;
}

// One plane of height x width, spread over tall x wide.
template <typename Read>
void spread(const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, float* to, const Read& read) {
  for (const int64_t row : rows)
    for (const int64_t column : columns) *to++ = read(row, column);
}

void restored(dtpm_restorer& r, const uint8_t* rgb, int64_t height, int64_t width, uint64_t seed, uint8_t* out) {
  const int64_t m = r.manifest.multiple;
  const int64_t tall = (height + m - 1) / m * m, wide = (width + m - 1) / m * m;
  const std::vector<int64_t> rows = mirrored(height, tall), columns = mirrored(width, wide);
  const size_t plane = static_cast<size_t>(tall) * wide;
  std::vector<float> image(3 * plane), noise(r.manifest.noise_fields * image.size()), picture(image.size());
  for (int c = 0; c < 3; ++c)
    spread(rows, columns, image.data() + c * plane, [&](int64_t row, int64_t column) {
      return static_cast<float>(rgb[(row * width + column) * 3 + c]) / 127.5f - 1;
    });
  // Drawn at the picture's own size, field by field, as dtpm_fast.runtime.noise draws them.
  dtpm::Noise generator(seed);
  std::vector<float> field(3 * static_cast<size_t>(height) * width);
  for (int f = 0; f < r.manifest.noise_fields; ++f) {
    generator.fill(field.data(), field.size());
    for (int c = 0; c < 3; ++c)
      spread(rows, columns, noise.data() + (3 * f + c) * plane,
             [&](int64_t row, int64_t column) { return field[(c * height + row) * width + column]; });
  }
  r.backend->restore(image.data(), noise.data(), tall, wide, picture.data());
  for (int64_t row = 0; row < height; ++row)
    for (int64_t column = 0; column < width; ++column)
      for (int c = 0; c < 3; ++c) {
        const float value = std::nearbyint(picture[c * plane + row * wide + column] * 127.5f + 127.5f);
        *out++ = static_cast<uint8_t>(std::clamp(value, 0.0f, 255.0f));
      }
}

std::unique_ptr<dtpm::Backend> open_backend(const std::string& folder, const dtpm::Manifest& manifest) {
#ifdef DTPM_AOTI
  if (manifest.kind == "aoti") return dtpm::open_aoti(folder, manifest);
#endif
#ifdef DTPM_TENSORRT
  if (manifest.kind == "tensorrt") return dtpm::open_tensorrt(folder, manifest);
#endif
  std::string kinds;
#ifdef DTPM_AOTI
  kinds += " aoti";
#endif
#ifdef DTPM_TENSORRT
  kinds += " tensorrt";
#endif
  throw dtpm::BadFolder(folder + ": an export of kind \"" + manifest.kind + "\"; this build runs:" + kinds +
                        " (dtpm-export --format)");
}

}  // namespace

int dtpm_open(const char* folder, dtpm_restorer** restorer) {
  last_error.clear();
  if (folder == nullptr || restorer == nullptr) return failed(DTPM_BAD_ARGUMENT, "dtpm_open: a null pointer");
  *restorer = nullptr;
  try {
    auto r = std::make_unique<dtpm_restorer>();
    r->manifest = dtpm::read_manifest(folder);
    const dtpm::Manifest& m = r->manifest;
    r->backend = open_backend(folder, m);
    const std::string runs = m.kind == "aoti" ? "AOTInductor on " + m.device : "TensorRT on " + m.gpu;
    r->about = m.task + ", " + std::to_string(m.sigmas.size()) + " steps, " + m.precision + ", " + runs;
    *restorer = r.release();
    return DTPM_OK;
  } catch (const dtpm::BadFolder& error) {
    return failed(DTPM_BAD_FOLDER, error.what());
  } catch (const std::bad_alloc&) {
    return failed(DTPM_NO_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(error, std::string(folder) + ": the compiled model cannot be loaded: ");
  }
}

int dtpm_restore(dtpm_restorer* r, const uint8_t* rgb, int height, int width, uint64_t seed, uint8_t* out) {
  last_error.clear();
  if (r == nullptr || rgb == nullptr || out == nullptr) return failed(DTPM_BAD_ARGUMENT, "dtpm_restore: a null pointer");
  if (height < 1 || width < 1)
    return failed(DTPM_BAD_ARGUMENT, "dtpm_restore: height " + std::to_string(height) + " and width " +
                                         std::to_string(width) + " must be positive");
  try {
    restored(*r, rgb, height, width, seed, out);
    return DTPM_OK;
  } catch (const std::bad_alloc&) {
    return failed(DTPM_NO_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(error, "");
  }
}

const char* dtpm_about(const dtpm_restorer* r) { return r == nullptr ? "" : r->about.c_str(); }

const char* dtpm_last_error(void) { return last_error.c_str(); }

void dtpm_close(dtpm_restorer* r) { delete r; }
