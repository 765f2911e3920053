// Weights as the convolutions want them: the input channels of a tap side by side, rounded to elements.
// Not yet run on a GPU: emulated (tests/cuda), and compiled.
//
// Specification: forward [tap][o][c] = grad_input [tap][c][o] = weight [tap][c][o], with zeros where c or o is beyond
// the last channel. (conv.cu reads the taps of grad_input in reverse order.) Once a step, since the optimiser has
// changed them.
//
// Idea: a block transposes 32 x 32 numbers of one tap through shared memory, so that reads and writes are both in rows.
// Cost: 4 bytes read and two elements written a weight; 34.5 M weights in TF32: 414 MB, 0.14 ms at 3 TB/s.
#include "element.cuh"

extern "C" __global__ void __launch_bounds__(256)
    prepare_weight(const float* __restrict__ weight, element* __restrict__ forward, element* __restrict__ grad_input,
                   int in_channels, int out_channels, int in_pitch, int out_pitch) {
    __shared__ element tile[32][33];  // 33: a column then lies in 32 different banks
    const int tiles_c = (in_pitch + 31) / 32, tiles_o = (out_pitch + 31) / 32;
    const int tap = blockIdx.x / (tiles_c * tiles_o), rest = blockIdx.x % (tiles_c * tiles_o);
    const int first_c = rest / tiles_o * 32, first_o = rest % tiles_o * 32, column = threadIdx.x % 32;

    for (int row = threadIdx.x / 32; row < 32; row += 8) {
        const int c = first_c + row, o = first_o + column;
        const bool inside = c < in_channels && o < out_channels;
        const element value =
            to_factor(inside ? weight[(static_cast<size_t>(tap) * in_channels + c) * out_channels + o] : 0.0f);
        tile[row][column] = value;
        if (c < in_channels && o < out_pitch)
            grad_input[(static_cast<size_t>(tap) * in_channels + c) * out_pitch + o] = value;
    }
    __syncthreads();
    for (int row = threadIdx.x / 32; row < 32; row += 8) {
        const int o = first_o + row, c = first_c + column;
        if (o < out_channels && c < in_pitch)
            forward[(static_cast<size_t>(tap) * out_channels + o) * in_pitch + c] = tile[column][row];
    }
}
