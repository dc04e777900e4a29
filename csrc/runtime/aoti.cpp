#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstring>
#include <vector>

#include "backend.hpp"

namespace dtpm {
namespace {

using torch::inductor::AOTIModelPackageLoader;

class Aoti : public Backend {
 public:
  Aoti(const std::string& folder, const Manifest& manifest)
      : manifest_(manifest),
        device_(manifest.device),
        prepare_(folder + "/" + manifest.prepare),
        step_(folder + "/" + manifest.step) {
    // cuDNN's default is TF32, ten bits of mantissa; PyTorch has this switch for the whole process only.
    if (manifest.precision == "fp32") at::globalContext().setAllowTF32CuDNN(false);
  }

  void restore(const float* image, const float* noise, int64_t height, int64_t width, float* restored) override {
    const c10::InferenceMode no_gradients;
    const at::Tensor y_d = on_device(image, {1, 3, height, width});
    const at::Tensor fields = on_device(noise, {manifest_.noise_fields, 3, height, width});
    const std::vector<at::Tensor> conditions = prepare_.run({y_d});
    const at::Tensor& y_eps = conditions.at(0);
    at::Tensor x = fields.slice(0, 0, 1).contiguous(), previous = at::zeros_like(y_d);
    int64_t fresh = 1;
    for (size_t i = 0; i < manifest_.sigmas.size(); ++i) {
      std::vector<at::Tensor> given = {x, previous, at::full({1}, int64_t(i), at::device(device_).dtype(at::kLong))};
      given.insert(given.end(), conditions.begin(), conditions.end());
      const std::vector<at::Tensor> found = step_.run(given);
      x = found.at(0), previous = found.at(1);
      if (manifest_.sigmas[i] > 0) x = x + manifest_.sigmas[i] * fields.slice(0, fresh, fresh + 1), ++fresh;
    }
    const at::Tensor picture = (y_eps + x).clamp(-1, 1).cpu().contiguous();
    std::memcpy(restored, picture.data_ptr(), picture.nbytes());
  }

 private:
  // A copy: the compiled code asks for aligned memory.
  at::Tensor on_device(const float* values, at::IntArrayRef shape) const {
    const at::Tensor tensor = at::empty(shape, at::kFloat);
    std::memcpy(tensor.data_ptr(), values, tensor.nbytes());
    return tensor.to(device_);
  }

  Manifest manifest_;
  at::Device device_;
  AOTIModelPackageLoader prepare_, step_;
};

}  // namespace

std::unique_ptr<Backend> open_aoti(const std::string& folder, const Manifest& manifest) {
  return std::make_unique<Aoti>(folder, manifest);
}

}  // namespace dtpm
