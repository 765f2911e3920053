// The 3x3 windows of an image of few channels, side by side: its convolution is then one tap of many channels.
//
// Specification: windows [image][i][j][tap * channels + c] = x [image][i + tap / 3 - 1][j + tap % 3 - 1][c], and zeros
// outside of the image and from channel 9 * channels on.
//
// Idea. The convolutions work on panels of 64 bytes of input channels, 16 or 32 of them. Of an image with 3 channels
// they would fill 3, and multiply nine taps that are nearly empty; and 3 channels cannot be copied by 16 bytes. The 27
// numbers of a window fill a panel, or two, once. A thread writes 16 bytes of it.
//
// Cost: memory. 64 bytes (bf16) or 128 a pixel written, and the pixels read, which the caches hold: batch 16 of 224 x
// 224 in TF32 103 MB, 0.03 ms at 3 TB/s.
#include "element.cuh"

extern "C" __global__ void __launch_bounds__(256)
    windows(const element* __restrict__ x, int x_pitch, element* __restrict__ out, int images, int height, int width,
            int channels, int parts) {
    const long long place = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
    if (place >= static_cast<long long>(images) * height * width * parts) return;
    const int part = static_cast<int>(place % parts), pixel = static_cast<int>(place / parts);
    const int j = pixel % width, i = pixel / width % height;
    Pack pack;
    for (int e = 0; e < ELEMENTS; ++e) {
        const int value = part * ELEMENTS + e, tap = value / channels, c = value % channels;
        const int row = i + tap / 3 - 1, column = j + tap % 3 - 1;
        const bool inside = tap < 9 && row >= 0 && row < height && column >= 0 && column < width;
        const int from = pixel + (tap / 3 - 1) * width + tap % 3 - 1;
        pack.e[e] = inside ? x[static_cast<size_t>(from) * x_pitch + c] : element(0);
    }
    reinterpret_cast<Pack*>(out)[place] = pack;
}
