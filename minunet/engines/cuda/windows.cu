// The 3x3 windows of an image of few channels, side by side: its convolution is then one tap of many channels.
//
// Specification: windows [image][i][j][tap * channels + c] = x [image][i + tap / 3 - 1][j + tap % 3 - 1][c], and zeros
// outside of the image and from channel 9 * channels on.
//
// Idea. The convolutions work on panels of 64 bytes of input channels, 16 or 32 of them. Of an image with 3 channels
// they would fill 3, and multiply nine taps that are nearly empty; and 3 channels cannot be copied by 16 bytes. The 27
// numbers of a window fill a panel, or two, once. A thread writes 16 bytes of it.
//
// Cost: 64 bytes (bf16) or 128 a pixel written, batch 16 of 224 x 224 in TF32 103 MB, 0.03 ms at 3 TB/s; the pixels are
// read from the caches. Its instructions take about as long.
#include "element.cuh"

// parts: of 16 bytes, of a pixel. A block has as many pixels as it has threads for.
extern "C" __global__ void __launch_bounds__(256)
    windows(const element* __restrict__ x, int x_pitch, element* __restrict__ out, int images, int height, int width,
            int channels, int parts) {
    const int pixels = 256 / parts, own = threadIdx.x / parts, part = threadIdx.x % parts;
    const int pixel = blockIdx.x * pixels + own;
    if (own >= pixels || pixel >= images * height * width) return;
    const int j = pixel % width, i = pixel / width % height;
    int tap = part * ELEMENTS / channels, c = part * ELEMENTS % channels;
    Pack pack;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
        const int down = tap / 3 - 1, right = tap % 3 - 1;
        const bool inside = tap < 9 && i + down >= 0 && i + down < height && j + right >= 0 && j + right < width;
        pack.e[e] = inside ? x[static_cast<size_t>(pixel + down * width + right) * x_pitch + c] : element(0);
        if (++c == channels) c = 0, ++tap;
    }
    reinterpret_cast<Pack*>(out)[static_cast<size_t>(pixel) * parts + part] = pack;
}
