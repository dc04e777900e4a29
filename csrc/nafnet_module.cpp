// dtpm_fast._nafnet: the U-Net's parts over numpy arrays, contiguous and float32 (weights also pairs of bfloat16), but for
// maps of products' inputs, which hold the bits of bfloat16 numbers as int16 where the instruction set multiplies those.
// dtpm_fast/runtime/cpu_unet.py packs the weights and strings the parts together.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "nafnet/unet.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<float, py::array::c_style>;

long up_to(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

// Every size is checked: what is beyond an array is never read.
void check_size(const py::array& array, long size, const char* what) {
    if (array.size() != size)
        throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(size) + " values, got " +
                                    std::to_string(array.size()));
}

const float* sized(const Array& array, long size, const char* what) {
    check_size(array, size, what);
    return array.data();
}

float* sized(Array& array, long size, const char* what) {
    sized(static_cast<const Array&>(array), size, what);
    return array.mutable_data();
}

// A map of products' inputs.
const void* inputs(const py::array& array, Isa isa, long size, const char* what) {
    if (!(in_bfloat16(isa) ? py::isinstance<py::array_t<std::int16_t, py::array::c_style>>(array)
                           : py::isinstance<Array>(array)))
        throw py::type_error(std::string(what) + ": expected a contiguous array of " +
                             (in_bfloat16(isa) ? "int16, the bits of bfloat16 numbers" : "float32"));
    check_size(array, size, what);
    return array.data();
}

void* inputs(py::array& array, Isa isa, long size, const char* what) {
    inputs(static_cast<const py::array&>(array), isa, size, what);
    return array.mutable_data();
}

// The shape of a map [samples, height, width, channels] whose channels fill vectors.
nafnet::Shape shape_of(const py::array& map, Isa isa) {
    if (map.ndim() != 4 || map.size() == 0) throw std::invalid_argument("a map has 4 dimensions and is not empty");
    if (map.shape(3) % nafnet::lanes(isa))
        throw std::invalid_argument("channels: " + std::to_string(map.shape(3)) + " is no multiple of " +
                                    std::to_string(nafnet::lanes(isa)));
    return {long(map.shape(0)), long(map.shape(1)), long(map.shape(2)), long(map.shape(3))};
}

nafnet::Rows rows_of(const Array& rows, const nafnet::Shape& s, const char* what) {
    if (rows.size() == s.channels) return {rows.data(), 0};
    return {sized(rows, s.samples * s.channels, what), s.channels};
}

Isa set_named(const std::string& name) {
    if (name != "amx" && name != "avx512bf16") return isa_named(name);
    const Isa isa = name == "amx" ? Isa::amx : Isa::avx512bf16;
    return supports(isa) ? isa : throw std::runtime_error("this CPU has no " + name);
}

int checked(int threads) { return threads > 0 ? threads : throw std::invalid_argument("threads: must be positive"); }

void first_pass(const Array& x, const Array& scale, const Array& shift, const Array& conv1, const Array& conv1_bias,
                const Array& depthwise, const Array& depthwise_bias, py::array gated, Array average, int threads,
                const std::string& name) {
    const Isa isa = set_named(name);
    const nafnet::Shape s = shape_of(x, isa);
    const long c = s.channels, pixels = s.samples * s.height * s.width;
    const nafnet::Rows scales = rows_of(scale, s, "scale"), shifts = rows_of(shift, s, "shift");
    const float* w1 = sized(conv1, 2 * c * nafnet::packed(isa, c), "conv1");
    const float* b1 = sized(conv1_bias, 2 * c, "conv1_bias");
    const float* w2 = sized(depthwise, 18 * c, "depthwise");
    const float* b2 = sized(depthwise_bias, 2 * c, "depthwise_bias");
    void* out = inputs(gated, isa, pixels * c, "gated");
    float* means = sized(average, s.samples * c, "average");
    const py::gil_scoped_release unlocked;
    nafnet::first_pass(isa, s, x.data(), scales, shifts, w1, b1, w2, b2, out, means, checked(threads));
}

void second_pass(Array x, const py::array& gated, const Array& average, const Array& attention, const Array& attention_bias,
                 const Array& conv3, const Array& conv3_bias, const Array& scale, const Array& shift,
                 const Array& conv4, const Array& conv4_bias, const Array& conv5,
                 const Array& conv5_bias, const std::optional<py::array>& condition, const std::optional<Array>& adapter,
                 int threads, const std::string& name) {
    const Isa isa = set_named(name);
    const nafnet::Shape s = shape_of(x, isa);
    const long c = s.channels, size = s.samples * s.height * s.width * c, wide = up_to(c, 2 * nafnet::lanes(isa));
    const long rows = nafnet::packed(isa, c), rank = condition ? long(condition->size()) / (size / c) : 0;
    if (rank % ((adapter ? 2 : 1) * nafnet::lanes(isa)) || (adapter && !condition))
        throw std::invalid_argument("condition: its channels must fill vectors, with an adapter panels of two");
    const void* map = condition ? inputs(*condition, isa, size / c * rank, "condition") : nullptr;
    const float* w_in = adapter ? sized(*adapter, rank * rows, "adapter") : nullptr;
    const float* b5 = sized(conv5_bias, c, "conv5_bias");
    const nafnet::Rows scales = rows_of(scale, s, "scale"), shifts = rows_of(shift, s, "shift");
    const void* from = inputs(gated, isa, size, "gated");
    const float* means = sized(average, s.samples * c, "average");
    const float* w = sized(attention, c * c, "attention");
    const float* b = sized(attention_bias, c, "attention_bias");
    const float* w3 = sized(conv3, wide * rows, "conv3");
    const float* b3 = sized(conv3_bias, c, "conv3_bias");
    const float* w4 = sized(conv4, 2 * c * rows, "conv4");
    const float* b4 = sized(conv4_bias, 2 * c, "conv4_bias");
    const float* w5 = sized(conv5, wide * nafnet::packed(isa, rank + (map && !w_in ? 2 * c : c)), "conv5");
    float* to = x.mutable_data();
    const py::gil_scoped_release unlocked;
    nafnet::second_pass(isa, s, to, from, means, w, b, w3, b3, scales, shifts, w4, b4, w5, b5, map, w_in, rank,
                        checked(threads));
}

void down(const Array& x, const Array& weight, const Array& bias, Array out, int threads, const std::string& name) {
    const Isa isa = set_named(name);
    const nafnet::Shape s = shape_of(x, isa);
    if (s.height % 2 || s.width % 2) throw std::invalid_argument("down: height and width must be even");
    const float* w = sized(weight, 2 * s.channels * nafnet::packed(isa, 4 * s.channels), "weight");
    const float* b = sized(bias, 2 * s.channels, "bias");
    float* to = sized(out, s.samples * s.height * s.width * s.channels / 2, "out");
    const py::gil_scoped_release unlocked;
    nafnet::down(isa, s, x.data(), w, b, to, checked(threads));
}

void up(const Array& x, const Array& weight, Array skip, int threads, const std::string& name) {
    const Isa isa = set_named(name);
    const nafnet::Shape s = shape_of(x, isa);
    if (s.channels % (2 * nafnet::lanes(isa))) throw std::invalid_argument("up: half the channels must fill vectors");
    const float* w = sized(weight, 2 * s.channels * nafnet::packed(isa, s.channels), "weight");
    float* to = sized(skip, s.samples * s.height * s.width * s.channels * 2, "skip");
    const py::gil_scoped_release unlocked;
    nafnet::up(isa, s, x.data(), w, to, checked(threads));
}

void intro(const Array& picture, const Array& weight, const Array& addend, py::array out, int threads,
           const std::string& name) {
    const Isa isa = set_named(name);
    const nafnet::Shape s = shape_of(out, isa);
    const float* from = sized(picture, s.samples * 3 * s.height * s.width, "picture");
    const float* w = sized(weight, 27 * up_to(s.channels, 2 * nafnet::lanes(isa)), "weight");
    const bool bias = addend.size() == s.channels;
    const float* add = bias ? addend.data() : sized(addend, s.samples * s.height * s.width * s.channels, "addend");
    const bool narrow = !py::isinstance<Array>(out);
    void* to = inputs(out, narrow ? isa : Isa::portable, long(out.size()), "out");
    const py::gil_scoped_release unlocked;
    nafnet::intro(isa, s, from, w, add, bias ? 0 : s.channels, to, narrow, checked(threads));
}

void ending(const Array& x, const Array& weight, const Array& bias, Array picture, int threads,
            const std::string& name) {
    const Isa isa = set_named(name);
    const nafnet::Shape s = shape_of(x, isa);
    const float* w = sized(weight, 27 * s.channels, "weight");
    const float* b = sized(bias, 3, "bias");
    float* to = sized(picture, s.samples * 3 * s.height * s.width, "picture");
    const py::gil_scoped_release unlocked;
    nafnet::ending(isa, s, x.data(), w, b, to, checked(threads));
}

void update(const Array& row, const Array& x, const Array& output, const Array& previous, const Array& y_eps,
            Array next, Array x0, int threads) {
    const long values = long(x.size());
    const float* table = sized(row, 7, "row");
    const float* f = sized(output, values, "output");
    const float* before = sized(previous, values, "previous");
    const float* y = sized(y_eps, values, "y_eps");
    float* to = sized(next, values, "next");
    float* estimate = sized(x0, values, "x0");
    const py::gil_scoped_release unlocked;
    nafnet::update(table, values, x.data(), f, before, y, to, estimate, checked(threads));
}

}  // namespace

PYBIND11_MODULE(_nafnet, module) {
    // Outputs are written in place, so no argument may be converted: a wrong dtype or layout is a TypeError.
    const auto given = [](const char* name) { return py::arg(name).noconvert(); };
    module.def("first_pass", &first_pass, given("x"), given("scale"), given("shift"), given("conv1"),
               given("conv1_bias"), given("depthwise"), given("depthwise_bias"), given("gated"), given("average"),
               py::arg("threads"), py::arg("isa"));
    module.def("second_pass", &second_pass, given("x"), given("gated"), given("average"), given("attention"),
               given("attention_bias"), given("conv3"), given("conv3_bias"), given("scale"), given("shift"), given("conv4"), given("conv4_bias"), given("conv5"),
               given("conv5_bias"), given("condition"), given("adapter"), py::arg("threads"), py::arg("isa"));
    module.def("down", &down, given("x"), given("weight"), given("bias"), given("out"), py::arg("threads"),
               py::arg("isa"));
    module.def("up", &up, given("x"), given("weight"), given("skip"), py::arg("threads"), py::arg("isa"));
    module.def("intro", &intro, given("picture"), given("weight"), given("addend"), given("out"), py::arg("threads"),
               py::arg("isa"));
    module.def("ending", &ending, given("x"), given("weight"), given("bias"), given("picture"), py::arg("threads"),
               py::arg("isa"));
    module.def("update", &update, given("row"), given("x"), given("output"), given("previous"), given("y_eps"),
               given("next"), given("x0"), py::arg("threads"));
    module.def("strip_width", [](long height, long width, long channels) {
        return nafnet::strip_width({1, height, width, channels});
    });
    // Each with its lanes, the best first; for bfloat16, those that multiply it.
    module.def("instruction_sets", [](bool bfloat16) {
        std::vector<std::pair<std::string, int>> found;
        for (const auto& [name, isa] : {std::pair{"amx", Isa::amx}, {"avx512bf16", Isa::avx512bf16}, {"avx512", Isa::avx512},
                                        {"avx2", Isa::avx2}, {"portable", Isa::portable}})
            if (supports(isa) && in_bfloat16(isa) == bfloat16) found.emplace_back(name, nafnet::lanes(isa));
        return found;
    }, py::arg("bfloat16") = false);
}
