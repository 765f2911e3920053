// The gradient of a convolution with respect to its weights, on tensor cores.
//
// Specification: minunet.ops conv2d_backward[1] (3x3, stride 1, "same") and conv_transpose2d_backward[1] (kernel 2 or
// 3, stride 2, "same").
//
// Idea. Each tap's gradient is a matrix product, and what is summed over, its long axis, are the pixels:
//
//     dweight[u, v] [c, o] = sum over pixels  x [pixel + (u, v), c]  dy [pixel, o]
//
// A block takes 64 channels c, 64 channels o and all nine taps, and walks over tiles of 8 x 16 pixels: dy's, and x's
// with a border of one pixel. 12 warps: three rows of taps x four quarters of the 64 x 64; each keeps three taps' sums
// in registers. There are far fewer (c, o) blocks than a GPU has multiprocessors, so the pixels are split, too: each
// block writes its own partial sum, and sum_partials (reduce.cu) adds them in a fixed order. No atomics: the same bits
// every time.
//
// For a transposed convolution the same sum, of dy's parity classes (conv.cu) moved by the taps, and x:
// the patch is dy's, the pixels are x's, and rows and columns of the result change places (patch_stride, pixel_stride).
//
// In memory the channels of a pixel are neighbours; the tensor core wants as neighbours, in both factors, what is
// summed over: pixels. For bf16 ldmatrix transposes on the way. For TF32 each lane fetches its words itself, of the
// patch two neighbouring channels at a time: which channel is which row of a fragment is free. Rows are 64 words + 8,
// so that what a warp reads at a time is in 32 different banks.
//
// Cost against the roofline (H100, TF32): a warp reads 32 words a lane for 24 mma.sync: 384 cycles of shared memory
// for 12 warps, beside about 450 for their products. L2: (180 + 128) * 256 bytes for 9 * 2 * 64 * 64 * 128
// operations, 120 operations a byte: 5.5 TB/s feed 650 TFLOP/s.
constexpr int STAGES = 2, PATCH_SIDE = 64, PIXEL_SIDE = 64;
#include "grad_weight.cuh"

constexpr int MOST_THREADS = 384;
constexpr int PITCH = 64 * sizeof(element) + (sizeof(element) == 4 ? 32 : 16);  // bytes from pixel to pixel, see above
constexpr int STAGE_BYTES = (PATCH + PIXELS) * PITCH;
constexpr int K_STEP = 32 / sizeof(element);  // pixels that one tensor-core instruction sums over
#ifdef PRECISION_F32
constexpr int AT_ONCE = 1;  // K_STEPs in a turn of the loop: float32's three products leave registers for one
#else
constexpr int AT_ONCE = 2;
#endif

// The 32 patch channels (two fragments of 16) and 32 pixel channels (four of 8) that a warp multiplies, for K_STEP
// pixels. from: where this lane's part is, of the first pixel.
#ifdef PRECISION_BF16
__device__ __forceinline__ int patch_part(int lane) { return (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16; }
__device__ __forceinline__ int pixel_part(int lane) { return (lane % 8 + lane / 8 % 2 * 8) * PITCH + lane / 16 * 16; }
__device__ __forceinline__ void load_a(unsigned int (&a)[2][4], const unsigned char* from) {
    load_matrices_transposed(a[0], from);
    load_matrices_transposed(a[1], from + 32);
}
__device__ __forceinline__ void load_b(unsigned int (&b)[4][2], const unsigned char* from) {
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
        unsigned int d[4];
        load_matrices_transposed(d, from + n * 16);
        b[n][0] = d[0], b[n][1] = d[1], b[n + 1][0] = d[2], b[n + 1][1] = d[3];
    }
}
__device__ __forceinline__ int patch_channel(int fragment, int row) { return 16 * fragment + row; }
#else
// Of each 16 channels of the patch a lane has 2 g and 2 g + 1 (g = lane / 4): they are rows g and g + 8.
__device__ __forceinline__ int patch_part(int lane) { return lane % 4 * PITCH + lane / 4 * 8; }
__device__ __forceinline__ int pixel_part(int lane) { return lane % 4 * PITCH + lane / 4 * 4; }
__device__ __forceinline__ void load_a(unsigned int (&a)[2][4], const unsigned char* from) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const uint2 two = *reinterpret_cast<const uint2*>(from + k * 4 * PITCH + m * 64);
            a[m][2 * k] = two.x, a[m][2 * k + 1] = two.y;
        }
}
__device__ __forceinline__ void load_b(unsigned int (&b)[4][2], const unsigned char* from) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) b[n][k] = *reinterpret_cast<const unsigned int*>(from + k * 4 * PITCH + n * 32);
}
__device__ __forceinline__ int patch_channel(int fragment, int row) { return 16 * fragment + 2 * (row % 8) + row / 8; }
#endif

// The products of a tile, for COUNT taps side by side. patch: where this lane's part of the first tap is, pixels: of
// the pixels.
template <int COUNT>
__device__ __forceinline__ void multiply_tile(float (&sum)[3][2][4][4], const unsigned char* patch,
                                              const unsigned char* pixels) {
#pragma unroll 1
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll AT_ONCE
        for (int k = 0; k < COLUMNS; k += K_STEP) {
            unsigned int a[2][4], b[4][2];
            load_b(b, pixels + k * PITCH);
#pragma unroll
            for (int v = 0; v < COUNT; ++v) {
                load_a(a, patch + (k + v) * PITCH);
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply(sum[v][m][n], a[m], b[n]);
            }
        }
        patch += PATCH_COLUMNS * PITCH;
        pixels += COLUMNS * PITCH;
    }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    grad_weight(const element* __restrict__ patch, int patch_pitch, int patch_channels,
                const element* __restrict__ pixels, int pixel_pitch, int pixel_channels, int images, int height,
                int width, int transposed, int kernel, int splits, int patch_stride, int pixel_stride,
                float* __restrict__ partials) {
    const Product p = {patch, patch_pitch, patch_channels, pixels, pixel_pitch,  pixel_channels, images,  height,
                       width, transposed,  kernel,         splits, patch_stride, pixel_stride,   partials};
    DYNAMIC_SHARED(shared);
    __shared__ int rows[2][ROWS + 2];  // the numbers of the rows of two tiles

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tap_row = warp / 4, quarter_m = warp / 2 % 2 * 32, quarter_n = warp % 2 * 32;
    const Share s = share_of(p);
    Place at(s, s.first_tile);  // the tile to be loaded next
    auto load = [&](int tile) {
        if (tile >= s.last_tile) return;
        unsigned char* to = shared + tile % STAGES * STAGE_BYTES;
        load_tile<PITCH, PITCH>(
            p, s, at, rows[tile % 2], threadIdx.x, blockDim.x,
            [&](int pixel, int part) { return to + pixel * PITCH + part * 16; },
            [&](int pixel, int part) { return to + (PATCH + pixel) * PITCH + part * 16; });
        at.next(p);
    };
    // This lane's part of the first tap, and of the pixels, in a stage.
    const int corner = ((1 + s.first + tap_row) * PATCH_COLUMNS + 1 + s.first) * PITCH +
                       quarter_m * static_cast<int>(sizeof(element)) + patch_part(lane);
    const int channels = PATCH * PITCH + quarter_n * static_cast<int>(sizeof(element)) + pixel_part(lane);

    float sum[3][2][4][4] = {};  // [tap of the row][16 patch channels][8 pixel channels]
    auto find_rows = [&](int tile) {
        if (threadIdx.x < ROWS + 2)
            rows[tile % 2][threadIdx.x] = row_number(p, Place(s, tile).row - 1 + static_cast<int>(threadIdx.x));
    };
    find_rows(s.first_tile);
    __syncthreads();
    load(s.first_tile);
    copy_commit();
    find_rows(s.first_tile + 1);
    for (int tile = s.first_tile; tile < s.last_tile; ++tile) {
        copy_wait<0>();
        __syncthreads();  // the tile is there for all; all are done with the one before, whose buffer is filled now
        load(tile + 1);
        copy_commit();
        find_rows(tile + 2);
        if (tap_row >= s.tap_rows) continue;
        const unsigned char* stage = shared + tile % STAGES * STAGE_BYTES;
        if (s.tap_columns == 3) multiply_tile<3>(sum, stage + corner, stage + channels);
        else if (s.tap_columns == 2) multiply_tile<2>(sum, stage + corner, stage + channels);
        else multiply_tile<1>(sum, stage + corner, stage + channels);
    }
    copy_wait<0>();
    if (tap_row >= s.tap_rows) return;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int v = 0; v < 3; ++v) {
        if (v >= s.tap_columns) continue;
        float* to = sums_of(p, s, tap_row, v);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    write_sum(p, to, s.first_m + quarter_m + patch_channel(m, g + i / 2 * 8),
                              s.first_n + quarter_n + 8 * n + 2 * t + i % 2, sum[v][m][n][i]);
    }
}
