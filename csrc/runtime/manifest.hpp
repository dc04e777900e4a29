// manifest.json of an exported folder: read, and checked against manifest.sha256 and the hash of every file.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.hpp"
#include "sha256.hpp"

namespace dtpm {

struct BadFolder : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Bucket {
  int batch = 0, height = 0, width = 0;
};

struct Manifest {
  std::string kind, task, precision, device;
  std::string tensorrt, compute_capability, gpu;  // where engines were built; empty for other kinds
  std::vector<Bucket> buckets;                    // one optimisation profile each
  int multiple = 0, noise_fields = 0;
  std::vector<double> sigmas;  // one per step
  std::string prepare, step;   // file names

  // The index of the smallest bucket that holds one picture of this size, -1 when none does.
  int bucket(int64_t height, int64_t width) const {
    int found = -1;
    double smallest = 0;
    for (size_t i = 0; i < buckets.size(); ++i) {
      const double size = double(buckets[i].batch) * buckets[i].height * buckets[i].width;
      if (height > buckets[i].height || width > buckets[i].width || (found >= 0 && size >= smallest)) continue;
      found = static_cast<int>(i), smallest = size;
    }
    return found;
  }
};

inline Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  std::ifstream file(path, std::ios::binary), recorded(folder + "/manifest.sha256");
  if (!file || !recorded) throw BadFolder(path + ": no such file; is it a folder that dtpm-export wrote?");
  std::stringstream buffer;
  buffer << file.rdbuf();
  const std::string text = buffer.str();
  std::string digest;
  recorded >> digest;
  if (sha256(buffer) != digest)
    throw BadFolder(path + ": was changed after the export (manifest.sha256 does not match); export again");
  Manifest found;
  try {
    const Json content = JsonReader(text).read();
    if (content["format"].text != "dtpm-export-1") throw std::runtime_error("another format");
    found.kind = content["kind"].text;
    found.task = content["task"].text;
    found.precision = content["precision"].text;
    const auto whole = [](const Json& value) {  // no cast of a number that its type cannot hold
      if (!(value.number >= 1 && value.number <= 1 << 20)) throw std::runtime_error("bad numbers");
      return static_cast<int>(value.number);
    };
    found.multiple = whole(content["multiple"]);
    found.noise_fields = whole(content["noise_fields"]);
    for (const Json& sigma : content["sampler"]["sigmas"].items) found.sigmas.push_back(sigma.number);
    found.prepare = content["graphs"]["prepare"]["file"].text;
    found.step = content["graphs"]["step"]["file"].text;
    found.device = content["engine"].has("device") ? content["engine"]["device"].text : "cpu";
    if (found.kind == "tensorrt") {
      const Json& engine = content["engine"];
      found.tensorrt = engine["tensorrt"].text;
      found.compute_capability = engine["compute_capability"].text;
      found.gpu = engine["gpu"].text;
      for (const Json& b : engine["buckets"].items)
        found.buckets.push_back({whole(b["batch"]), whole(b["height"]), whole(b["width"])});
    }
    if (found.multiple > 1024 || found.sigmas.empty()) throw std::runtime_error("bad numbers");
    const auto fresh = std::count_if(found.sigmas.begin(), found.sigmas.end(), [](double sigma) { return sigma > 0; });
    if (found.noise_fields != 1 + fresh)
      throw std::runtime_error("noise_fields: its sigmas take " + std::to_string(1 + fresh));
    for (const std::string& graph : {found.prepare, found.step})
      if (!content["files"].has(graph)) throw std::runtime_error("the graph " + graph + " is none of its files");
    for (const auto& [name, entry] : content["files"].members) {
      if (name.empty() || name.front() == '/' || name.find("..") != std::string::npos)
        throw std::runtime_error("the file " + name + " is not in the folder");
      std::ifstream part(folder + "/" + name, std::ios::binary);
      if (!part) throw BadFolder(folder + "/" + name + ": is missing from the export; export again");
      if (sha256(part) != entry["sha256"].text)
        throw BadFolder(folder + "/" + name + ": is not the file that was exported (SHA-256 differs); export again");
    }
  } catch (const BadFolder&) {
    throw;
  } catch (const std::exception& error) {
    throw BadFolder(path + ": not a readable manifest (" + error.what() + ")");
  }
  return found;
}

}  // namespace dtpm
