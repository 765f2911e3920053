// The convolution of conv.cu for Hopper GPUs: the same sums and the same arguments, by wgmma. TF32 and bf16.
//
// Idea. wgmma reads both factors from shared memory (wgmma.cuh), while the threads already fetch what comes next. The
// patch lies there in planes: the first 16 bytes of all pixels, then the second, ... A plane is then a matrix of blocks
// of 8 neighbouring pixels, and a tap shifts where it begins, by so many pixels of 16 bytes. A square of 8 x 8 pixels x
// CHANNELS channels is one product: along a row the 8 pixels of a block, and `rows` of the matrix leads to the next row
// of the patch. Nothing is copied, and no thread computes an address for it. Two warpgroups have two squares each.
//
// Who does what. Warpgroups that multiply do nothing else: a warp that has issued a few wgmma waits for the tensor
// cores, and would issue its copies late. So four more warps bring the data: one the weights, to four stages, three the
// patches, to three. Who fills a stage waits until it is free, copies, and says a little later, when these copies have
// come while the next are under way, that it is full. The multipliers wait until what a step needs is there, issue its
// products, and say that what the step before has read is free as soon as its products are over, while these still run.
// The waiting is by named barriers (wgmma.cuh), two for each stage.
//
// BULK brings the weights by bulk copies (bulk.cuh) instead: the copies are what limits this kernel (below).
//
// Cost against the roofline (bf16): a step of a block, 256 x 128 x 32 products, takes the tensor cores 512 cycles;
// shared memory gives 6 KB for each 64 cycles of wgmma, 3/4 of what it can. Measured on an H200, 112 x 112 pixels, 128
// to 128 channels, batch 16, with batch norm's statistics: 241 TFLOP/s in bf16, 159 in TF32, where conv.cu had 180 and
// 97; without statistics 281 and 175. The copies limit it, and not by their bytes: each 16 take about 2.6 cycles, and
// there are 663 for a step (docs/engines/gpu.md).
constexpr int STAGES = 4, PATCHES = 3;
constexpr int WARPGROUPS = 2, SQUARES = 2;  // multiplying warpgroups, and squares of 8 x 8 pixels of each
constexpr int MULTIPLIERS = 128 * WARPGROUPS, THREADS = MULTIPLIERS + 128;
constexpr int WEIGHT_LOADERS = 32, PATCH_LOADERS = 96;  // threads that bring them
constexpr int LATE = BULK ? 0 : 2;                      // by how many steps a thread's own copies are confirmed late
constexpr int PIXELS = 64 * SQUARES * WARPGROUPS, CHANNELS = 8 * FRAGMENTS;
constexpr int PATCH = 340;        // pixels of the largest patch: (32 + 2) (8 + 2)
constexpr int PATCH_PLANE = 346;  // and so many places: 2 more than a multiple of 8, so that the 4 parts of 2 pixels
                                  // are written to 8 different groups of banks
constexpr int PATCH_BYTES = 4 * 16 * PATCH_PLANE, WEIGHT_BYTES = 4 * 16 * CHANNELS;
constexpr int RESULT_PITCH = CHANNELS + 8;
enum { FULL = 1, FREE = FULL + STAGES, PATCH_FULL = FREE + STAGES, PATCH_FREE = PATCH_FULL + PATCHES };  // barriers
#include "bulk.cuh"
#include "conv.cuh"
#include "wgmma.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
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
    __shared__ Tap taps[9];
    __shared__ __align__(8) Arrival arrived[STAGES];  // of the weights, with BULK

    const int lane = threadIdx.x % 32, patch_columns = c.patch_columns();
    // The shuffle changes nothing. It tells the compiler that a warp's lanes agree, which wgmma in a branch needs.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const Tile tile = tile_of(c);
    const int tap_count = plan_taps(c, tile.parity, taps), steps = tap_count * c.panels();
    locate_patch(c, tile, pixel_of);
    if (BULK && threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; ++stage) arrival_init(&arrived[stage]);
    __syncthreads();  // all of this is complete

    unsigned char* weights = shared + PATCHES * PATCH_BYTES;
    const int panel_patches = c.in_step() * c.in_step(), patches = panel_patches * c.panels();
    // The squares of 8 x 8 pixels that this warpgroup multiplies: the tile has one or two of them side by side.
    int first_row[SQUARES], first_column[SQUARES];
    for (int q = 0; q < SQUARES; ++q) {
        const int square = warp / 4 * SQUARES + q, across = columns_log2 - 3;
        first_row[q] = square >> across << 3, first_column[q] = (square & across) << 3;
    }
    float sum[SQUARES][FRAGMENTS][4] = {};

    if (warp == MULTIPLIERS / 32) {                                         // brings the weights
        const int left = min(CHANNELS, out_channels - tile.first_channel);  // what is beyond them is not used
        int panel = 0, tap = 0;
        for (int step = 0; step < steps + LATE; ++step) {
            const int stage = step % STAGES;
            if (step < steps) {
                __syncwarp();  // with BULK one lane has been busy alone
                if (step >= STAGES) barrier_wait(FREE + stage, MULTIPLIERS + WEIGHT_LOADERS);
                if (BULK && lane == 0) arrival_expect(&arrived[stage], 4 * 16 * left);
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const element* from = weight + weight_place(c, tile, taps[tap], panel, part);
                    unsigned char* to = weights + stage * WEIGHT_BYTES + part * 16 * CHANNELS;
                    if (BULK) {
                        if (lane == 0) copy_bulk(to, from, 16 * left, &arrived[stage]);
                    } else {
#pragma unroll
                        for (int o = lane; o < CHANNELS; o += WEIGHT_LOADERS)
                            copy_async(to + o * 16, from + min(o, left - 1) * ELEMENTS, 16);
                    }
                }
                if (++tap == tap_count) tap = 0, ++panel;
            }
            if (BULK) continue;
            copy_commit();
            if (step < LATE) continue;
            copy_wait<LATE>();
            written_for_products();
            barrier_arrive(FULL + (step - LATE) % STAGES, MULTIPLIERS + WEIGHT_LOADERS);
        }
        copy_wait<0>();
    } else if (warp > MULTIPLIERS / 32) {  // bring the patches, one patch late
        const bool aligned = x_pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(x) % 16 == 0;
        const int worker = threadIdx.x - MULTIPLIERS - WEIGHT_LOADERS;
        int panel = 0, tap = 0;  // the first tap of the patch
        for (int patch = 0; patch < patches + 1; ++patch) {
            if (patch < patches) {
                if (patch >= PATCHES) barrier_wait(PATCH_FREE + patch % PATCHES, MULTIPLIERS + PATCH_LOADERS);
                unsigned char* to = shared + patch % PATCHES * PATCH_BYTES;
                load_patch<PATCH_LOADERS>(c, panel, taps[tap], pixel_of, aligned, worker,
                                          [&](int pixel, int part) { return to + (part * PATCH_PLANE + pixel) * 16; });
                do
                    if (++tap == tap_count) tap = 0, ++panel;
                while (!taps[tap].first);
            }
            copy_commit();
            if (patch < 1) continue;
            copy_wait<1>();
            written_for_products();
            barrier_arrive(PATCH_FULL + (patch - 1) % PATCHES, MULTIPLIERS + PATCH_LOADERS);
        }
        copy_wait<0>();
    } else {
        Matrix pixels[SQUARES];
        for (int q = 0; q < SQUARES; ++q)
            pixels[q] = matrix(shared + (first_row[q] * patch_columns + first_column[q]) * 16, 16 * PATCH_PLANE,
                               16 * patch_columns);
        const Matrix channels = matrix(weights, 16 * CHANNELS, 128);
        int patch = -1, tap = 0;
        for (int step = 0; step < steps; ++step) {
            const int stage = step % STAGES;
            const bool first = taps[tap].first;
            if (first) barrier_wait(PATCH_FULL + ++patch % PATCHES, MULTIPLIERS + PATCH_LOADERS);
            const int place = patch % PATCHES * PATCH_BYTES + taps[tap].place * 16;
            tap = tap + 1 == tap_count ? 0 : tap + 1;
            if (BULK) arrival_wait(&arrived[stage], step / STAGES % 2);
            else barrier_wait(FULL + stage, MULTIPLIERS + WEIGHT_LOADERS);
            products_begin();
#pragma unroll
            for (int part = 0; part < 4; part += 2)
#pragma unroll
                for (int q = 0; q < SQUARES; ++q)
                    multiply_group<0>(sum[q], later(pixels[q], place + part * 16 * PATCH_PLANE),
                                      later(channels, stage * WEIGHT_BYTES + part * 16 * CHANNELS));
            products_commit();
            products_wait<1>();  // those of the step before are over: what they read is free, if there is a use for it
            if (step > 0 && step - 1 + STAGES < steps)
                barrier_arrive(FREE + (step - 1) % STAGES, MULTIPLIERS + WEIGHT_LOADERS);
            if (first && patch > 0 && patch - 1 + PATCHES < patches)
                barrier_arrive(PATCH_FREE + (patch - 1) % PATCHES, MULTIPLIERS + PATCH_LOADERS);
        }
        products_wait<0>();
    }
    __syncthreads();  // from here on shared memory holds the tile of the result, in rows of channels

    // A lane holds pixels lane / 4 and lane / 4 + 8 of its warp's 16, two rows of the square, and of each 8 channels
    // two.
    float* result = reinterpret_cast<float*>(shared);
    if (warp < MULTIPLIERS / 32)
#pragma unroll
        for (int i = 0; i < 2 * SQUARES; ++i) {
            const int q = i / 2, half = i % 2;
            const int pixel = ((first_row[q] + 2 * (warp % 4) + half) << columns_log2) + first_column[q] + lane / 4;
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f)
                *reinterpret_cast<float2*>(result + pixel * RESULT_PITCH + 8 * f + lane % 4 * 2) = {
                    sum[q][f][2 * half], sum[q][f][2 * half + 1]};
        }
    locate_result(c, tile, pixel_of);
    __syncthreads();
    write_result(c, tile, result, pixel_of);
    if (partials) write_statistics(c, tile, result, pixel_of);
}
