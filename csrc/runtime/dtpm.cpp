#include "dtpm.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "manifest.hpp"

using torch::inductor::AOTIModelPackageLoader;

struct dtpm_restorer {
  dtpm::Manifest manifest;
  std::string about;
  at::Device device{at::kCPU};
  std::unique_ptr<AOTIModelPackageLoader> prepare, step;
};

namespace {

thread_local std::string last_error;

int failed(int code, const std::string& why) {
  last_error = why.substr(0, why.find('\n'));
  return code;
}

// Where the pixels of a side come from that is mirrored to `padded`, as often as it takes; one pixel is repeated.
at::Tensor mirrored(int64_t side, int64_t padded) {
  at::Tensor index = at::empty({padded}, at::kLong);
  auto* to = index.data_ptr<int64_t>();
  const int64_t period = side > 1 ? 2 * (side - 1) : 1;
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t at = i % period;
    to[i] = at < side ? at : period - at;
  }
  return index;
}

at::Tensor pad(const at::Tensor& image, int64_t height, int64_t width) {
  return image.index_select(2, mirrored(image.size(2), height)).index_select(3, mirrored(image.size(3), width));
}

// Field by field from one generator, as dtpm_fast.runtime.noise draws them.
at::Tensor noise_fields(uint64_t seed, int fields, int height, int width) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  std::vector<at::Tensor> drawn;
  for (int i = 0; i < fields; ++i) drawn.push_back(at::randn({3, height, width}, generator, at::kFloat));
  return at::stack(drawn);
}

at::Tensor restored(dtpm_restorer& r, const at::Tensor& photo, uint64_t seed) {
  const int64_t height = photo.size(2), width = photo.size(3), m = r.manifest.multiple;
  const int64_t tall = (height + m - 1) / m * m, wide = (width + m - 1) / m * m;
  const at::Tensor image = (pad(photo, tall, wide).to(at::kFloat) / 127.5 - 1).contiguous().to(r.device);
  const at::Tensor noise =
      pad(noise_fields(seed, r.manifest.noise_fields, height, width), tall, wide).contiguous().to(r.device);
  const std::vector<at::Tensor> conditions = r.prepare->run({image});
  const at::Tensor& y_eps = conditions.at(0);
  at::Tensor x = noise.slice(0, 0, 1).contiguous(), previous = at::zeros_like(image);
  int64_t fresh = 1;
  for (size_t i = 0; i < r.manifest.sigmas.size(); ++i) {
    std::vector<at::Tensor> given = {x, previous, at::full({1}, int64_t(i), at::device(r.device).dtype(at::kLong))};
    given.insert(given.end(), conditions.begin(), conditions.end());
    const std::vector<at::Tensor> found = r.step->run(given);
    x = found.at(0), previous = found.at(1);
    if (r.manifest.sigmas[i] > 0) x = x + r.manifest.sigmas[i] * noise.slice(0, fresh, fresh + 1), ++fresh;
  }
  const at::Tensor picture = (y_eps + x).clamp(-1, 1).slice(2, 0, height).slice(3, 0, width);
  return (picture * 127.5 + 127.5).round().clamp(0, 255).to(at::kByte).permute({0, 2, 3, 1}).cpu().contiguous();
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
    if (m.kind != "aoti")
      return failed(DTPM_BAD_FOLDER, std::string(folder) + ": an export of kind \"" + m.kind +
                                         "\"; this build runs aoti (dtpm-export --format aoti)");
    r->device = at::Device(m.device);
    r->prepare = std::make_unique<AOTIModelPackageLoader>(std::string(folder) + "/" + m.prepare);
    r->step = std::make_unique<AOTIModelPackageLoader>(std::string(folder) + "/" + m.step);
    r->about = m.task + ", " + std::to_string(m.sigmas.size()) + " steps, " + m.precision + ", AOTInductor on " + m.device;
    *restorer = r.release();
    return DTPM_OK;
  } catch (const dtpm::BadFolder& error) {
    return failed(DTPM_BAD_FOLDER, error.what());
  } catch (const std::bad_alloc&) {
    return failed(DTPM_NO_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(DTPM_BACKEND, std::string(folder) + ": the compiled model cannot be loaded: " + error.what());
  }
}

int dtpm_restore(dtpm_restorer* r, const uint8_t* rgb, int height, int width, uint64_t seed, uint8_t* out) {
  last_error.clear();
  if (r == nullptr || rgb == nullptr || out == nullptr) return failed(DTPM_BAD_ARGUMENT, "dtpm_restore: a null pointer");
  if (height < 1 || width < 1)
    return failed(DTPM_BAD_ARGUMENT, "dtpm_restore: height " + std::to_string(height) + " and width " +
                                         std::to_string(width) + " must be positive");
  try {
    const c10::InferenceMode no_gradients;
    const at::Tensor photo = at::empty({1, height, width, 3}, at::kByte);
    std::memcpy(photo.data_ptr(), rgb, photo.nbytes());
    const at::Tensor picture = restored(*r, photo.permute({0, 3, 1, 2}), seed);
    std::memcpy(out, picture.data_ptr(), picture.nbytes());
    return DTPM_OK;
  } catch (const std::bad_alloc&) {
    return failed(DTPM_NO_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    const bool memory = std::strstr(error.what(), "not enough memory") || std::strstr(error.what(), "out of memory");
    return failed(memory ? DTPM_NO_MEMORY : DTPM_BACKEND, error.what());
  }
}

const char* dtpm_about(const dtpm_restorer* r) { return r == nullptr ? "" : r->about.c_str(); }

const char* dtpm_last_error(void) { return last_error.c_str(); }

void dtpm_close(dtpm_restorer* r) { delete r; }
