// Convolution on tensor cores: 3x3, transposed, and the gradient of either with respect to its input. One kernel.
//
// Specification: minunet.ops conv2d_forward (stride 1, "same", no bias), conv2d_backward[0], conv_transpose2d_forward
// and conv_transpose2d_backward[0] (kernel 2 or 3, stride 2, "same").
//
// Idea. A block makes a tile of the result, PIXELS pixels (a small rectangle) x CHANNELS channels, as a sum of matrix
// products. Each kernel tap and each panel of 64 bytes of input channels is one, and that is a step:
//
//     tile [pixel, o] += patch [pixel + tap, c] weight [tap][o, c]
//
// The patch, the rectangle with a border of one pixel, is brought to shared memory once a panel and serves all nine
// taps: a tap only shifts which of its rows are read. If each tap read its pixels from the L2 cache, that would have to
// give more than it can. Weights stream through shared memory, a tap at a time. Both come by asynchronous copies, two
// steps ahead of the products.
//
// The four uses differ in which taps there are and where they lie (conv.cuh). A transposed convolution of stride 2
// makes four kinds of output pixels, by the parity of row and column. Each kind is a small convolution of the input: of
// the rows, y[2i] gets tap 0 of x[i] and (kernel 3) tap 2 of x[i - 1], y[2i + 1] gets tap 1 of x[i]. Its dx is the sum
// of four convolutions, one of each parity class of dy.
//
// Cost. This kernel runs on every GPU since 2020. It multiplies by mma.sync, whose factors pass through registers: an
// earlier version reached 97 TFLOP/s in TF32 and 180 in bf16 on an H200, a quarter of what the tensor cores can do
// (docs/engines/gpu.md). Hopper has an instruction that reads shared memory itself: conv_wgmma.cu.
constexpr int THREADS = 32 * WARPS_M * WARPS_N;  // each warp has 64 pixels x 8 FRAGMENTS_N channels (programs.py)
constexpr int PIXELS = 64 * WARPS_M, CHANNELS = 8 * FRAGMENTS_N * WARPS_N;
constexpr int STAGES = 3, PATCHES = 3;  // weights and patches in shared memory: one in use, two on their way
constexpr int PITCH = 64 + 16;          // bytes from row to row: with the 16, any 8 neighbouring rows fill all 32 banks
#include "conv.cuh"
constexpr int PATCH_BYTES = PATCH * PITCH, WEIGHT_BYTES = CHANNELS * PITCH;

// One product of the sum over taps. first: whether its patch, number `patch` of its panel, has to be loaded for it;
// else the tap before reads the same.
struct Tap {
    int weight, place, patch;  // place: the pixel of the patch that the tile's first pixel meets
    bool first;
};

// Fills taps[], by one thread, and returns how many there are, at most nine: those of one patch together.
__device__ __forceinline__ int plan_taps(const Convolution& c, int parity, Tap* taps) {
    int count = 0;
    for (int source = 0; source < sources(c); ++source) {
        const int both = c.direction == UP ? parity : source;  // parities, of row and column
        const Axis rows = axis_of(c.direction, c.kernel, both / 2), columns = axis_of(c.direction, c.kernel, both % 2);
        for (int tap = 0; tap < rows.count * columns.count; ++tap, ++count) {
            const int a = rows.first + tap / columns.count, b = columns.first + tap % columns.count;
            const int u = rows.start + rows.step * a, v = columns.start + columns.step * b;
            if (threadIdx.x == 0)
                taps[count] = {u * c.kernel + v, (a + 1) * c.patch_columns() + b + 1, source, tap == 0};
        }
    }
    return count;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    convolve(const element* __restrict__ x, int x_pitch, const element* __restrict__ weight, element* __restrict__ y,
             int y_pitch, int images, int height, int width, int in_channels, int out_channels, int direction,
             int kernel, int columns_log2, const float* __restrict__ bias, const unsigned short* __restrict__ bits,
             int mask_words, int mask_channels, int mask_first, float scale, float* __restrict__ partials,
             int rounded) {
    const Convolution c = {x,     x_pitch,     weight,        y,          y_pitch, images,       height,
                           width, in_channels, out_channels,  direction,  kernel,  columns_log2, bias,
                           bits,  mask_words,  mask_channels, mask_first, scale,   partials,     rounded};
    DYNAMIC_SHARED(shared);          // PATCHES patches, then STAGES tiles of weights
    __shared__ int pixel_of[PATCH];  // where a pixel of the patch is in x (at the end: of the tile in y); -1: nowhere

    const int thread = threadIdx.x, lane = thread % 32, warp_m = thread / 32 % WARPS_M, warp_n = thread / 32 / WARPS_M;
    const int patch_columns = c.patch_columns();
    const Tile tile = tile_of(c);
    __shared__ Tap taps[9];
    const int tap_count = plan_taps(c, tile.parity, taps), steps = tap_count * c.panels();
    locate_patch(c, tile, pixel_of);

    unsigned char* weights = shared + PATCHES * PATCH_BYTES;
    int panel = 0, tap_number = 0;
    // Begins to copy the next step to a stage, and returns where its tap begins in the patches, in bytes.
    auto load = [&](int stage) {
        if (panel == c.panels()) return 0;  // beyond the end
        const Tap tap = taps[tap_number];
        const int patch = (panel * sources(c) + tap.patch) % PATCHES * PATCH_BYTES;
        auto to = [&](int pixel, int part) { return shared + patch + pixel * PITCH + part * 16; };
        if (tap.first && aligned(c)) load_patch<THREADS, PITCH>(c, panel, tap.patch, thread, pixel_of, to);
        else if (tap.first) load_any_patch<THREADS>(c, panel, tap.patch, thread, pixel_of, to);
        const element* from = weights_of(c, tile, tap.weight, panel);
        for (int q = thread; q < 4 * CHANNELS; q += THREADS)
            copy_async(weights + stage * WEIGHT_BYTES + q % CHANNELS * PITCH + q / CHANNELS * 16, from + q * ELEMENTS);
        if (++tap_number == tap_count) tap_number = 0, ++panel;
        return patch + tap.place * PITCH;
    };

    // ldmatrix takes the address of a row, 16 bytes, from each lane (ptx.cuh). For each fragment of 16 pixels: where
    // this lane's is in the patch, at offset (-1, -1); lanes 16 to 31 have the second 16 bytes of the same pixels. Then
    // the same for the weights, of 16 output channels.
    int patch_row[4];
    for (int f = 0; f < 4; ++f) {
        int pixel = warp_m * 64 + f * 16 + lane % 16;
        int row = pixel >> columns_log2, column = pixel & ((1 << columns_log2) - 1);
        patch_row[f] = (row * patch_columns + column) * PITCH + lane / 16 * 16;
    }
    const int weight_row = (warp_n * 8 * FRAGMENTS_N + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;

    float sum[4][FRAGMENTS_N][4] = {};  // [16 pixels][8 channels][this lane's share]
    static_assert(STAGES == 3, "two steps on their way");
    int places[2];    // of the steps under way: where the tap begins in the patches
    __syncthreads();  // pixel_of and taps are complete
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
        places[stage] = load(stage);
        copy_commit();
    }
    for (int step = 0, stage = 0; step < steps; ++step, stage = (stage + 1) % STAGES) {
        copy_wait<STAGES - 2>();  // this thread's part of the step has arrived,
        __syncthreads();  // everyone's has, and everyone is done with the step before, whose buffer is filled now
        const int third = load((stage + STAGES - 1) % STAGES);
        copy_commit();  // beyond the end: only an empty group

        const unsigned char* patch = shared + places[0];
        places[0] = places[1], places[1] = third;
        const unsigned char* tap_weights = weights + stage * WEIGHT_BYTES + weight_row;
#pragma unroll
        for (int k = 0; k < 64; k += 32) {  // bytes of the panel: 32 are what one mma.sync sums over
            unsigned int a[4][4], b[FRAGMENTS_N][2];
#pragma unroll
            for (int f = 0; f < 4; ++f) load_matrices(a[f], patch + patch_row[f] + k);
#pragma unroll
            for (int n = 0; n < FRAGMENTS_N; n += 2) {
                unsigned int two[4];  // 16 output channels
                load_matrices(two, tap_weights + n * 8 * PITCH + k);
                b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
            }
#pragma unroll
            for (int f = 0; f < 4; ++f)
#pragma unroll
                for (int n = 0; n < FRAGMENTS_N; ++n) multiply(sum[f][n], a[f], b[n]);
        }
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
                *reinterpret_cast<float2*>(result + pixel * RESULT_PITCH + result_place(channel)) = {
                    sum[f][n][2 * half], sum[f][n][2 * half + 1]};
            }
    locate_result(c, tile, pixel_of);
    __syncthreads();
    write_result(c, tile, result, pixel_of);
}
