// manifest.json of an exported folder: read, and checked against manifest.sha256 and the hash of every file.
#pragma once

#include <cctype>
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

struct Manifest {
  std::string kind, task, precision, device, torch;
  int multiple = 0, noise_fields = 0;
  std::vector<double> sigmas;  // one per step
  std::string prepare, step;   // file names
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
    found.multiple = static_cast<int>(content["multiple"].number);
    found.noise_fields = static_cast<int>(content["noise_fields"].number);
    for (const Json& sigma : content["sampler"]["sigmas"].items) found.sigmas.push_back(sigma.number);
    found.prepare = content["graphs"]["prepare"]["file"].text;
    found.step = content["graphs"]["step"]["file"].text;
    found.device = content["engine"].has("device") ? content["engine"]["device"].text : "cpu";
    found.torch = content["versions"].has("torch") ? content["versions"]["torch"].text : "unknown";
    if (found.multiple < 1 || found.sigmas.empty() || found.noise_fields < 1) throw std::runtime_error("bad numbers");
    for (const auto& [name, entry] : content["files"].members) {
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
