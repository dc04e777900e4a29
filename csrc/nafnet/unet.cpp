#include "unet.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nafnet {
namespace {

struct Free {
    void operator()(float* pointer) const { std::free(pointer); }
};

// Memory that stays from call to call, on a cache line. Null where the system has none.
class Workspace {
public:
    float* take(long floats) {
        if (floats > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(floats + 15) / 16 * 64)));
            size_ = memory_ ? floats : 0;
        }
        return memory_.get();
    }

private:
    std::unique_ptr<float[], Free> memory_;
    long size_ = 0;
};

float* scratch(long floats) {  // of this thread
    static thread_local Workspace workspace;
    return workspace.take(floats);
}

float* shared(long floats) {  // of all threads of a call; taken before they begin
    static thread_local Workspace workspace;
    float* memory = workspace.take(floats);
    return memory ? memory : throw std::bad_alloc();
}

namespace portable {
#include "products.h"
#include "engine.h"
}

#if defined(__x86_64__)
#include "../target/avx2.h"
namespace avx2 {
#include "products.h"
#include "engine.h"
}
#include "../target/end.h"
#include "../target/avx512.h"
namespace avx512 {
#include "products.h"
#include "engine.h"
}
#include "../target/end.h"
#include "../target/avx512bf16.h"
namespace avx512bf16 {
#include "products.h"
#include "pairs.h"
#include "dots.h"
#ifdef HAVE_TILES
#include "tiles.h"
#endif
#include "engine.h"
}
#include "../target/end.h"
#endif

// Calls `part` of the engine for an instruction set.
#ifdef HAVE_TILES
#define DISPATCH_AMX(part, ...) \
    if (isa == Isa::amx) return avx512bf16::Engine<avx512bf16::TileProducts>::part(__VA_ARGS__)
#else
#define DISPATCH_AMX(part, ...)
#endif
#if defined(__x86_64__)
#define DISPATCH(part, ...)                                                                                 \
    DISPATCH_AMX(part, __VA_ARGS__);                                                                        \
    if (isa == Isa::avx512bf16) return avx512bf16::Engine<avx512bf16::DotProducts>::part(__VA_ARGS__);      \
    if (isa == Isa::avx512) return avx512::Engine<avx512::FloatProducts<16, 8>>::part(__VA_ARGS__);         \
    if (isa == Isa::avx2) return avx2::Engine<avx2::FloatProducts<8, 6>>::part(__VA_ARGS__);                \
    return portable::Engine<portable::FloatProducts<4, 4>>::part(__VA_ARGS__)
#else  // 32 registers of four floats
#define DISPATCH(part, ...) return portable::Engine<portable::FloatProducts<4, 8>>::part(__VA_ARGS__)
#endif

}  // namespace

int lanes(Isa isa) { return isa == Isa::avx2 ? 8 : isa == Isa::portable ? 4 : 16; }

long packed([[maybe_unused]] Isa isa, long inputs) {
#if defined(__x86_64__)
    if (in_bfloat16(isa)) return avx512bf16::PairProducts::packed(inputs);
#endif
    return inputs;
}

long strip_width(const Shape& shape) {
    // Three rows of conv1's output, 2C channels each, stay in half a megabyte of cache.
    const long fits = std::max(64L, (384L << 10) / (3 * 2 * shape.channels * long(sizeof(float))));
    const long strips = (shape.width + fits - 1) / fits;
    return (shape.width + strips - 1) / strips;
}

void first_pass(Isa isa, const Shape& shape, const float* x, Rows scale, Rows shift, const float* conv1,
                const float* conv1_bias, const float* depthwise, const float* depthwise_bias, void* gated,
                float* average, int threads) {
    DISPATCH(first_pass, shape, x, scale, shift, conv1, conv1_bias, depthwise, depthwise_bias, gated, average, threads);
}

void second_pass(Isa isa, const Shape& shape, float* x, const void* gated, const float* average,
                 const float* attention, const float* attention_bias, const float* conv3, const float* conv3_bias,
                 Rows scale, Rows shift, const float* conv4, const float* conv4_bias, const float* conv5,
                 const float* conv5_bias, const void* condition, const float* adapter, long rank, int threads) {
    DISPATCH(second_pass, shape, x, gated, average, attention, attention_bias, conv3, conv3_bias, scale, shift, conv4,
             conv4_bias, conv5, conv5_bias, condition, adapter, rank, threads);
}

void down(Isa isa, const Shape& shape, const float* x, const float* weight, const float* bias, float* out,
          int threads) {
    DISPATCH(down, shape, x, weight, bias, out, threads);
}

void up(Isa isa, const Shape& shape, const float* x, const float* weight, float* skip, int threads) {
    DISPATCH(up, shape, x, weight, skip, threads);
}

void intro(Isa isa, const Shape& shape, const float* picture, const float* weight, const float* addend,
           long addend_pixel, void* out, bool inputs, int threads) {
    DISPATCH(intro, shape, picture, weight, addend, addend_pixel, out, inputs, threads);
}

void ending(Isa isa, const Shape& shape, const float* x, const float* weight, const float* bias, float* picture,
            int threads) {
    DISPATCH(ending, shape, x, weight, bias, picture, threads);
}

void update(const float* row, long values, const float* x, const float* output, const float* previous,
            const float* y_eps, float* next, float* x0, int threads) {
    const float x0_x = row[1], x0_f = row[2], a = row[3], b = row[4], c = row[5], limit = row[6];
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < values; ++i) {
        const float low = -limit - y_eps[i], high = limit - y_eps[i];
        float value = x0_x * x[i] + x0_f * output[i];
        value = value < low ? low : value;
        value = value > high ? high : value;
        x0[i] = value;
        next[i] = a * x[i] + b * value + c * previous[i];
    }
}

}  // namespace nafnet
