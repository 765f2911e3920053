// What the two kernels of the gradient of the weights share: which block sums what, and how its pixels are loaded.
//
// Before it is included stand: PATCH_SIDE and PIXEL_SIDE, so many channels of the patch and of the pixels has a block,
// and ROWS of a tile of pixels (kernels.py).
#pragma once
#include "element.cuh"

constexpr int COLUMNS = 16, PIXELS = ROWS * COLUMNS, PATCH_COLUMNS = COLUMNS + 2, PATCH = (ROWS + 2) * PATCH_COLUMNS;
constexpr int PATCH_PARTS = PATCH_SIDE / ELEMENTS, PIXEL_PARTS = PIXEL_SIDE / ELEMENTS;  // of 16 bytes, a pixel

// The arguments. patch: pixels of patch_pitch elements, of which the first patch_channels are read: x, or (transposed)
// dy. pixels: the other one of the two; of images x height x width pixels. partials [split][tap][...]: element (patch
// channel m, pixel channel n) of a tap is at m * patch_stride + n * pixel_stride.
struct Product {
    const element* patch;
    int patch_pitch, patch_channels;
    const element* pixels;
    int pixel_pitch, pixel_channels, images, height, width, transposed, kernel, splits, patch_stride, pixel_stride;
    float* partials;
};

// What a block works on: its channels, its share of the tiles of pixels, and its taps: at the offsets first, first + 1,
// ... from a pixel lie so many, and tap (i, j) is the kernel's (start_row + spacing i, start_column + spacing j).
struct Share {
    int first_m, first_n, split, first_tile, last_tile, tiles_across;
    int step, parity, first, spacing, tap_rows, tap_columns, start_row, start_column;
};

__device__ __forceinline__ Share share_of(const Product& p) {
    const int patch_blocks = (p.patch_channels + PATCH_SIDE - 1) / PATCH_SIDE;
    const int pixel_blocks = (p.pixel_channels + PIXEL_SIDE - 1) / PIXEL_SIDE;
    Share s;
    int rest = blockIdx.x;
    s.first_m = rest % patch_blocks * PATCH_SIDE;
    rest /= patch_blocks;
    s.first_n = rest % pixel_blocks * PIXEL_SIDE;
    rest /= pixel_blocks;
    s.split = rest % p.splits;
    s.parity = rest / p.splits;
    s.tiles_across = (p.width + COLUMNS - 1) / COLUMNS;
    const long long tiles = static_cast<long long>((p.images * (p.height + 1) + ROWS - 1) / ROWS) * s.tiles_across;
    s.first_tile = static_cast<int>(tiles * s.split / p.splits);
    s.last_tile = static_cast<int>(tiles * (s.split + 1) / p.splits);
    s.step = s.spacing = p.transposed ? 2 : 1;
    s.first = p.transposed ? 0 : -1;
    s.start_row = p.transposed ? s.parity / 2 : 0;
    s.start_column = p.transposed ? s.parity % 2 : 0;
    s.tap_rows = !p.transposed ? 3 : s.start_row ? 1 : p.kernel - 1;
    s.tap_columns = !p.transposed ? 3 : s.start_column ? 1 : p.kernel - 1;
    return s;
}

// place [PATCH + PIXELS]: where each pixel of the tile's patch is, then each of its pixels; -1: nowhere, it is a zero.
// Images are stacked as in conv.cuh. Done by `workers` threads, of which this is number `worker`.
__device__ __forceinline__ void locate_tile(const Product& p, const Share& s, int tile, int* place, int worker,
                                            int workers) {
    if (tile >= s.last_tile) return;
    const int first_row = tile / s.tiles_across * ROWS, first_column = tile % s.tiles_across * COLUMNS;
    const int first_image = first_row / (p.height + 1), first_i = first_row % (p.height + 1);
    for (int q = worker; q < PATCH + PIXELS; q += workers) {
        const bool in_patch = q < PATCH;
        int image = first_image, i = first_i + (in_patch ? q / PATCH_COLUMNS - 1 : (q - PATCH) / COLUMNS);
        const int j = first_column + (in_patch ? q % PATCH_COLUMNS - 1 : (q - PATCH) % COLUMNS);
        while (i > p.height) i -= p.height + 1, ++image;
        const bool inside = i >= 0 && i < p.height && image < p.images && j >= 0 && j < p.width;
        const int patch_row = (image * p.height + i) * s.step + s.start_row;
        place[q] = !inside    ? -1
                   : in_patch ? patch_row * s.step * p.width + j * s.step + s.start_column
                              : (image * p.height + i) * p.width + j;
    }
}

// Begins to copy `channels` channels, from `first_channel` on, of those `pixels` whose places are given. to(pixel,
// part): where 16 bytes go in shared memory. Four places are read before the four copies: one need not wait for the
// other.
template <int PARTS, class To>
__device__ __forceinline__ void load_pixels(const element* image, int pitch, int channels, int first_channel,
                                            const int* place, int pixels, int worker, int workers, To to) {
    constexpr int AT_ONCE = 4;
    const int part = worker % PARTS, channel = first_channel + part * ELEMENTS, stride = workers / PARTS;
    const int count = max(0, min(channels - channel, ELEMENTS));
    const element* from = count > 0 ? image + channel : image;
    const bool aligned = pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(image) % 16 == 0;
    for (int first = worker / PARTS; first < pixels; first += AT_ONCE * stride) {
        int at[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) at[k] = first + k * stride < pixels ? place[first + k * stride] : -1;
        if (!aligned) {
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (first + k * stride < pixels)
                    copy_one_by_one(to(first + k * stride, part), from + static_cast<size_t>(max(at[k], 0)) * pitch,
                                    at[k] < 0 ? 0 : count);
            continue;
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
            if (first + k * stride < pixels)
                copy_async(to(first + k * stride, part), from + static_cast<size_t>(max(at[k], 0)) * pitch,
                           at[k] < 0 ? 0 : count * static_cast<int>(sizeof(element)));
    }
}

// Begins to copy a tile.
template <class PatchPart, class PixelPart>
__device__ __forceinline__ void load_tile(const Product& p, const Share& s, int tile, const int* place, int worker,
                                          int workers, PatchPart patch_part, PixelPart pixel_part) {
    if (tile >= s.last_tile) return;
    load_pixels<PATCH_PARTS>(p.patch, p.patch_pitch, p.patch_channels, s.first_m, place, PATCH, worker, workers,
                             patch_part);
    load_pixels<PIXEL_PARTS>(p.pixels, p.pixel_pitch, p.pixel_channels, s.first_n, place + PATCH, PIXELS, worker,
                             workers, pixel_part);
}

// Writes 16 rows x so many times 8 sums of a tap, spread over a warp as in ptx.cuh, from patch channel m and pixel
// channel n on.
template <int EIGHTS>
__device__ __forceinline__ void write_sums(const Product& p, const Share& s, int tap_row, int tap_column, int m, int n,
                                           const float (&sum)[EIGHTS][4]) {
    const int lane = threadIdx.x % 32;
    const int tap = (s.start_row + s.spacing * tap_row) * p.kernel + s.start_column + s.spacing * tap_column;
    const size_t size = static_cast<size_t>(p.patch_channels) * p.pixel_channels;
    float* to = p.partials + (static_cast<size_t>(s.split) * p.kernel * p.kernel + tap) * size;
#pragma unroll
    for (int f = 0; f < EIGHTS; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = m + lane / 4 + i / 2 * 8, column = n + 8 * f + lane % 4 * 2 + i % 2;
            if (row < p.patch_channels && column < p.pixel_channels)
                to[static_cast<size_t>(row) * p.patch_stride + static_cast<size_t>(column) * p.pixel_stride] =
                    sum[f][i];
        }
}
