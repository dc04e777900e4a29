// dtpm_fast._rtv: the smoother over numpy arrays. dtpm_fast/smoothing.py is the public face and checks the arguments.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "rtv/rtv.h"

namespace py = pybind11;

namespace {

// A strided [images][height][width][channels] view of any dtype.
struct View {
    char* data;
    py::ssize_t shape[4], strides[4];
    char kind;
    py::ssize_t item;

    explicit View(const py::array& array, bool writeable) {
        if (array.ndim() != 4) throw std::invalid_argument("expected 4 dimensions");
        for (int i = 0; i < 4; ++i) shape[i] = array.shape(i), strides[i] = array.strides(i);
        kind = array.dtype().kind();
        item = array.itemsize();
        data = static_cast<char*>(writeable ? const_cast<py::array&>(array).mutable_data() : const_cast<void*>(array.data()));
    }
};

template <class T>
constexpr double unit = std::numeric_limits<T>::is_integer ? double(std::numeric_limits<T>::max()) : 1.0;

template <class T, class Real>
void read_as(const View& view, py::ssize_t image, Real* planes) {
    const Real scale = Real(1 / unit<T>);
    const char* base = view.data + image * view.strides[0];
    for (py::ssize_t h = 0; h < view.shape[1]; ++h)
        for (py::ssize_t c = 0; c < view.shape[3]; ++c) {
            const char* from = base + h * view.strides[1] + c * view.strides[3];
            Real* to = planes + (c * view.shape[1] + h) * view.shape[2];
            for (py::ssize_t w = 0; w < view.shape[2]; ++w)
                to[w] = Real(*reinterpret_cast<const T*>(from + w * view.strides[2])) * scale;
        }
}

template <class T, class Real>
void write_as(const Real* planes, const View& view, py::ssize_t image) {
    char* base = view.data + image * view.strides[0];
    for (py::ssize_t h = 0; h < view.shape[1]; ++h)
        for (py::ssize_t c = 0; c < view.shape[3]; ++c) {
            char* to = base + h * view.strides[1] + c * view.strides[3];
            const Real* from = planes + (c * view.shape[1] + h) * view.shape[2];
            for (py::ssize_t w = 0; w < view.shape[2]; ++w) {
                Real value = from[w];
                if (std::numeric_limits<T>::is_integer) {
                    value = value * Real(unit<T>) + Real(0.5);
                    value = value < 0 ? Real(0) : value > Real(unit<T>) ? Real(unit<T>) : value;
                }
                *reinterpret_cast<T*>(to + w * view.strides[2]) = T(value);
            }
        }
}

template <class Real>
void read(const View& view, py::ssize_t image, Real* planes) {
    if (view.kind == 'u' && view.item == 1) read_as<std::uint8_t>(view, image, planes);
    else if (view.kind == 'u' && view.item == 2) read_as<std::uint16_t>(view, image, planes);
    else if (view.kind == 'f' && view.item == 4) read_as<float>(view, image, planes);
    else if (view.kind == 'f' && view.item == 8) read_as<double>(view, image, planes);
    else throw std::invalid_argument("unsupported dtype");
}

template <class Real>
void write(const Real* planes, const View& view, py::ssize_t image) {
    if (view.kind == 'u' && view.item == 1) write_as<std::uint8_t>(planes, view, image);
    else if (view.kind == 'u' && view.item == 2) write_as<std::uint16_t>(planes, view, image);
    else if (view.kind == 'f' && view.item == 4) write_as<float>(planes, view, image);
    else if (view.kind == 'f' && view.item == 8) write_as<double>(planes, view, image);
    else throw std::invalid_argument("unsupported dtype");
}

using Report = std::vector<rtv::SolveReport>;

constexpr py::ssize_t team_pixels = 128 * 128;

template <class Real>
std::vector<Report> smooth_all(const View& in, const View& out, const rtv::Parameters& parameters, Isa isa,
                               int threads) {
    const py::ssize_t images = in.shape[0];
    const int height = int(in.shape[1]), width = int(in.shape[2]), channels = int(in.shape[3]);
    std::vector<Report> reports(static_cast<size_t>(images));
    std::exception_ptr failure;
    std::mutex failure_mutex;
    // Pictures [first, last), `side_by_side` at a time, each by a team of `team`.
    const auto smooth_range = [&](py::ssize_t first, py::ssize_t last, int side_by_side, int team) {
        std::atomic<py::ssize_t> next{first};
        const auto work = [&] {
            try {
                std::vector<Real> planes(size_t(height) * width * channels);
                for (py::ssize_t image; (image = next.fetch_add(1)) < last;) {
                    read(in, image, planes.data());
                    reports[size_t(image)] =
                        rtv::smooth(planes.data(), height, width, channels, parameters, isa, team);
                    write(planes.data(), out, image);
                }
            } catch (...) {
                const std::lock_guard<std::mutex> lock(failure_mutex);
                failure = std::current_exception();
                next = last;
            }
        };
        std::vector<std::thread> others;
        others.reserve(size_t(side_by_side));
        try {
            for (int i = 1; i < side_by_side; ++i) others.emplace_back(work);
        } catch (const std::exception&) {  // no more threads here, or no memory for one: those that run take all
        }
        work();
        for (auto& other : others) other.join();
    };
    // Whole pictures side by side need no synchronisation. The few that are left over at the end are shared by teams,
    // unless they are so small that the waiting costs more than the help.
    const py::ssize_t together = images - images % threads, left = images - together;
    if (together > 0) smooth_range(0, together, threads, 1);
    if (left > 0 && !failure) {
        const int team = py::ssize_t(height) * width < team_pixels ? 1 : threads / int(left);
        smooth_range(together, images, int(left), team);
    }
    if (failure) std::rethrow_exception(failure);
    return reports;
}

std::vector<std::vector<std::tuple<int, double>>> smooth(const py::array& image, const py::array& out, double lam,
                                                         double sigma, double sharpness, int iterations,
                                                         const std::string& solver, const std::string& mode, double tol,
                                                         int threads, const std::string& isa_name) {
    rtv::Parameters parameters;
    parameters.lam = lam;
    parameters.sigma = sigma;
    parameters.sharpness = sharpness;
    parameters.iterations = iterations;
    parameters.tol = tol;
    parameters.mode = mode == "exact" ? rtv::Mode::exact : rtv::Mode::matlab_pcg;
    parameters.solver = solver == "mic" ? rtv::Solver::mic : rtv::Solver::direct;
    const Isa isa = isa_name == "auto" ? best_isa() : isa_named(isa_name);
    const View in(image, false), to(out, true);
    std::vector<Report> reports;
    {
        const py::gil_scoped_release unlocked;
        reports = in.item == 8 ? smooth_all<double>(in, to, parameters, isa, threads)
                               : smooth_all<float>(in, to, parameters, isa, threads);
    }
    std::vector<std::vector<std::tuple<int, double>>> result;
    for (const Report& report : reports) {
        result.emplace_back();
        for (const rtv::SolveReport& solve : report) result.back().emplace_back(solve.iterations, solve.residual);
    }
    return result;
}

}  // namespace

PYBIND11_MODULE(_rtv, module) {
    module.def("smooth", &smooth, py::arg("image"), py::arg("out"), py::kw_only(), py::arg("lam"), py::arg("sigma"),
               py::arg("sharpness"), py::arg("iterations"), py::arg("solver"), py::arg("mode"), py::arg("tol"),
               py::arg("threads"), py::arg("isa"),
               "Smooth [images, height, width, 1 or 3] into `out`; (iterations, residual) per solve and picture.");
    module.def("instruction_sets", [] {
        std::vector<std::string> names{"portable"};
        if (supports(Isa::avx2)) names.emplace_back("avx2");
        if (supports(Isa::avx512)) names.emplace_back("avx512");
        return names;
    });
}
