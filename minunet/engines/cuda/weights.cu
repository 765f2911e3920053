// Weights as the convolutions want them: what a block reads in one step lies together.
//
// Specification. Of the input channels of a convolution 16 bytes make a part (E elements), four parts a panel; of its
// output channels TILE make a tile, as many as a block of the kernel has room for. Then
//
//     forward    [tap][panel][tile][part][o in the tile][c in the part] = weight [tap][c][o]
//     grad_input [tap][panel][tile][part][c in the tile][o in the part] = weight [tap][c][o]
//
// with zeros where c or o is beyond the last channel. The second is for the grad-input, whose input channels are the o
// and whose output channels are the c; a 3x3 convolution's reads the taps in reverse order (conv.cuh). For windows.cu
// `forward` is that of one tap with taps * in_channels input channels: the same numbers. Once a step, since the
// optimiser has changed them.
//
// Idea: a thread makes one part of 16 bytes, neighbours in a warp being neighbours in the tile: what they write lies
// together.
//
// Cost: 8 bytes read and two elements written a weight; 34.5 M weights in TF32: 552 MB, 0.18 ms at 3 TB/s; the second
// reading comes from the L2 cache, mostly.
#include "element.cuh"

// One of the two: `ins` channels are summed over, `outs` lie in tiles. weight[tap][i * in_stride + o * out_stride].
__device__ __forceinline__ void lay_out(const float* weight, element* to, int place, int taps, int ins, int outs,
                                        int in_stride, int out_stride, int tile) {
    const int panels = (ins + 4 * ELEMENTS - 1) / (4 * ELEMENTS), tiles = (outs + tile - 1) / tile;
    if (place >= taps * panels * tiles * 4 * tile) return;
    int rest = place;
    const int in_tile = rest % tile;
    rest /= tile;
    const int part = rest % 4;
    rest /= 4;
    const int o = rest % tiles * tile + in_tile;
    rest /= tiles;
    const int first = (rest % panels * 4 + part) * ELEMENTS, tap = rest / panels;
    const float* from = weight + static_cast<size_t>(tap) * ins * outs + static_cast<size_t>(o) * out_stride;
    float values[ELEMENTS];
    const bool aligned = ins % 4 == 0 && reinterpret_cast<size_t>(weight) % 16 == 0;
    if (in_stride == 1 && aligned && first + ELEMENTS <= ins && o < outs) {  // they lie together, too
#pragma unroll
        for (int e = 0; e < ELEMENTS; e += 4)
            *reinterpret_cast<float4*>(values + e) = *reinterpret_cast<const float4*>(from + first + e);
    } else {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e)
            values[e] = first + e < ins && o < outs ? from[static_cast<size_t>(first + e) * in_stride] : 0.0f;
    }
    reinterpret_cast<Pack*>(to)[place] = to_factors(values);
}

// forward_tile, grad_input_tile: the channels of a tile of the kernel that reads the one or the other. windows: whether
// the forward convolution is one of windows.
extern "C" __global__ void __launch_bounds__(256)
    prepare_weight(const float* __restrict__ weight, element* __restrict__ forward, element* __restrict__ grad_input,
                   int taps, int in_channels, int out_channels, int forward_tile, int grad_input_tile, int windows) {
    const int place = blockIdx.x * 256 + threadIdx.x;
    const int forward_taps = windows ? 1 : taps, forward_ins = windows ? taps * in_channels : in_channels;
    lay_out(weight, forward, place, forward_taps, forward_ins, out_channels, out_channels, 1, forward_tile);
    lay_out(weight, grad_input, place, taps, out_channels, in_channels, 1, out_channels, grad_input_tile);
}
