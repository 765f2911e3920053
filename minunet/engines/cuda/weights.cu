// Weights as the convolutions want them: 16 bytes of input channels together, and these for all output channels.
//
// Specification, with E elements in 16 bytes: forward [tap][c / E][o][c % E] = grad_input [tap][o / E][c][o % E] =
// weight [tap][c][o], with zeros where c or o is beyond the last channel; both are padded to whole panels of four times
// 16 bytes. (The grad-input of a 3x3 convolution reads its taps in reverse order, conv.cuh.) Once a step, since the
// optimiser has changed them.
//
// Idea: a thread makes 16 bytes of one of the two, neighbours in a warp being neighbours in the other channel: what
// they write lies together. Cost: 8 bytes read and two elements written a weight; 34.5 M weights in TF32: 552 MB, 0.18
// ms at 3 TB/s; the second reading comes from the L2 cache, mostly.
#include "element.cuh"

extern "C" __global__ void __launch_bounds__(256)
    prepare_weight(const float* __restrict__ weight, element* __restrict__ forward, element* __restrict__ grad_input,
                   int taps, int in_channels, int out_channels, int in_parts, int out_parts) {
    const int place = blockIdx.x * 256 + threadIdx.x, count = taps * in_parts * out_channels;
    Pack pack;
    if (place < count) {
        const int o = place % out_channels, part = place / out_channels % in_parts,
                  tap = place / out_channels / in_parts;
        for (int e = 0; e < ELEMENTS; ++e) {
            const int c = part * ELEMENTS + e;
            const size_t from = (static_cast<size_t>(tap) * in_channels + c) * out_channels + o;
            pack.e[e] = to_factor(c < in_channels ? weight[from] : 0.0f);
        }
        reinterpret_cast<Pack*>(forward)[place] = pack;
    }
    if (place < taps * out_parts * in_channels) {
        const int c = place % in_channels, part = place / in_channels % out_parts,
                  tap = place / in_channels / out_parts;
        for (int e = 0; e < ELEMENTS; ++e) {
            const int o = part * ELEMENTS + e;
            const size_t from = (static_cast<size_t>(tap) * in_channels + c) * out_channels + o;
            pack.e[e] = to_factor(o < out_channels ? weight[from] : 0.0f);
        }
        reinterpret_cast<Pack*>(grad_input)[place] = pack;
    }
}
