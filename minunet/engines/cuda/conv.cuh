// What the two convolution kernels share: which taps there are, what is loaded for a step, and how a tile is written.
//
// Before it is included stand: THREADS of a block, PIXELS and CHANNELS of its tile, and RESULT_PITCH, the floats from
// row to row of the result in shared memory.
#pragma once
#include "element.cuh"

constexpr int PANEL = 4 * ELEMENTS;  // input channels of a panel: 64 bytes, four parts of 16

enum Direction { FORWARD, GRAD_INPUT, UP, UP_GRAD_INPUT };

// The arguments of a convolution. x: pixels of x_pitch elements, of which in_channels are read. weight: as weights.cu
// lays them out, [tap][part of 16 bytes of the input channels, in whole panels][out_channels][element]. y: pixels of
// y_pitch elements. height, width: of the smaller image, where x and y differ. columns_log2: the tile is 2^columns_log2
// (8 or 16) pixels wide.
//
// Options, by a pointer that is not null: bias is added; bits drop out (the index of a value being that in an image of
// mask_channels, at mask_first + its channel) and what is kept is multiplied by scale; partials [tile's share][count,
// mean, centred squares][out_channels] receive statistics. rounded: the result will be a factor of other products.
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
};

// The tile of the result that a block makes.
struct Tile {
    int first_channel, parity, first_row, first_column;  // parity: which of the four kinds of output pixels (UP)
};

// Blocks that run at the same time share pixels, and differ in their channels first.
__device__ __forceinline__ Tile tile_of(const Convolution& c) {
    const int channel_tiles = (c.out_channels + CHANNELS - 1) / CHANNELS, columns = 1 << c.columns_log2;
    const int tiles_across = (c.width + columns - 1) / columns, kinds = c.out_step() * c.out_step();
    Tile tile;
    int rest = blockIdx.x;
    tile.first_channel = rest % channel_tiles * CHANNELS;
    rest /= channel_tiles;
    tile.parity = rest % kinds;
    rest /= kinds;
    tile.first_column = rest % tiles_across * columns;
    tile.first_row = rest / tiles_across * (PIXELS >> c.columns_log2);
    return tile;
}

// The taps along one axis: at the offsets first, first + 1, ... lie `count` of them, and at offset a the kernel's row
// start + step * a.
struct Axis {
    int first, count, start, step;
};

__device__ __forceinline__ Axis axis_of(int direction, int kernel, int parity) {
    if (direction == FORWARD) return {-1, 3, 1, 1};
    if (direction == GRAD_INPUT) return {-1, 3, 1, -1};  // the flipped kernel
    if (parity == 1) return {0, 1, 1, 0};
    if (direction == UP) return kernel == 3 ? Axis{-1, 2, 0, -2} : Axis{0, 1, 0, 0};
    return {0, kernel - 1, 0, 2};
}

// One product of the sum over taps. first: whether its patch, number `patch` of its panel, has to be loaded for it;
// else the tap before reads the same. source: where the parity class of dy begins that is the patch's, in pixels.
struct Tap {
    int weight, place, source, patch;  // place: the pixel of the patch that the tile's first pixel meets
    bool first;
};

// Fills taps[], by one thread, and returns how many there are, at most nine: those of one patch together.
__device__ __forceinline__ int plan_taps(const Convolution& c, int parity, Tap* taps) {
    int count = 0;
    for (int source = 0; source < c.in_step() * c.in_step(); ++source) {
        const int of = c.direction == UP ? parity : source;
        const Axis rows = axis_of(c.direction, c.kernel, of / 2), columns = axis_of(c.direction, c.kernel, of % 2);
        for (int tap = 0; tap < rows.count * columns.count; ++tap, ++count) {
            const int a = rows.first + tap / columns.count, b = columns.first + tap % columns.count;
            const int u = rows.start + rows.step * a, v = columns.start + columns.step * b;
            if (threadIdx.x == 0)
                taps[count] = {u * c.kernel + v, (a + 1) * c.patch_columns() + b + 1,
                               source / 2 * c.in_step() * c.width + source % 2, source, tap == 0};
        }
    }
    return count;
}

// pixel_of[p]: where pixel p of the patch lies in x; -1: nowhere, it is a zero. Images lie stacked, with one row of
// zeros between them, so that a tile may cover parts of two: row R of the stack is row R % (H + 1) of image
// R / (H + 1).
__device__ __forceinline__ void locate_patch(const Convolution& c, const Tile& tile, int* pixel_of) {
    const int columns = c.patch_columns(), pixels = c.patch_pixels(), step = c.in_step();
    for (int p = threadIdx.x; p < pixels; p += THREADS) {
        const int row = tile.first_row + p / columns - 1, j = tile.first_column + p % columns - 1;
        const int image = row / (c.height + 1), i = row % (c.height + 1);
        const bool inside = row >= 0 && image < c.images && i < c.height && j >= 0 && j < c.width;
        pixel_of[p] = inside ? ((image * c.height + i) * step * c.width + j) * step : -1;
    }
}

// How many elements of the weights lie before 16 bytes, number `part` of a panel, of a tap and this tile's channels.
__device__ __forceinline__ size_t weight_place(const Convolution& c, const Tile& tile, const Tap& tap, int panel,
                                               int part) {
    return ((static_cast<size_t>(tap.weight) * c.panels() + panel) * 4 + part) * c.out_channels * ELEMENTS +
           tile.first_channel * ELEMENTS;
}

// Begins to copy a patch, 16 bytes at a time: done by WORKERS threads, of which this is number `worker`. The places of
// eight pixels are read together, before the copies of all eight: what costs is that one instruction waits for the
// other. patch_part(pixel, part): where the 16 bytes go in shared memory. aligned: whether all places are multiples
// of 16.
template <int WORKERS, class PatchPart>
__device__ __forceinline__ void load_patch(const Convolution& c, int panel, const Tap& tap, const int* pixel_of,
                                           bool aligned, int worker, PatchPart patch_part) {
    constexpr int AT_ONCE = 8, STRIDE = WORKERS / 4;
    const int part = worker % 4, channel = panel * PANEL + part * ELEMENTS, pixels = c.patch_pixels();
    const int count = max(0, min(c.in_channels - channel, ELEMENTS));
    const element* from = count > 0 ? c.x + static_cast<size_t>(tap.source) * c.x_pitch + channel : c.x;
    for (int first = worker / 4; first < pixels; first += AT_ONCE * STRIDE) {
        int place[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) place[k] = first + k * STRIDE < pixels ? pixel_of[first + k * STRIDE] : -1;
        if (!aligned) {
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (first + k * STRIDE < pixels)
                    copy_one_by_one(patch_part(first + k * STRIDE, part),
                                    from + static_cast<size_t>(max(place[k], 0)) * c.x_pitch, place[k] < 0 ? 0 : count);
            continue;
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
            if (first + k * STRIDE < pixels)
                copy_async(patch_part(first + k * STRIDE, part),
                           from + static_cast<size_t>(max(place[k], 0)) * c.x_pitch,
                           place[k] < 0 ? 0 : count * static_cast<int>(sizeof(element)));
    }
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

// Writes the tile, which lies in shared memory as result [pixel][RESULT_PITCH], by 16 bytes a thread.
__device__ __forceinline__ void write_result(const Convolution& c, const Tile& tile, const float* result,
                                             const int* pixel_of) {
    const bool wide =
        c.y_pitch % ELEMENTS == 0 && c.out_channels % ELEMENTS == 0 && reinterpret_cast<size_t>(c.y) % 16 == 0;
    const int image_pixels = c.height * c.width * c.out_step() * c.out_step();
    constexpr int PARTS = CHANNELS / ELEMENTS;
    for (int part = threadIdx.x; part < PIXELS * PARTS; part += THREADS) {
        const int pixel = pixel_of[part / PARTS], channel = tile.first_channel + part % PARTS * ELEMENTS;
        const int count = min(c.out_channels - channel, ELEMENTS);
        if (pixel < 0 || count <= 0) continue;
        float values[ELEMENTS];
#pragma unroll
        for (int e = 0; e < ELEMENTS; e += 4)
            *reinterpret_cast<float4*>(values + e) =
                *reinterpret_cast<const float4*>(result + part / PARTS * RESULT_PITCH + part % PARTS * ELEMENTS + e);
        if (c.bias)
            for (int e = 0; e < ELEMENTS; ++e) values[e] += e < count ? c.bias[channel + e] : 0.0f;
        if (c.bits) {
            const int image = pixel / image_pixels;
            const size_t index = static_cast<size_t>(pixel % image_pixels) * c.mask_channels + c.mask_first + channel;
            for (int e = 0; e < ELEMENTS; ++e) {
                const bool pass = e < count && kept(c.bits, c.mask_words, image, index + e);
                values[e] = pass ? values[e] * c.scale : 0.0f;
            }
        }
        Pack pack;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) pack.e[e] = c.rounded ? to_factor(values[e]) : to_element(values[e]);
        element* to = c.y + static_cast<size_t>(pixel) * c.y_pitch + channel;
        if (wide) *reinterpret_cast<Pack*>(to) = pack;
        else
            for (int e = 0; e < count; ++e) to[e] = pack.e[e];
    }
}

// Over how many threads the pixels of a channel are shared: the largest power of two for which there are threads.
__host__ __device__ constexpr int statistics_shares() {
    int shares = 1;
    while (2 * shares * CHANNELS <= THREADS) shares *= 2;
    return shares;
}

// Statistics of the tile, from the float32 sums. Each thread takes one channel, and a share of the pixels: their count,
// mean, and the sum of squares around the mean. That is sum (v - s)^2 - (sum (v - s))^2 / count for any s; with s one
// of the values nothing is lost where a channel is nearly constant. finish_statistics (reduce.cu) joins the shares.
__device__ __forceinline__ void write_statistics(const Convolution& c, const Tile& tile, const float* result,
                                                 const int* pixel_of) {
    constexpr int SHARES = statistics_shares(), SHARE = PIXELS / SHARES;
    const int channel = threadIdx.x % CHANNELS, share = threadIdx.x / CHANNELS;
    if (share >= SHARES || tile.first_channel + channel >= c.out_channels) return;
    int pixel = share * SHARE;
    const int end = pixel + SHARE;
    while (pixel < end && pixel_of[pixel] < 0) ++pixel;
    const float shift = pixel < end ? result[pixel * RESULT_PITCH + channel] : 0;
    float count = 0, first = 0, second = 0;
#pragma unroll 8
    for (; pixel < end; ++pixel) {
        const float value = pixel_of[pixel] < 0 ? 0 : result[pixel * RESULT_PITCH + channel] - shift;
        count += pixel_of[pixel] < 0 ? 0 : 1;
        first += value;
        second += value * value;
    }
    const int channel_tiles = (c.out_channels + CHANNELS - 1) / CHANNELS;
    float* to = c.partials + static_cast<size_t>(blockIdx.x / channel_tiles * SHARES + share) * 3 * c.out_channels +
                tile.first_channel + channel;
    to[0] = count;
    to[c.out_channels] = count == 0 ? 0 : shift + first / count;
    to[2 * c.out_channels] = count == 0 ? 0 : second - first * first / count;
}
