// The convolution of conv.cu for Hopper GPUs: the same sums and the same arguments, by wgmma. TF32 and bf16.
//
// Specification: as in conv.cu.
//
// Idea. wgmma reads both factors from shared memory (wgmma.cuh), while the threads already fetch what comes next. The
// patch lies there in planes: the first 16 bytes of all pixels, then the second, ... A plane is then a matrix of blocks
// of 8 neighbouring pixels, and a tap shifts where it begins, by so many pixels of 16 bytes. A square of 8 x 8 pixels x
// CHANNELS channels is one product: along a row the 8 pixels of a block, and `rows` of the matrix leads to the next row
// of the patch. Nothing is copied, and no thread computes an address for it. Two warpgroups have two squares each.
//
// Who does what. Warpgroups that multiply do nothing else: a warp that has issued a few wgmma waits for the tensor
// cores, and would issue its copies late. So other warps bring the data, to a few stages in turn: one or two the
// weights, a row of taps at a time (that is a step here), the others the patches. Who fills a stage waits until it is
// free and copies. That it is full is said one turn later, when the next copies are already under way: to wait at once
// would leave the memory idle. The multipliers wait until what a step needs is there and issue its first
// products; while these run they wait for those of the step before, say that what they have read is free, and issue the
// others: who issues waits once some are under way, and would say it late. The waiting is by named barriers
// (wgmma.cuh), two for each stage: full, and free.
//
// A warp that works by itself has nobody to hide its waiting, and a step is as long as the longest of these roles
// (docs/engines/gpu.md). So each has few instructions: a step is a whole row of taps, nothing is looked up that can be
// counted, weights lie in memory as they are read, and all lanes' addresses differ by constants.
//
// Cost against the roofline (bf16, 128 channels): a step of a block, 256 x 128 x 3 x 32 products, takes the tensor
// cores 1536 cycles; shared memory gives 6 KB for each 64 cycles of wgmma, 3/4 of what it can (128 bytes a cycle).
// Counted, for a step: multipliers 145 instructions, weights 138; pixels 190 for a patch of three steps. Measured on an
// H200, 112 x 112 pixels, 128 to 128 channels, batch 16: 539 TFLOP/s in bf16, and 437 with batch norm's statistics.
constexpr int WARPGROUPS = 2, SQUARES = 2;  // multiplying warpgroups, and squares of 8 x 8 pixels of each
constexpr int CHANNELS = 8 * FRAGMENTS, BLOCKS = CHANNELS == 128 ? 1 : 2;  // at a time on a multiprocessor
constexpr int STAGES = BLOCKS == 1 ? 4 : 3, PATCHES = 3;
constexpr int MULTIPLIERS = 128 * WARPGROUPS;
constexpr int WEIGHT_LOADERS = CHANNELS == 64 ? 32 : 64;  // threads that bring them
constexpr int PATCH_LOADERS = CHANNELS == 64 ? 32 : 128 - WEIGHT_LOADERS;
constexpr int THREADS = MULTIPLIERS + WEIGHT_LOADERS + PATCH_LOADERS;
constexpr int LATE = 1;  // by how many steps after its own copies a thread says that they have come
constexpr int PIXELS = 64 * SQUARES * WARPGROUPS;
constexpr int PATCH_PLANE = 346;  // pixels, at least PATCH: 2 more than a multiple of 8, so that the 4 parts of 2
                                  // pixels are written to 8 different groups of banks
constexpr int PATCH_BYTES = 4 * 16 * PATCH_PLANE, TAP_BYTES = 4 * 16 * CHANNELS, STAGE_BYTES = 3 * TAP_BYTES;
enum { FULL = 1, FREE = FULL + STAGES, PATCH_FULL = FREE + STAGES, PATCH_FREE = PATCH_FULL + PATCHES };  // barriers
#include "conv.cuh"
#include "wgmma.cuh"

// A step of the sum: a row of taps, of a patch. The patches are those of the panels, one for each source.
struct Step {
    int panel = 0, source = 0, row = 0;
    Axis rows, columns;  // the taps of the patch

    __device__ __forceinline__ Step(const Convolution& c, int parity) { look_up(c, parity); }
    __device__ __forceinline__ void look_up(const Convolution& c, int parity) {
        const int both = c.direction == UP ? parity : source;  // parities, of row and column
        rows = axis_of(c.direction, c.kernel, both / 2), columns = axis_of(c.direction, c.kernel, both % 2);
    }
    // Goes to the next patch.
    __device__ __forceinline__ void next_patch(const Convolution& c, int parity) {
        row = 0;
        if (++source == sources(c)) source = 0, ++panel;
        if (c.direction == UP_GRAD_INPUT) look_up(c, parity);
    }
    __device__ __forceinline__ void next(const Convolution& c, int parity) {
        if (++row == rows.count) next_patch(c, parity);
    }
    // The kernel's tap that is the first of the row; the others follow it by columns.step.
    __device__ __forceinline__ int first_tap(const Convolution& c) const {
        return (rows.start + rows.step * (rows.first + row)) * c.kernel + columns.start + columns.step * columns.first;
    }
};

// UP_GRAD_INPUT: each of the kernel's rows of taps meets two of the four parity classes.
__device__ __forceinline__ int count_steps(const Convolution& c, int parity) {
    return c.panels() *
           (c.direction == UP_GRAD_INPUT ? 2 * c.kernel : axis_of(c.direction, c.kernel, parity / 2).count);
}

// The products of a row's taps from FIRST on, but for those from END on, as one group. (Made a group after a branch
// they would be two: the compiler ends each branch's products with a group of its own.)
template <int FIRST, int END>
__device__ __forceinline__ void multiply_taps(float (&sum)[SQUARES][FRAGMENTS][4], const Matrix (&pixels)[SQUARES],
                                              Matrix channels) {
    products_begin();
#pragma unroll
    for (int tap = FIRST; tap < END; ++tap)
#pragma unroll
        for (int part = 0; part < 4; part += 2)
#pragma unroll
            for (int q = 0; q < SQUARES; ++q)
                multiply_group<0>(sum[q], later(pixels[q], tap * 16 + part * 16 * PATCH_PLANE),
                                  later(channels, tap * TAP_BYTES + part * 16 * CHANNELS));
    products_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
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

    const int lane = threadIdx.x % 32, loader = static_cast<int>(threadIdx.x) - MULTIPLIERS,
              patch_columns = c.patch_columns();
    // The shuffle changes nothing. It tells the compiler that a warp's lanes agree, which wgmma in a branch needs.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const Tile tile = tile_of(c);
    const int steps = count_steps(c, tile.parity), patches = sources(c) * c.panels();
    locate_patch(c, tile, pixel_of);
    __syncthreads();  // all of this is complete

    unsigned char* weights = shared + PATCHES * PATCH_BYTES;
    // The squares of 8 x 8 pixels that this warpgroup multiplies: the tile has one or two of them side by side. Of two
    // `across` is 1: the shift that halves, and the mask of the last bit.
    int first_row[SQUARES], first_column[SQUARES];
    for (int q = 0; q < SQUARES; ++q) {
        const int square = warp / 4 * SQUARES + q, across = columns_log2 - 3;
        first_row[q] = square >> across << 3, first_column[q] = (square & across) << 3;
    }
    float sum[SQUARES][FRAGMENTS][4] = {};
    Step at(c, tile.parity);

    if (warp >= MULTIPLIERS / 32 && warp < (MULTIPLIERS + WEIGHT_LOADERS) / 32) {  // bring the weights
        const int tap_stride = c.panels() * c.channel_tiles() * TAP_ELEMENTS;      // elements from a tap to the next
        for (int step = 0, stage = 0, before = 0; step < steps + LATE; ++step) {
            if (step < steps) {
                __syncwarp();  // a barrier takes whole warps
                if (step >= STAGES) barrier_wait(FREE + stage, MULTIPLIERS + WEIGHT_LOADERS);
                const int stride = at.columns.step * tap_stride;
                const element* from = address_of(weights_of(c, tile, at.first_tap(c), at.panel), loader, 16);
                unsigned char* to = weights + stage * STAGE_BYTES + loader * 16;
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                    if (i < at.columns.count) {
#pragma unroll
                        for (int q = 0; q < 4 * CHANNELS; q += WEIGHT_LOADERS)
                            copy_async(to + q * 16, from + q * ELEMENTS);
                    }
                    from = address_of(from, stride, sizeof(element));
                    to += TAP_BYTES;
                }
                at.next(c, tile.parity);
            }
            copy_commit();
            if (step == 0) copy_wait<0>();  // nobody has work before the first has come
            else copy_wait<LATE>();
            if (step == 0 || step > LATE) {  // step 1 would confirm step 0 again
                written_for_products();
                barrier_arrive(FULL + (step == 0 ? 0 : before), MULTIPLIERS + WEIGHT_LOADERS);
            }
            before = stage;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        copy_wait<0>();
    } else if (warp > MULTIPLIERS / 32) {  // bring the patches: confirmed one patch late, but the first at once
        const int worker = loader - WEIGHT_LOADERS;
        for (int patch = 0, slot = 0, before = 0; patch < patches + 1; ++patch) {
            if (patch < patches) {
                if (patch >= PATCHES) barrier_wait(PATCH_FREE + slot, MULTIPLIERS + PATCH_LOADERS);
                unsigned char* first = shared + slot * PATCH_BYTES;
                auto to = [&](int pixel, int part) { return first + (part * PATCH_PLANE + pixel) * 16; };
                if (aligned(c)) load_patch<PATCH_LOADERS, 16>(c, at.panel, at.source, worker, pixel_of, to);
                else load_any_patch<PATCH_LOADERS>(c, at.panel, at.source, worker, pixel_of, to);
                at.next_patch(c, tile.parity);
            }
            copy_commit();
            if (patch == 0) copy_wait<0>();
            else copy_wait<1>();
            if (patch != 1) {
                written_for_products();
                barrier_arrive(PATCH_FULL + (patch == 0 ? 0 : before), MULTIPLIERS + PATCH_LOADERS);
            }
            before = slot;
            slot = slot + 1 == PATCHES ? 0 : slot + 1;
        }
        copy_wait<0>();
    } else {
        Matrix corners[SQUARES];
        for (int q = 0; q < SQUARES; ++q)
            corners[q] = matrix(shared + (first_row[q] * patch_columns + first_column[q]) * 16, 16 * PATCH_PLANE,
                                16 * patch_columns);
        const Matrix channels = matrix(weights, 16 * CHANNELS, 128);
        int patch = -1, slot = PATCHES - 1, slot_before = 0, before = 0;
        for (int step = 0, stage = 0; step < steps; ++step) {
            if (at.row == 0) {
                ++patch;
                slot_before = slot;
                slot = slot + 1 == PATCHES ? 0 : slot + 1;
                barrier_wait(PATCH_FULL + slot, MULTIPLIERS + PATCH_LOADERS);
            }
            const int place =
                slot * PATCH_BYTES + ((at.rows.first + at.row + 1) * patch_columns + at.columns.first + 1) * 16;
            const Matrix pixels[SQUARES] = {later(corners[0], place), later(corners[1], place)};
            const Matrix taps = later(channels, stage * STAGE_BYTES);
            barrier_wait(FULL + stage, MULTIPLIERS + WEIGHT_LOADERS);
            multiply_taps<0, 1>(sum, pixels, taps);
            products_wait<1>();  // those of the step before are over: what they read is free, if there is a use for it
            if (step > 0 && step - 1 + STAGES < steps) barrier_arrive(FREE + before, MULTIPLIERS + WEIGHT_LOADERS);
            if (at.row == 0 && patch > 0 && patch - 1 + PATCHES < patches)
                barrier_arrive(PATCH_FREE + slot_before, MULTIPLIERS + PATCH_LOADERS);
            if (at.columns.count == 3) multiply_taps<1, 3>(sum, pixels, taps);
            else if (at.columns.count == 2) multiply_taps<1, 2>(sum, pixels, taps);
            before = stage;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            at.next(c, tile.parity);
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
                *reinterpret_cast<float2*>(result + pixel * RESULT_PITCH + result_place(8 * f) + lane % 4 * 2) = {
                    sum[q][f][2 * half], sum[q][f][2 * half + 1]};
        }
    locate_result(c, tile, pixel_of);
    __syncthreads();
    write_result(c, tile, result, pixel_of);
}
