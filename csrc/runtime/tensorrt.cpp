// TensorRT: `prepare` once for a picture, then all steps, as one CUDA graph from a size's second picture on. Written for
// 10.12 and newer, 11 included.
//
// Every size has contexts and buffers of its own; what `prepare` writes is what `step` reads. Whatever needs a kernel of
// our own (the sum of y_eps and x at the end, fresh noise where eta > 0) is done by the host: three planes of floats.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "backend.hpp"

namespace dtpm {
namespace {

constexpr size_t capacity = 8;  // sizes kept, the least recently used goes first

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  if (code == cudaErrorMemoryAllocation) throw std::runtime_error(std::string(what) + ": out of memory on the GPU");
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// Keeps TensorRT's first error, so that a failure can be told in one line.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> alone(mutex_);  // TensorRT reports from threads of its own
      if (first_.empty()) first_ = message;
    } catch (...) {  // no memory for the message: the failure itself is still reported
    }
  }
  std::string take() {
    const std::lock_guard<std::mutex> alone(mutex_);
    const std::string found = first_.empty() ? "TensorRT gave no reason" : first_.substr(0, first_.find('\n'));
    first_.clear();
    return found;
  }

 private:
  std::mutex mutex_;
  std::string first_;
};

// One and never freed: TensorRT goes on with the first that it was given, whichever restorer that belonged to.
Log& process_log() {
  static Log& log = *new Log;
  return log;
}

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes(bytes) { check(cudaMalloc(&data, bytes), "cudaMalloc"); }
  DeviceMemory(DeviceMemory&& other) noexcept : data(other.data), bytes(other.bytes) { other.data = nullptr; }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data); }
  void* data = nullptr;
  size_t bytes;
};

class PinnedFloats {
 public:
  explicit PinnedFloats(size_t count) : count(count) {
    check(cudaMallocHost(reinterpret_cast<void**>(&data), bytes()), "cudaMallocHost");
  }
  PinnedFloats(const PinnedFloats&) = delete;
  PinnedFloats& operator=(const PinnedFloats&) = delete;
  ~PinnedFloats() { cudaFreeHost(data); }
  size_t bytes() const { return count * sizeof(float); }
  float* data = nullptr;
  size_t count;
};

// CUDA's current device belongs to a thread, and a restorer may be used by another than the one that opened it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

struct Stream {
  Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreate"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(handle); }
  cudaStream_t handle = nullptr;
};

size_t bytes_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16: return 2;
    case nvinfer1::DataType::kINT64: return 8;
    default: throw std::runtime_error("a tensor of a type that no export has");
  }
}

size_t volume(const nvinfer1::Dims& shape) {
  size_t found = 1;
  for (int i = 0; i < shape.nbDims; ++i) {
    if (shape.d[i] < 1) throw std::runtime_error("TensorRT does not know the shape of a tensor");
    found *= static_cast<size_t>(shape.d[i]);
  }
  return found;
}

// What a captured graph lets the host do between two steps.
struct FreshNoise {
  float* x;
  const float* noise;
  float sigma;
  size_t count;
};

void add_fresh_noise(void* given) {
  const auto& fresh = *static_cast<const FreshNoise*>(given);
  for (size_t i = 0; i < fresh.count; ++i) fresh.x[i] += fresh.sigma * fresh.noise[i];
}

using Buffers = std::map<std::string, DeviceMemory>;

// One size: its contexts, its buffers by the tensors' names, and the graph of all steps.
struct Size {
  Size(int64_t height, int64_t width, int fields)
      : height(height), width(width), noise(size_t(fields) * 3 * height * width), x(3 * height * width), y(x.count) {}
  Size(const Size&) = delete;
  Size& operator=(const Size&) = delete;
  ~Size() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  int64_t height, width;
  PinnedFloats noise, x, y;  // the noise of this picture; x and y_eps on their way back
  std::vector<FreshNoise> fresh;
  Buffers buffers;
  std::unique_ptr<nvinfer1::IExecutionContext> prepare, step;
  bool ran = false;
  cudaGraphExec_t graph = nullptr;
};

class TensorRT : public Backend {
 public:
  TensorRT(const std::string& folder, const Manifest& manifest) : manifest_(manifest) {
    check(cudaGetDevice(&device_), "no CUDA device");
    check_place(folder);
    runtime_.reset(nvinfer1::createInferRuntime(log_));
    if (!runtime_) throw std::runtime_error("TensorRT does not start: " + log_.take());
    prepare_ = load(folder + "/" + manifest.prepare);
    step_ = load(folder + "/" + manifest.step);
    std::vector<int64_t> numbers(manifest.sigmas.size());
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int64_t>(i);
    indices_ = std::make_unique<DeviceMemory>(numbers.size() * sizeof(int64_t));
    check(cudaMemcpyAsync(indices_->data, numbers.data(), indices_->bytes, cudaMemcpyHostToDevice, stream_.handle),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_.handle), "cudaStreamSynchronize");
  }

  void restore(const float* image, const float* noise, int64_t height, int64_t width, float* restored) override {
    const OnDevice here(device_);
    Size& size = at(height, width);
    const cudaStream_t stream = stream_.handle;
    DeviceMemory& input = size.buffers.at("image");
    check(cudaMemcpyAsync(input.data, image, input.bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    std::memcpy(size.noise.data, noise, size.noise.bytes());
    run(*size.prepare);
    if (!size.ran) {  // TensorRT finishes what a new size needs in the first run: that could not be captured
      steps(size);
    } else {
      if (size.graph == nullptr) capture(size);
      check(cudaGraphLaunch(size.graph, stream), "cudaGraphLaunch");
    }
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    size.ran = true;
    for (size_t i = 0; i < size.x.count; ++i) restored[i] = std::clamp(size.y.data[i] + size.x.data[i], -1.0f, 1.0f);
  }

 private:
  // An engine runs with the version that built it, on the architecture that it was built for, and nowhere else.
  void check_place(const std::string& folder) const {
    const std::string version = std::to_string(getInferLibMajorVersion()) + "." +
                                std::to_string(getInferLibMinorVersion()) + "." +
                                std::to_string(getInferLibPatchVersion()) + "." +
                                std::to_string(getInferLibBuildVersion());
    cudaDeviceProp found{};
    check(cudaGetDeviceProperties(&found, device_), "cudaGetDeviceProperties");
    const std::string capability = std::to_string(found.major) + "." + std::to_string(found.minor);
    if (version == manifest_.tensorrt && capability == manifest_.compute_capability) return;
    throw BadFolder(folder + ": built by TensorRT " + manifest_.tensorrt + " for compute capability " +
                    manifest_.compute_capability + " (" + manifest_.gpu + "); this is TensorRT " + version + " on " +
                    capability + " (" + found.name + "), and an engine runs only where both agree: export again here");
  }

  std::unique_ptr<nvinfer1::ICudaEngine> load(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> plan{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) throw std::runtime_error(path + ": TensorRT cannot load the engine: " + log_.take());
    return engine;
  }

  Size& at(int64_t height, int64_t width) {
    const auto found = std::find_if(sizes_.begin(), sizes_.end(), [&](const std::unique_ptr<Size>& size) {
      return size->height == height && size->width == width;
    });
    if (found != sizes_.end()) {
      sizes_.splice(sizes_.begin(), sizes_, found);
    } else {
      while (sizes_.size() >= capacity) sizes_.pop_back();
      sizes_.push_front(made(height, width));
    }
    return *sizes_.front();
  }

  // Where the memory is short, without the other sizes: none is at work, because a restoration waits for its end.
  std::unique_ptr<Size> made(int64_t height, int64_t width) {
    try {
      return make(height, width);
    } catch (const std::exception&) {
      if (sizes_.empty() || manifest_.bucket(height, width) < 0) throw;
      sizes_.clear();
      cudaGetLastError();  // takes the error away
      log_.take();
    }
    return make(height, width);
  }

  std::unique_ptr<Size> make(int64_t height, int64_t width) {
    const int profile = manifest_.bucket(height, width);
    if (profile < 0)
      throw std::runtime_error("a picture of " + std::to_string(height) + "x" + std::to_string(width) +
                               " (height x width) fits none of the engine's buckets; export again with --bucket " +
                               std::to_string(height) + "x" + std::to_string(width));
    auto size = std::make_unique<Size>(height, width, manifest_.noise_fields);
    const nvinfer1::Dims4 image(1, 3, height, width);
    size->prepare = context(*prepare_, profile);
    shape(*size->prepare, "image", image);
    bind(*prepare_, *size->prepare, size->buffers);
    size->step = context(*step_, profile);
    for (int i = 0; i < step_->getNbIOTensors(); ++i) {
      const char* name = step_->getIOTensorName(i);
      if (step_->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) continue;
      const std::string key = name;
      if (key == "x" || key == "previous") {
        shape(*size->step, name, image);
      } else if (key != "index") {  // what prepare gives, at the shape that it has here
        shape(*size->step, name, size->prepare->getTensorShape(name));
      }
    }
    bind(*step_, *size->step, size->buffers);
    for (const char* name : {"y_eps", "x", "next_x", "previous", "x0"})
      if (size->buffers.at(name).bytes != size->x.bytes()) throw std::runtime_error(std::string(name) + ": not float32");
    return size;
  }

  std::unique_ptr<nvinfer1::IExecutionContext> context(nvinfer1::ICudaEngine& engine, int profile) {
    // Memory for this profile alone: by default a context takes what the largest profile needs.
    std::unique_ptr<nvinfer1::IExecutionContext> made(
        engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
    if (!made || !made->setOptimizationProfileAsync(profile, stream_.handle))
      throw std::runtime_error("TensorRT cannot prepare a run: " + log_.take());
    return made;
  }

  void shape(nvinfer1::IExecutionContext& context, const char* name, const nvinfer1::Dims& dims) {
    if (!context.setInputShape(name, dims))
      throw std::runtime_error(std::string(name) + ": the shape does not fit the engine: " + log_.take());
  }

  // A buffer for every tensor that has none yet; tensors of one name share theirs.
  void bind(nvinfer1::ICudaEngine& engine, nvinfer1::IExecutionContext& context, Buffers& buffers) {
    for (int i = 0; i < engine.getNbIOTensors(); ++i) {
      const char* name = engine.getIOTensorName(i);
      const size_t bytes = volume(context.getTensorShape(name)) * bytes_of(engine.getTensorDataType(name));
      const auto found = buffers.try_emplace(name, bytes).first;
      if (found->second.bytes != bytes) throw std::runtime_error(std::string(name) + ": two graphs disagree about it");
      if (!context.setTensorAddress(name, found->second.data))
        throw std::runtime_error(std::string(name) + ": " + log_.take());
    }
  }

  void run(nvinfer1::IExecutionContext& context) {
    if (!context.enqueueV3(stream_.handle)) throw std::runtime_error("TensorRT failed while running: " + log_.take());
  }

  void capture(Size& size) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_.handle, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    try {
      steps(size);
    } catch (...) {  // the stream must leave the capture before anything else can use it
      cudaStreamEndCapture(stream_.handle, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_.handle, &graph), "cudaStreamEndCapture");
    const cudaError_t made = cudaGraphInstantiateWithFlags(&size.graph, graph, 0);
    cudaGraphDestroy(graph);
    check(made, "cudaGraphInstantiateWithFlags");
  }

  void steps(Size& size) {
    const auto copy = [&](void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
      check(cudaMemcpyAsync(to, from, bytes, kind, stream_.handle), "cudaMemcpyAsync");
    };
    DeviceMemory &x = size.buffers.at("x"), &previous = size.buffers.at("previous"), &index = size.buffers.at("index");
    copy(x.data, size.noise.data, x.bytes, cudaMemcpyHostToDevice);
    check(cudaMemsetAsync(previous.data, 0, previous.bytes, stream_.handle), "cudaMemsetAsync");
    size.fresh.clear();
    size.fresh.reserve(manifest_.sigmas.size());  // the graph keeps pointers into it
    for (size_t i = 0; i < manifest_.sigmas.size(); ++i) {
      const auto* number = static_cast<const char*>(indices_->data) + i * sizeof(int64_t);
      copy(index.data, number, sizeof(int64_t), cudaMemcpyDeviceToDevice);
      run(*size.step);
      copy(x.data, size.buffers.at("next_x").data, x.bytes, cudaMemcpyDeviceToDevice);
      copy(previous.data, size.buffers.at("x0").data, x.bytes, cudaMemcpyDeviceToDevice);
      if (manifest_.sigmas[i] > 0) {
        const float* field = size.noise.data + (size.fresh.size() + 1) * size.x.count;
        size.fresh.push_back({size.x.data, field, static_cast<float>(manifest_.sigmas[i]), size.x.count});
        copy(size.x.data, x.data, x.bytes, cudaMemcpyDeviceToHost);
        check(cudaLaunchHostFunc(stream_.handle, add_fresh_noise, &size.fresh.back()), "cudaLaunchHostFunc");
        copy(x.data, size.x.data, x.bytes, cudaMemcpyHostToDevice);
      }
    }
    copy(size.x.data, x.data, x.bytes, cudaMemcpyDeviceToHost);
    copy(size.y.data, size.buffers.at("y_eps").data, x.bytes, cudaMemcpyDeviceToHost);
  }

  Manifest manifest_;
  int device_ = 0;
  Log& log_ = process_log();
  Stream stream_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;  // outlives the engines, they their contexts
  std::unique_ptr<nvinfer1::ICudaEngine> prepare_, step_;
  std::unique_ptr<DeviceMemory> indices_;
  std::list<std::unique_ptr<Size>> sizes_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const std::string& folder, const Manifest& manifest) {
  return std::make_unique<TensorRT>(folder, manifest);
}

}  // namespace dtpm
