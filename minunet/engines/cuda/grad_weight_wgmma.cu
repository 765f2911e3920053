// The gradient of the weights of grad_weight.cu for Hopper GPUs, in bf16: the same sums and arguments, by wgmma.
//
// Specification: as in grad_weight.cu.
//
// Idea. Pixels and their channels lie in planes, as in conv_wgmma.cu: 16 bytes, 8 channels, of all pixels, then the
// next 8. Here the pixels are summed over, and what lies together are channels: the factors are "MN-major" (wgmma.cuh),
// which wgmma takes of numbers of 16 bits (and only these, so TF32 stays with grad_weight.cu). One product sums over 16
// pixels of a row of the tile, and a tap is again only another beginning.
//
// A block takes 64 channels of the patch, PIXEL_SIDE channels of the pixels and TAP_ROWS x TAPS taps: a warpgroup for
// each row of taps, the sums of whose taps fill its registers. Four more warps bring the tiles, to three stages in
// turn, and say one tile later that a tile is there, as in conv_wgmma.cu.
//
// Cost against the roofline (H100): 3x3, a tile is 9 x 8 wgmma of 32 cycles, in which shared memory gives all of the 4
// KB that each reads, and takes 40 KB of the next tile: it is the limit, at about 85 % of the tensor cores' peak. L2
// gives the 40 KB in 2304 cycles: 4 TB/s for all multiprocessors.
constexpr int STAGES = 3, PATCH_SIDE = 64, PIXEL_SIDE = 8 * FRAGMENTS;
#include "grad_weight.cuh"
#include "wgmma.cuh"

constexpr int MULTIPLIERS = 128 * TAP_ROWS, LOADERS = 128, THREADS = MULTIPLIERS + LOADERS;
// In pixels, at least PATCH and PIXELS: 1 more than a multiple of 8, so that the 8 parts of a pixel are written to
// different groups of banks.
constexpr int PATCH_PLANE = 185, PIXEL_PLANE = 129;
constexpr int PATCH_BYTES = PATCH_PARTS * PATCH_PLANE * 16;
constexpr int STAGE_BYTES = PATCH_BYTES + PIXEL_PARTS * PIXEL_PLANE * 16;
enum { FULL = 1, FREE = FULL + STAGES };  // the barriers, of the stages

// The products of a tile's rows from FIRST on, but for those from END on, as one group: 16 pixels of each row, for
// COUNT taps side by side.
template <int COUNT, int FIRST, int END>
__device__ __forceinline__ void multiply_rows(float (&sum)[TAPS][FRAGMENTS][4], Matrix corner, Matrix channels) {
    products_begin();
#pragma unroll
    for (int row = FIRST; row < END; ++row)
#pragma unroll
        for (int v = 0; v < COUNT; ++v)
            multiply_group<1>(sum[v], later(corner, (row * PATCH_COLUMNS + v) * 16),
                              later(channels, row * COLUMNS * 16));
    products_commit();
}

// The same for the taps that there are: a parity class of a transposed convolution may have one row, one column.
template <int FIRST, int END>
__device__ __forceinline__ void multiply(const Share& s, int tap_row, float (&sum)[TAPS][FRAGMENTS][4], Matrix corner,
                                         Matrix channels) {
    if (TAPS == 3) {
        multiply_rows<TAPS, FIRST, END>(sum, corner, channels);
    } else if (tap_row < s.tap_rows) {
        if (s.tap_columns == TAPS) multiply_rows<TAPS, FIRST, END>(sum, corner, channels);
        else multiply_rows<1, FIRST, END>(sum, corner, channels);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grad_weight(const element* __restrict__ patch, int patch_pitch, int patch_channels,
                const element* __restrict__ pixels, int pixel_pitch, int pixel_channels, int images, int height,
                int width, int transposed, int kernel, int splits, int patch_stride, int pixel_stride,
                float* __restrict__ partials) {
    const Product p = {patch, patch_pitch, patch_channels, pixels, pixel_pitch,  pixel_channels, images,  height,
                       width, transposed,  kernel,         splits, patch_stride, pixel_stride,   partials};
    DYNAMIC_SHARED(shared);

    // The shuffle changes nothing. It tells the compiler that a warp's lanes agree, which wgmma in a branch needs.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const Share s = share_of(p);
    const int tiles = s.last_tile - s.first_tile;

    if (warp >= MULTIPLIERS / 32) {
        const int worker = threadIdx.x - MULTIPLIERS;
        Place at(s, s.first_tile);
        int rows[ROWS + 2];  // of the images, of the tile's patch: as row_number says
        for (int tile = 0; tile < tiles + 1; ++tile) {
            if (tile < tiles) {
                if (tile >= STAGES) barrier_wait(FREE + tile % STAGES, MULTIPLIERS + LOADERS);
                unsigned char* to = shared + tile % STAGES * STAGE_BYTES;
                if (tile == 0 || at.column == 0) {  // the rows have changed: their numbers, each from the one before
                    int stacked = at.row - 1, image = stacked / (height + 1), i = stacked - image * (height + 1);
#pragma unroll
                    for (int r = 0; r < ROWS + 2; ++r) {
                        rows[r] = i >= 0 && i < height && image < images ? stacked - image : -1;
                        ++stacked;
                        if (++i > height) i = 0, ++image;
                    }
                }
                load_tile<16, 16>(
                    p, s, at, rows, worker, LOADERS,
                    [&](int pixel, int part) { return to + (part * PATCH_PLANE + pixel) * 16; },
                    [&](int pixel, int part) { return to + PATCH_BYTES + (part * PIXEL_PLANE + pixel) * 16; });
                at.next(p);
            }
            copy_commit();
            if (tile < 1) continue;
            copy_wait<1>();
            written_for_products();
            barrier_arrive(FULL + (tile - 1) % STAGES, MULTIPLIERS + LOADERS);
        }
        copy_wait<0>();
        return;
    }

    const int tap_row = warp / 4;
    // A product's depth is 16 pixels, two blocks of 8: 128 bytes from the one to the other.
    const Matrix corner =
        matrix(shared + ((1 + s.first + tap_row) * PATCH_COLUMNS + 1 + s.first) * 16, 128, 16 * PATCH_PLANE);
    const Matrix channels = matrix(shared + PATCH_BYTES, 128, 16 * PIXEL_PLANE);
    float sum[TAPS][FRAGMENTS][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % STAGES;
        const Matrix taps = later(corner, stage * STAGE_BYTES), sources = later(channels, stage * STAGE_BYTES);
        barrier_wait(FULL + stage, MULTIPLIERS + LOADERS);
        multiply<0, 1>(s, tap_row, sum, taps, sources);
        products_wait<1>();  // those of the tile before are over; its stage will be filled again, if there is a use
        if (tile > 0 && tile - 1 + STAGES < tiles) barrier_arrive(FREE + (tile - 1) % STAGES, MULTIPLIERS + LOADERS);
        multiply<1, ROWS>(s, tap_row, sum, taps, sources);
    }
    products_wait<0>();
    if (tap_row >= s.tap_rows) return;
    const int lane = threadIdx.x % 32, m = s.first_m + 16 * (warp % 4) + lane / 4, n = s.first_n + lane % 4 * 2;
#pragma unroll
    for (int v = 0; v < TAPS; ++v) {
        if (v >= s.tap_columns) continue;
        float* to = sums_of(p, s, tap_row, v);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
            for (int i = 0; i < 4; ++i) write_sum(p, to, m + i / 2 * 8, n + 8 * f + i % 2, sum[v][f][i]);
    }
}
