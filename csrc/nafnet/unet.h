// The U-Net of NAFNet's blocks with AdaLN on a CPU: the parts that dtpm_fast/runtime/cpu_unet.py strings
// together. Maps are [samples][height][width][channels], contiguous; a 1x1 convolution is a matrix product.
//
// Weights come packed for the instruction set: [outputs / 2V][inputs][2V], V = lanes() floats of one vector, outputs
// padded with zeros. Where a SimpleGate follows, the 2V outputs of a panel are V of the first half and their V partners
// of the second half, so that the gate is a product of two registers.
//
// Everything is float32 but for the 1x1 and 2x2 convolutions under Isa::amx and Isa::avx512bf16: those multiply in
// bfloat16 and sum in float32. Their weights are pairs of bfloat16 numbers, of two neighbouring inputs, in the place of
// one float: [outputs / 2V][packed][2V] pairs, inputs padded with zeros. Maps that are nothing but inputs of products, the
// gated one and the condition, are bfloat16 then as well: `void*` here, float32 under the other sets.
//
// No result depends on the number of threads: every value is summed in one fixed order.
#pragma once

#include "../isa.h"

namespace nafnet {

int lanes(Isa isa);

// Rows of 2V floats, or pairs, in which a panel's weights come.
long packed(Isa isa, long inputs);

struct Shape {
    long samples, height, width, channels;
};

// One row for the whole batch (stride 0), or one for every sample.
struct Rows {
    const float* data;
    long stride;
    const float* of(long sample) const { return data + sample * stride; }
};

// Columns of the map that one work item of `first_pass` takes, and so the number of partial sums of a row.
long strip_width(const Shape& shape);

// gated = SimpleGate(depthwise3x3(conv1(LN(x) * scale + shift))), and its mean over the picture, average[sample][channel].
void first_pass(Isa isa, const Shape& shape, const float* x, Rows scale, Rows shift, const float* conv1,
                const float* conv1_bias, const float* depthwise, const float* depthwise_bias, void* gated,
                float* average, int threads);

// y = x + conv3((attention average + attention_bias) * gated), g = SimpleGate(conv4(LN(y) * scale + shift)) and, over x,
//     y + conv5 g + conv5_bias                            without an adapter: condition and adapter are null, rank 0
//     y + conv5 [adapter y + condition, g] + conv5_bias   with one: adapter = W_in, conv5 = [W_out, M conv5]
//     y + conv5 [condition, g, y] + conv5_bias            with one that is merged: conv5 = [W_out, M conv5, M - I]
// M = I + W_out W_in; condition is a map of `rank` channels, the picture's share of the adapter's inside.
void second_pass(Isa isa, const Shape& shape, float* x, const void* gated, const float* average,
                 const float* attention, const float* attention_bias, const float* conv3, const float* conv3_bias,
                 Rows scale, Rows shift, const float* conv4, const float* conv4_bias, const float* conv5,
                 const float* conv5_bias, const void* condition, const float* adapter, long rank, int threads);

// 2x2 convolution with stride 2 to twice the channels; inputs are ordered (row, column, channel).
void down(Isa isa, const Shape& shape, const float* x, const float* weight, const float* bias, float* out, int threads);

// 1x1 convolution to twice the channels, PixelShuffle(2), added to the skip; outputs are ordered (row, column, channel).
void up(Isa isa, const Shape& shape, const float* x, const float* weight, float* skip, int threads);

// 3x3 convolution of [samples][3][height][width] to the map `out`; 27 inputs, ordered (row, column, colour). What is
// added: one value for every channel (addend_pixel 0), or a map (addend_pixel = channels). With `inputs` the map is one
// of products' inputs.
void intro(Isa isa, const Shape& shape, const float* picture, const float* weight, const float* addend,
           long addend_pixel, void* out, bool inputs, int threads);

// 3x3 convolution to [samples][3][height][width]; weight[output][row][column][channel].
void ending(Isa isa, const Shape& shape, const float* x, const float* weight, const float* bias, float* picture,
            int threads);

// The sampler's two equations (dtpm_fast/runtime/sampler.py), for `values` of x and a row of its table.
void update(const float* row, long values, const float* x, const float* output, const float* previous,
            const float* y_eps, float* next, float* x0, int threads);

}  // namespace nafnet
