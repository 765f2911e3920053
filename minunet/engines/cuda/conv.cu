// Convolution on tensor cores: 3x3, its gradient with respect to the input, transposed convolution and its. One kernel.
// Not yet run on a GPU: emulated (tests/cuda), and compiled.
//
// Specification: minunet.ops conv2d_forward (stride 1, "same", no bias), conv2d_backward[0], conv_transpose2d_forward
// and conv_transpose2d_backward[0] (kernel 2 or 3, stride 2, "same").
//
// Idea. A block makes a tile of the result, PIXELS pixels (a small rectangle) x CHANNELS channels, as a sum of matrix
// products, one for each kernel tap and each panel of 64 bytes of input channels:
//
//     tile [pixel, o] += patch [pixel + tap, c] weight [tap][o, c]
//
// The patch, the rectangle with a border of one pixel, is brought to shared memory once a panel and serves all nine
// taps: a tap is only another row offset. Read once for each tap from L2, the pixels would ask more of it than it has.
// Weights stream through shared memory, a tap at a time. Both come by asynchronous copies, two steps ahead of the
// products.
//
// The four uses differ in which taps there are and where they lie. A transposed convolution of stride 2 makes four
// kinds of output pixels, by the parity of row and column. Each kind is a small convolution of the input: of the rows,
// y[2i] gets tap 0 of x[i] and (kernel 3) tap 2 of x[i - 1], y[2i + 1] gets tap 1 of x[i]. Its dx is the sum of four
// convolutions, one of each parity class of dy.
//
// Images lie stacked, with one row of zeros between them, so that a tile may cover parts of two: row R of the stack is
// row R % (H + 1) of image R / (H + 1).
//
// Cost against the roofline (H100): a step is 64 x 64 x 64 bytes a warp = 64 mma instructions for 16 ldmatrix. Shared
// memory is read at 4 KB for 2 * 64 * 64 * 8 operations (TF32), 32 cycles beside about 50 for the mma.sync; L2 gives
// the weights: CHANNELS * 64 bytes for PIXELS * CHANNELS * 32 operations, which 5.5 TB/s feed to 350 (128 pixels) or
// 700 (256 pixels) TFLOP/s in TF32. So mma.sync should be the limit: about 60 % of the tensor cores' peak, which only
// wgmma reaches. All of this is counted, and not yet measured.
#include "element.cuh"

// A tile is WARPS_M x WARPS_N warps, each with 64 pixels x 8 FRAGMENTS_N channels: given by kernels.py.
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int PIXELS = 64 * WARPS_M, CHANNELS = 8 * FRAGMENTS_N * WARPS_N;
constexpr int STAGES = 3;            // steps in shared memory: one in use, two on their way
constexpr int PANEL = 4 * ELEMENTS;  // input channels of a panel
constexpr int PITCH = 64 + 16;  // bytes from row to row: with the 16, any 8 neighbouring rows fill all 32 banks
constexpr int PATCH = PIXELS == 128 ? 180 : 340;  // pixels of the largest patch: (8 + 2) (16 + 2), or (32 + 2) (8 + 2)
constexpr int PATCH_BYTES = PATCH * PITCH, WEIGHT_BYTES = CHANNELS * PITCH;
constexpr int RESULT_PITCH = CHANNELS + 4;  // floats from row to row of the result in shared memory

enum Direction { FORWARD, GRAD_INPUT, UP, UP_GRAD_INPUT };

// The taps along one axis: at the offsets first, first + 1, ... lie `count` of them, and at offset a the kernel's row
// start + step * a.
struct Taps {
    int first, count, start, step;
};

__device__ __forceinline__ Taps taps_of(int direction, int kernel, int parity) {
    if (direction == FORWARD) return {-1, 3, 1, 1};
    if (direction == GRAD_INPUT) return {-1, 3, 1, -1};  // the flipped kernel
    if (parity == 1) return {0, 1, 1, 0};
    if (direction == UP) return kernel == 3 ? Taps{-1, 2, 0, -2} : Taps{0, 1, 0, 0};
    return {0, kernel - 1, 0, 2};
}

// Where in the sum a step is: source (a parity class of dy, or just x), panel of its channels, tap.
struct Step {
    int source, panel, u, v, slot;  // slot: which buffer has the patch
    Taps rows, columns;
};

__device__ __forceinline__ void next(Step& step, int panels, int direction, int kernel) {
    if (++step.v < step.columns.count) return;
    step.v = 0;
    if (++step.u < step.rows.count) return;
    step.u = 0;
    step.slot = (step.slot + 1) % STAGES;
    if (++step.panel < panels) return;
    step.panel = 0;
    ++step.source;
    step.rows = taps_of(direction, kernel, step.source / 2);
    step.columns = taps_of(direction, kernel, step.source % 2);
}

// x: pixels of x_pitch elements, of which in_channels are read. weight: [tap][out_channels][weight_pitch], the input
// channels together, zero beyond in_channels (weights.cu). y: pixels of y_pitch elements. height, width: of the smaller
// image, where x and y differ. columns_log2: the tile is 2^columns_log2 (8 or 16) pixels wide.
//
// Options, by a pointer that is not null: bias is added; bits drop out (the index of a value being that in an image of
// mask_channels, at mask_first + its channel) and what is kept is multiplied by scale; partials [tile's share][count,
// mean, centred squares][out_channels] receive statistics. rounded: the result will be a factor of other products.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    convolve(const element* __restrict__ x, int x_pitch, const element* __restrict__ weight, int weight_pitch,
             element* __restrict__ y, int y_pitch, int images, int height, int width, int in_channels, int out_channels,
             int direction, int kernel, int columns_log2, const float* __restrict__ bias,
             const unsigned short* __restrict__ bits, int mask_words, int mask_channels, int mask_first, float scale,
             float* __restrict__ partials, int rounded) {
    DYNAMIC_SHARED(shared);  // STAGES patches, then STAGES tiles of weights
    __shared__ int pixel_of[PATCH];  // where a pixel of the patch is in x (at the end: of the tile in y); -1: nowhere

    const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 32 % WARPS_M, warp_n = thread / 32 / WARPS_M;
    const int columns = 1 << columns_log2, rows = PIXELS >> columns_log2, patch_columns = columns + 2;
    const int patch_pixels = (rows + 2) * patch_columns;
    const int in_step = direction == UP_GRAD_INPUT ? 2 : 1, out_step = direction == UP ? 2 : 1;

    // Which tile. Blocks that run at the same time share pixels, and differ in their channels first.
    const int channel_tiles = (out_channels + CHANNELS - 1) / CHANNELS, tiles_across = (width + columns - 1) / columns;
    int tile = blockIdx.x;
    const int first_channel = tile % channel_tiles * CHANNELS;
    tile /= channel_tiles;
    const int parity = direction == UP ? tile % 4 : 0;
    tile /= out_step * out_step;
    const int first_column = tile % tiles_across * columns, first_row = tile / tiles_across * rows;

    for (int p = thread; p < patch_pixels; p += THREADS) {
        int row = first_row + p / patch_columns - 1, j = first_column + p % patch_columns - 1;
        int image = row / (height + 1), i = row % (height + 1);
        bool inside = row >= 0 && image < images && i < height && j >= 0 && j < width;
        pixel_of[p] = inside ? ((image * height + i) * in_step * width + j) * in_step : -1;
    }

    const bool aligned = x_pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(x) % 16 == 0;
    const int panels = (in_channels + PANEL - 1) / PANEL;
    const int sources = in_step * in_step;
    const Step begin = {0, 0, 0, 0, 0, taps_of(direction, kernel, parity / 2), taps_of(direction, kernel, parity % 2)};
    unsigned char* weights = shared + STAGES * PATCH_BYTES;

    // Begins to copy what the products of a step need: its weights, and with the first tap of a panel the patch.
    auto load = [&](const Step& step, int stage) {
        if (step.source >= sources) return;  // beyond the end: only an empty group
        const int first = step.panel * PANEL;
        if (step.u == 0 && step.v == 0) {
            const int class_offset = step.source / 2 * in_step * width + step.source % 2;
            for (int part = thread; part < 4 * patch_pixels; part += THREADS) {
                int pixel = pixel_of[part / 4], channel = first + part % 4 * ELEMENTS;
                int count = pixel < 0 ? 0 : max(0, min(in_channels - channel, ELEMENTS));
                const element* from = count ? x + static_cast<size_t>(pixel + class_offset) * x_pitch + channel : x;
                fetch(shared + step.slot * PATCH_BYTES + part / 4 * PITCH + part % 4 * 16, from, count, aligned);
            }
        }
        const int u = step.rows.start + step.rows.step * (step.rows.first + step.u);
        const int v = step.columns.start + step.columns.step * (step.columns.first + step.v);
        const element* tap = weight + static_cast<size_t>(u * kernel + v) * out_channels * weight_pitch;
        for (int part = thread; part < 4 * CHANNELS; part += THREADS) {
            int out = first_channel + part / 4, channel = first + part % 4 * ELEMENTS;
            bool inside = out < out_channels && channel < weight_pitch;
            const element* from = inside ? tap + static_cast<size_t>(out) * weight_pitch + channel : weight;
            copy_async(weights + stage * WEIGHT_BYTES + part / 4 * PITCH + part % 4 * 16, from, inside ? 16 : 0);
        }
    };

    // Of the rows that ldmatrix reads this lane names one a fragment of 16 pixels: its place in the patch, at offset
    // (-1, -1).
    int patch_row[4];
    for (int f = 0; f < 4; ++f) {
        int pixel = warp_m * 64 + f * 16 + lane % 16;
        patch_row[f] = ((pixel >> columns_log2) * patch_columns + (pixel & (columns - 1))) * PITCH + lane / 16 * 16;
    }
    const int weight_row = (warp_n * 8 * FRAGMENTS_N + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;

    float sum[4][FRAGMENTS_N][4] = {};
    Step loading = begin;
    __syncthreads();  // pixel_of is complete
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        load(loading, stage);
        copy_commit();
        next(loading, panels, direction, kernel);
    }
    int stage = 0;
    for (Step step = begin; step.source < sources; next(step, panels, direction, kernel)) {
        copy_wait<STAGES - 2>();  // this thread's part of the step has arrived,
        __syncthreads();  // everyone's has, and everyone is done with the step before, whose buffer is filled now
        load(loading, (stage + STAGES - 1) % STAGES);
        copy_commit();
        next(loading, panels, direction, kernel);

        const int offset = (step.rows.first + step.u + 1) * patch_columns + step.columns.first + step.v + 1;
        const unsigned char* patch = shared + step.slot * PATCH_BYTES + offset * PITCH;
        const unsigned char* taps = weights + stage * WEIGHT_BYTES + weight_row;
#pragma unroll
        for (int k = 0; k < 64; k += 32) {
            unsigned int a[4][4], b[FRAGMENTS_N][2];
#pragma unroll
            for (int f = 0; f < 4; ++f) load_matrices(a[f], patch + patch_row[f] + k);
#pragma unroll
            for (int n = 0; n < FRAGMENTS_N; n += 2) {
                unsigned int two[4];  // 16 output channels
                load_matrices(two, taps + n * 8 * PITCH + k);
                b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
            }
#pragma unroll
            for (int f = 0; f < 4; ++f)
#pragma unroll
                for (int n = 0; n < FRAGMENTS_N; ++n) multiply(sum[f][n], a[f], b[n]);
        }
        stage = (stage + 1) % STAGES;
    }
    copy_wait<0>();
    __syncthreads();  // from here on shared memory holds the tile of the result, in rows of channels

    // A lane holds, of fragment f, pixels lane / 4 and lane / 4 + 8, and of each channel fragment two neighbours.
    float* result = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int f = 0; f < 4; ++f)
#pragma unroll
        for (int n = 0; n < FRAGMENTS_N; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int pixel = warp_m * 64 + f * 16 + lane / 4 + 8 * half,
                    channel = (warp_n * FRAGMENTS_N + n) * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(result + pixel * RESULT_PITCH + channel) = {sum[f][n][2 * half],
                                                                                       sum[f][n][2 * half + 1]};
            }
    for (int pixel = thread; pixel < PIXELS; pixel += THREADS) {  // where each pixel goes: the patch is done with
        int row = first_row + (pixel >> columns_log2), j = first_column + (pixel & (columns - 1));
        int image = row / (height + 1), i = row % (height + 1);
        pixel_of[pixel] = image < images && i < height && j < width ? image * height * width + i * width + j : -1;
    }
    __syncthreads();

    const bool wide = y_pitch % ELEMENTS == 0 && out_channels % ELEMENTS == 0 && reinterpret_cast<size_t>(y) % 16 == 0;
    constexpr int PARTS = CHANNELS / ELEMENTS;
    for (int part = thread; part < PIXELS * PARTS; part += THREADS) {
        const int pixel = pixel_of[part / PARTS], channel = first_channel + part % PARTS * ELEMENTS;
        const int count = min(out_channels - channel, ELEMENTS);
        if (pixel < 0 || count <= 0) continue;
        const int image = pixel / (height * width), i = pixel / width % height, j = pixel % width;
        const size_t place =
            static_cast<size_t>(i * out_step + parity / 2) * out_step * width + j * out_step + parity % 2;
        element* to =
            y + (static_cast<size_t>(image) * height * width * out_step * out_step + place) * y_pitch + channel;
        const float* from = result + part / PARTS * RESULT_PITCH + part % PARTS * ELEMENTS;
        Pack pack;
#pragma unroll
        for (int e = 0; e < ELEMENTS; ++e) {
            float value = from[e];
            if (bias && e < count) value += bias[channel + e];
            if (bits && e < count) {
                bool pass = kept(bits, mask_words, image, place * mask_channels + mask_first + channel + e);
                value = pass ? value * scale : 0.0f;
            }
            pack.e[e] = rounded ? to_factor(value) : to_element(value);
        }
        if (wide) *reinterpret_cast<Pack*>(to) = pack;
        else
            for (int e = 0; e < count; ++e) to[e] = pack.e[e];
    }
    if (!partials) return;

    // Statistics, from the float32 sums. Each thread takes one channel, and a share of the pixels: their count, mean,
    // and the sum of squares around the mean. That is sum (v - s)^2 - (sum (v - s))^2 / count for any s; with s one of
    // the values nothing is lost where a channel is nearly constant. norm.cu joins the shares.
    constexpr int SHARES = THREADS / CHANNELS, SHARE = PIXELS / SHARES;
    const int channel = thread % CHANNELS, share = thread / CHANNELS;
    if (first_channel + channel >= out_channels) return;
    float shift = 0, count = 0, first = 0, second = 0;
    for (int pixel = share * SHARE; pixel < (share + 1) * SHARE; ++pixel) {
        if (pixel_of[pixel] < 0) continue;
        float value = result[pixel * RESULT_PITCH + channel];
        if (count == 0) shift = value;
        value -= shift;
        count += 1, first += value, second += value * value;
    }
    float* to = partials + static_cast<size_t>(blockIdx.x / channel_tiles * SHARES + share) * 3 * out_channels +
                first_channel + channel;
    to[0] = count;
    to[out_channels] = count == 0 ? 0 : shift + first / count;
    to[2 * out_channels] = count == 0 ? 0 : second - first * first / count;
}
