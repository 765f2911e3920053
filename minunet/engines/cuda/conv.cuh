// What the two convolution kernels share: which taps there are, where pixels and weights lie, and how a tile is
// written. conv.cu has the idea.
//
// Before it is included stand: THREADS of a block, PIXELS and CHANNELS of its tile.
#pragma once
#include "element.cuh"

constexpr int PANEL = 4 * ELEMENTS;             // input channels of a panel: 64 bytes, four parts of 16
constexpr int TAP_ELEMENTS = CHANNELS * PANEL;  // of the weights of a tap and a panel, for the channels of a tile

// The pixels of a patch, a tile with a border of one pixel: 180 = 10 x 18 around 8 x 16 or 16 x 8 pixels, 324 = 18 x 18
// around 16 x 16, 340 = 34 x 10 around 32 x 8.
constexpr int PATCH = PIXELS == 128 ? 180 : 340, SMALLEST_PATCH = PIXELS == 128 ? 180 : 324;

enum Direction { FORWARD, GRAD_INPUT, UP, UP_GRAD_INPUT };

// The arguments of a convolution. x: pixels of x_pitch elements, of which in_channels are read. weight: as weights.cu
// lays them out, for tiles of CHANNELS output channels. y: pixels of y_pitch elements. height, width: of the smaller
// image, where x and y differ. columns_log2: the tile is 2^columns_log2 (8 or 16) pixels wide.
//
// Options, where the pointer is not null. bias is added. bits is a dropout mask, for images of mask_channels of which y
// has those from mask_first on; what is kept is multiplied by scale. partials [tile][count, mean, squares around the
// mean][out_channels] receive statistics. rounded: whether the result will be a factor of other products (to_factor).
struct Convolution {
    const element* x;
    int x_pitch;
    const element* weight;
    element* y;
    int y_pitch, images, height, width, in_channels, out_channels, direction, kernel, columns_log2;
    const float* bias;
    const unsigned short* bits;
    int mask_words, mask_channels, mask_first;
    float scale;
    float* partials;
    int rounded;

    __device__ __forceinline__ int in_step() const { return direction == UP_GRAD_INPUT ? 2 : 1; }
    __device__ __forceinline__ int out_step() const { return direction == UP ? 2 : 1; }
    __device__ __forceinline__ int patch_columns() const { return (1 << columns_log2) + 2; }
    __device__ __forceinline__ int patch_pixels() const { return ((PIXELS >> columns_log2) + 2) * patch_columns(); }
    __device__ __forceinline__ int panels() const { return (in_channels + PANEL - 1) / PANEL; }
    __device__ __forceinline__ int channel_tiles() const { return (out_channels + CHANNELS - 1) / CHANNELS; }
};

// The tile of the result that a block makes.
struct Tile {
    int number, first_channel;            // which of the tiles along the channels, and where it begins
    int parity, first_row, first_column;  // parity, for UP: of the output's rows and columns, 2 * row + column
};

// Neighbouring blocks, which run at the same time, differ in their channels first: they read the same pixels.
__device__ __forceinline__ Tile tile_of(const Convolution& c) {
    const int columns = 1 << c.columns_log2;
    const int tiles_across = (c.width + columns - 1) / columns;
    Tile tile;
    int rest = blockIdx.x;
    tile.number = rest % c.channel_tiles();
    tile.first_channel = tile.number * CHANNELS;
    rest /= c.channel_tiles();
    tile.parity = c.direction == UP ? rest % 4 : 0;
    if (c.direction == UP) rest /= 4;
    tile.first_column = rest % tiles_across * columns;
    tile.first_row = rest / tiles_across * (PIXELS >> c.columns_log2);
    return tile;
}

// The taps along one axis, say down: which rows of x, counted from the output pixel's own, meet which rows of the
// kernel. They are the `count` rows a = first, first + 1, ..., and row a meets the kernel's row start + step * a.
struct Axis {
    int first, count, start, step;
};

// parity: for UP that of the output's row, for UP_GRAD_INPUT that of the class of rows of dy that is read; a then
// counts the rows of this class.
__device__ __forceinline__ Axis axis_of(int direction, int kernel, int parity) {
    if (kernel == 1) return {0, 1, 0, 0};                // of windows.cu
    if (direction == FORWARD) return {-1, 3, 1, 1};      // rows -1, 0, 1 meet the kernel's 0, 1, 2
    if (direction == GRAD_INPUT) return {-1, 3, 1, -1};  // 2, 1, 0: the flipped kernel
    if (parity == 1) return {0, 1, 1, 0};                // row 0 meets 1
    // Of a kernel of 3, for UP: rows -1, 0 meet 2, 0. For UP_GRAD_INPUT: rows 0, 1 meet 0, 2.
    if (direction == UP) return kernel == 3 ? Axis{-1, 2, 0, -2} : Axis{0, 1, 0, 0};
    return {0, kernel - 1, 0, 2};
}

// pixel_of[p]: where pixel p of the patch lies in x; -1: nowhere, it is a zero. Images lie stacked, with one row of
// zeros between them, so that a tile may cover parts of two: row R of the stack is row R % (H + 1) of image
// R / (H + 1).
__device__ __forceinline__ void locate_patch(const Convolution& c, const Tile& tile, int* pixel_of) {
    const int pixels = c.patch_pixels(), step = c.in_step();
    for (int p = threadIdx.x; p < pixels; p += THREADS) {
        const int patch_row = c.columns_log2 == 4 ? p / 18 : p / 10;  // by patch_columns(): constants divide faster
        const int row = tile.first_row + patch_row - 1;
        const int j = tile.first_column + p - patch_row * c.patch_columns() - 1;
        const int image = row / (c.height + 1), i = row % (c.height + 1);
        const bool inside = row >= 0 && image < c.images && i < c.height && j >= 0 && j < c.width;
        pixel_of[p] = inside ? ((image * c.height + i) * step * c.width + j) * step : -1;
    }
}

// Where the weights of a tap, of a panel and this tile's channels begin: TAP_ELEMENTS elements that lie together.
__device__ __forceinline__ const element* weights_of(const Convolution& c, const Tile& tile, int tap, int panel) {
    return c.weight + (static_cast<size_t>(tap * c.panels() + panel) * c.channel_tiles() + tile.number) * TAP_ELEMENTS;
}

// From how many parity classes of pixels a panel is read (four for UP_GRAD_INPUT, else all pixels are one), and how
// many pixels class `source` lies behind the place that locate_patch has found.
__device__ __forceinline__ int sources(const Convolution& c) { return c.in_step() * c.in_step(); }
__device__ __forceinline__ int source_place(const Convolution& c, int source) {
    return source / 2 * c.in_step() * c.width + source % 2;
}

// Begins to copy a patch, 16 bytes at a time: done by WORKERS threads, of which this is number `worker`; four have the
// parts of one pixel. The places of eight pixels are read together, before the copies of all eight: what costs is that
// one instruction waits for the other. to(pixel, part): where the 16 bytes go in shared memory, PIXEL_BYTES from pixel
// to pixel. For places that are multiples of 16.
template <int WORKERS, int PIXEL_BYTES, class To>
__device__ __forceinline__ void load_patch(const Convolution& c, int panel, int source, int worker, const int* pixel_of,
                                           To to) {
    constexpr int AT_ONCE = 8, STRIDE = WORKERS / 4;
    const int part = worker % 4, channel = panel * PANEL + part * ELEMENTS, pixels = c.patch_pixels();
    const bool exists = channel < c.in_channels;
    const int pitch = c.x_pitch * static_cast<int>(sizeof(element));
    const element* from = address_of(c.x, source_place(c, source), pitch) + (exists ? channel : 0);
    unsigned char* const first_to = address_of(to(0, part), worker / 4, PIXEL_BYTES);
#pragma unroll
    for (int first = 0; first < PATCH; first += AT_ONCE * STRIDE) {
        int place[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int pixel = first + k * STRIDE + worker / 4;
            // The first condition is a constant: where every patch has the pixel, there is nothing to compare.
            place[k] = first + (k + 1) * STRIDE <= SMALLEST_PATCH || pixel < pixels ? pixel_of[pixel] : -1;
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int pixel = first + k * STRIDE + worker / 4;
            if (first + (k + 1) * STRIDE <= SMALLEST_PATCH || pixel < pixels)
                copy_async(first_to + (first + k * STRIDE) * PIXEL_BYTES, address_of(from, max(place[k], 0), pitch),
                           place[k] >= 0 && exists);
        }
    }
}

// The same for any places, such as those of the 3 channels of an image.
template <int WORKERS, class To>
__device__ __forceinline__ void load_any_patch(const Convolution& c, int panel, int source, int worker,
                                               const int* pixel_of, To to) {
    const int part = worker % 4, channel = panel * PANEL + part * ELEMENTS;
    const int count = max(0, min(c.in_channels - channel, ELEMENTS));
    const element* from = c.x + static_cast<size_t>(source_place(c, source)) * c.x_pitch + (count > 0 ? channel : 0);
#pragma unroll 1
    for (int pixel = worker / 4; pixel < c.patch_pixels(); pixel += WORKERS / 4) {
        const int place = pixel_of[pixel];
        copy_one_by_one(to(pixel, part), from + static_cast<long long>(max(place, 0)) * c.x_pitch,
                        place < 0 ? 0 : count);
    }
}

__device__ __forceinline__ bool aligned(const Convolution& c) {
    return c.in_channels % ELEMENTS == 0 && c.x_pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(c.x) % 16 == 0;
}

// pixel_of[p]: where pixel p of the tile goes in y; -1: nowhere.
__device__ __forceinline__ void locate_result(const Convolution& c, const Tile& tile, int* pixel_of) {
    const int step = c.out_step();
    for (int p = threadIdx.x; p < PIXELS; p += THREADS) {
        const int row = tile.first_row + (p >> c.columns_log2);
        const int j = tile.first_column + (p & ((1 << c.columns_log2) - 1));
        const int image = row / (c.height + 1), i = row % (c.height + 1);
        const int y_row = (image * c.height + i) * step + tile.parity / 2;
        const bool inside = image < c.images && i < c.height && j < c.width;
        pixel_of[p] = inside ? y_row * step * c.width + j * step + tile.parity % 2 : -1;
    }
}

// The tile of the result lies in shared memory as floats, RESULT_PITCH from pixel to pixel, with a gap of 4 floats
// after each 32 channels (9/8 makes room for it): so 8 lanes that read 16 bytes each, 32 bytes apart, meet all 32 banks
// (with 64 channels or more). And the pitch is 8 more than a multiple of 16 floats: so do the pixels that a warp's
// fragments write at a time, 8 floats of each.
constexpr int RESULT_PITCH = (CHANNELS * 9 / 8 + 7) / 16 * 16 + 8;
__device__ __forceinline__ constexpr int result_place(int channel) { return channel + channel / 32 * 4; }

constexpr int PARTS = CHANNELS / ELEMENTS;  // of 16 bytes, of a pixel of the result
constexpr int WARPS = THREADS / 32;

// The statistics of the tile: of each channel the count of its values v, their mean, and the sum of their squares
// around the mean. Each thread brings what it has summed over its pixels, less a shift s: count, deviation = sum (v -
// s), and square = sum (v - s)^2. From these the mean is s + deviation / count, and the squares around it are square -
// deviation^2 / count. As s is one of the values, that of pixel `valid`, no digits are lost where a channel is nearly
// constant. finish_statistics (reduce.cu) joins those of all tiles. All threads of the block must call it; it writes
// over the result.
__device__ __forceinline__ void write_statistics(const Convolution& c, const Tile& tile, float* result, int valid,
                                                 float count, float (&deviation)[ELEMENTS], float (&square)[ELEMENTS]) {
    // The lanes that have the same channels first, then, by way of shared memory, the warps.
#pragma unroll
    for (int lanes = PARTS; lanes < 32; lanes *= 2) {
        count += __shfl_xor_sync(0xffffffffu, count, lanes);
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            deviation[e] += __shfl_xor_sync(0xffffffffu, deviation[e], lanes);
            square[e] += __shfl_xor_sync(0xffffffffu, square[e], lanes);
        }
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = threadIdx.x;
    const float shift = channel < CHANNELS ? result[valid * RESULT_PITCH + result_place(channel)] : 0;
    __syncthreads();  // nobody reads the result any more

    float *counts = result, *sums = result + WARPS;  // of each warp: deviations of all channels, then squares
    if (lane == 0) counts[warp] = count;
    if (lane < PARTS) {
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            sums[2 * warp * CHANNELS + lane * ELEMENTS + e] = deviation[e];
            sums[(2 * warp + 1) * CHANNELS + lane * ELEMENTS + e] = square[e];
        }
    }
    __syncthreads();
    if (channel >= CHANNELS || tile.first_channel + channel >= c.out_channels) return;
    float n = 0, total = 0, squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        n += counts[w];
        total += sums[2 * w * CHANNELS + channel];
        squares += sums[(2 * w + 1) * CHANNELS + channel];
    }
    float* to = c.partials + static_cast<size_t>(blockIdx.x / c.channel_tiles()) * 3 * c.out_channels +
                tile.first_channel + channel;
    to[0] = n;
    to[c.out_channels] = n == 0 ? 0 : shift + total / n;
    to[2 * c.out_channels] = n == 0 ? 0 : squares - total * total / n;
}

// Writes the tile, 16 bytes of a pixel at a time. A thread has the same channels of all its pixels, and on the way
// adds them up for the statistics, if these are asked for. All threads of the block must call it.
__device__ __forceinline__ void write_result(const Convolution& c, const Tile& tile, float* result,
                                             const int* pixel_of) {
    constexpr int STRIDE = THREADS / PARTS;
    static_assert(THREADS % PARTS == 0 && PARTS <= 32, "a thread keeps its channels");
    const bool wide =
        c.y_pitch % ELEMENTS == 0 && c.out_channels % ELEMENTS == 0 && reinterpret_cast<size_t>(c.y) % 16 == 0;
    const int image_pixels = c.height * c.width * c.out_step() * c.out_step();
    const int part = threadIdx.x % PARTS, own = part * ELEMENTS, channel = tile.first_channel + own;
    const int channels = min(c.out_channels - channel, ELEMENTS);
    float shift[ELEMENTS], deviation[ELEMENTS] = {}, square[ELEMENTS] = {}, count = 0;
    int valid = 0;  // the first pixel of the tile that is one of the result
    while (c.partials && valid < PIXELS - 1 && pixel_of[valid] < 0) ++valid;
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) shift[e] = result[valid * RESULT_PITCH + result_place(own) + e];

    for (int p = threadIdx.x / PARTS; p < PIXELS; p += STRIDE) {
        const int pixel = pixel_of[p];
        if (pixel < 0 || channels <= 0) continue;
        float values[ELEMENTS];
#pragma unroll
        for (int e = 0; e < ELEMENTS; e += 4)
            *reinterpret_cast<float4*>(values + e) =
                *reinterpret_cast<const float4*>(result + p * RESULT_PITCH + result_place(own) + e);
        if (c.partials) {
            count += 1;
#pragma unroll
            for (int e = 0; e < ELEMENTS; ++e) {
                const float value = values[e] - shift[e];
                deviation[e] += value;
                square[e] += value * value;
            }
        }
        if (c.bias)
            for (int e = 0; e < ELEMENTS; ++e) values[e] += e < channels ? c.bias[channel + e] : 0.0f;
        if (c.bits) {
            const int place = pixel % image_pixels * c.mask_channels + c.mask_first + channel;
            drop_out(values, kept<ELEMENTS>(c.bits, c.mask_words, pixel / image_pixels, place), c.scale);
        }
        const Pack pack = c.rounded ? to_factors(values) : to_elements(values);
        element* to = c.y + static_cast<long long>(pixel) * c.y_pitch + channel;
        if (wide) *reinterpret_cast<Pack*>(to) = pack;
        else
            for (int e = 0; e < ELEMENTS; ++e)
                if (e < channels) to[e] = pack.e[e];
    }
    if (c.partials) write_statistics(c, tile, result, valid, count, deviation, square);
}
