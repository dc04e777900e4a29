// dtpm_fast._rtv_cuda: the smoother on a GPU, one thread block per picture (csrc/rtv/block_program.h). It works on
// memory that the caller owns, torch tensors in practice, on the caller's stream, and allocates nothing.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "rtv/block_program.h"

namespace py = pybind11;

namespace {

struct CudaBlock {
    __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
    __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// planes: [images][C][height][width]; workspace: [images][layout.workspace(C)]; reports: [images][iterations]
template <class Real, int C>
__global__ void __launch_bounds__(rtv::max_threads)
    smooth_pictures(Real* planes, Real* workspace, rtv::BlockReport* reports, rtv::BlockParameters parameters,
                    rtv::BlockLayout layout) {
    __shared__ rtv::Shared<Real, C> shared;
    const std::size_t picture = blockIdx.x;
    rtv::BlockProgram<Real, C, CudaBlock>(
        CudaBlock(), shared, parameters, layout, planes + picture * C * parameters.height * parameters.width,
        workspace + picture * layout.workspace(C), reports + picture * parameters.iterations)
        .run();
}

template <class Real>
void launch(std::uintptr_t planes, std::uintptr_t workspace, std::uintptr_t reports, int images, int channels,
            const rtv::BlockParameters& parameters, std::uintptr_t stream) {
    const rtv::BlockLayout layout(parameters.height, parameters.width);
    const auto kernel = channels == 1 ? smooth_pictures<Real, 1> : smooth_pictures<Real, 3>;
    kernel<<<unsigned(images), unsigned(layout.threads), 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<Real*>(planes), reinterpret_cast<Real*>(workspace),
        reinterpret_cast<rtv::BlockReport*>(reports), parameters, layout);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("rtv_smooth on CUDA: ") + cudaGetErrorString(error));
}

// Why the current device cannot run these kernels: a driver older than the CUDA runtime that was linked, or a GPU that
// none of the compiled architectures fits. Empty when it can.
std::string unusable() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, smooth_pictures<float, 3>);
    cudaGetLastError();  // else the next launch would report it
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

PYBIND11_MODULE(_rtv_cuda, module) {
    module.def("unusable", &unusable, "Why the current device cannot run the kernels; empty when it can.");
    module.def(
        "workspace", [](int height, int width, int channels) { return rtv::BlockLayout(height, width).workspace(channels); },
        "Numbers of workspace per picture.");
    module.def(
        "smooth",
        [](std::uintptr_t planes, std::uintptr_t workspace, std::uintptr_t reports, bool is_double, int images,
           int channels, int height, int width, double lam, double sigma, double sharpness, int iterations, double tol,
           std::uintptr_t stream) {
            const rtv::BlockParameters parameters{height, width, iterations, lam, sigma, sharpness, tol};
            (is_double ? launch<double> : launch<float>)(planes, workspace, reports, images, channels, parameters,
                                                         stream);
        },
        "Smooth contiguous planes [images][channels][height][width] in place, asynchronously; pointers as integers.");
}
