// What runs a folder's graphs, behind plain arrays: one function of each kind opens it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "manifest.hpp"

namespace dtpm {

struct Backend {
  virtual ~Backend() = default;
  // image and restored: (3, height, width) in [-1, 1]; noise: (noise_fields, 3, height, width). Both sides are multiples
  // of the manifest's "multiple".
  virtual void restore(const float* image, const float* noise, int64_t height, int64_t width, float* restored) = 0;
};

// Throw BadFolder for a folder that this machine cannot run, std::exception for what the backend reports.
std::unique_ptr<Backend> open_aoti(const std::string& folder, const Manifest& manifest);
std::unique_ptr<Backend> open_tensorrt(const std::string& folder, const Manifest& manifest);

}  // namespace dtpm
