// The gradient of a convolution with respect to its weights, on tensor cores.
//
// Specification: minunet.ops conv2d_backward[1] (3x3, stride 1, "same") and conv_transpose2d_backward[1] (kernel 2 or
// 3, stride 2, "same").
//
// Idea. Each tap's gradient is a matrix product whose long axis, the one that is summed over, are the pixels:
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
// Pixels lie behind each other in memory, channels side by side; the tensor core wants, for both factors, neighbours in
// the summed axis side by side. For bf16 ldmatrix transposes on the way; for TF32 each lane fetches its words one by
// one, which costs no more: rows are 64 words + 8, so that the 4 x 8 words of a fragment are in 32 different banks.
//
// Cost against the roofline (H100, TF32): a warp reads 32 words a lane for 24 mma.sync: 384 cycles of shared memory for
// 12 warps, beside about 450 for their products. L2: (180 + 128) * 256 bytes for 9 * 2 * 64 * 64 * 128 operations, 120
// operations a byte: 5.5 TB/s feed 650 TFLOP/s.
constexpr int STAGES = 2, PATCH_SIDE = 64, PIXEL_SIDE = 64;
#include "grad_weight.cuh"

constexpr int MOST_THREADS = 384;
constexpr int PITCH = 64 * sizeof(element) + (sizeof(element) == 4 ? 32 : 16);  // bytes from pixel to pixel, see above
constexpr int STAGE_BYTES = (PATCH + PIXELS) * PITCH;
constexpr int K_STEP = 32 / sizeof(element);  // pixels that one tensor-core instruction sums over

// a (16 patch channels x K_STEP pixels) and b (K_STEP pixels x 16 pixel channels, two fragments) from rows of pixels.
// row(k): the address of pixel k's channels.
template <class Row>
__device__ __forceinline__ void load_a(unsigned int (&a)[4], int lane, int channel, Row row) {
#ifdef PRECISION_BF16
    load_matrices_transposed(a, row(lane % 8 + lane / 16 * 8) + (channel + lane / 8 % 2 * 8) * 2);
#else
    for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const unsigned int*>(row(lane % 4 + i / 2 * 4) + (channel + lane / 4 + i % 2 * 8) * 4);
#endif
}

template <class Row>
__device__ __forceinline__ void load_b(unsigned int (&b)[2][2], int lane, int channel, Row row) {
#ifdef PRECISION_BF16
    unsigned int d[4];
    load_matrices_transposed(d, row(lane % 8 + lane / 8 % 2 * 8) + (channel + lane / 16 * 8) * 2);
    b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
#else
    for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 2; ++i)
            b[n][i] = *reinterpret_cast<const unsigned int*>(row(lane % 4 + i * 4) + (channel + lane / 4 + n * 8) * 4);
#endif
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    grad_weight(const element* __restrict__ patch, int patch_pitch, int patch_channels,
                const element* __restrict__ pixels, int pixel_pitch, int pixel_channels, int images, int height,
                int width, int transposed, int kernel, int splits, int patch_stride, int pixel_stride,
                float* __restrict__ partials) {
    const Product p = {patch, patch_pitch, patch_channels, pixels, pixel_pitch,  pixel_channels, images,  height,
                       width, transposed,  kernel,         splits, patch_stride, pixel_stride,   partials};
    DYNAMIC_SHARED(shared);
    __shared__ int place[2][PATCH + PIXELS];  // for two tiles

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tap_row = warp / 4, quarter_m = warp / 2 % 2 * 32, quarter_n = warp % 2 * 32;
    const Share s = share_of(p);
    auto load = [&](int tile) {
        unsigned char* to = shared + tile % STAGES * STAGE_BYTES;
        load_tile(
            p, s, tile, place[tile % 2], threadIdx.x, blockDim.x,
            [&](int pixel, int part) { return to + pixel * PITCH + part * 16; },
            [&](int pixel, int part) { return to + (PATCH + pixel) * PITCH + part * 16; });
    };

    float sum[3][2][4][4] = {};  // [tap of the row][16 patch channels][8 pixel channels]
    locate_tile(p, s, s.first_tile, place[s.first_tile % 2], threadIdx.x, blockDim.x);
    __syncthreads();
    load(s.first_tile);
    copy_commit();
    locate_tile(p, s, s.first_tile + 1, place[(s.first_tile + 1) % 2], threadIdx.x, blockDim.x);
    for (int tile = s.first_tile; tile < s.last_tile; ++tile) {
        copy_wait<0>();
        __syncthreads();  // the tile is there for all; all are done with the one before, whose buffer is filled now
        load(tile + 1);
        copy_commit();
        locate_tile(p, s, tile + 2, place[tile % 2], threadIdx.x, blockDim.x);
        if (tap_row >= s.tap_rows) continue;
        const unsigned char* patch_tile = shared + tile % STAGES * STAGE_BYTES;
        const unsigned char* pixel_tile = patch_tile + PATCH * PITCH;
        for (int k = 0; k < PIXELS; k += K_STEP) {
            unsigned int a[2][4], b[4][2];
            auto pixel_row = [&](int pixel) { return pixel_tile + (k + pixel) * PITCH; };
            load_b(reinterpret_cast<unsigned int (&)[2][2]>(b[0]), lane, quarter_n, pixel_row);
            load_b(reinterpret_cast<unsigned int (&)[2][2]>(b[2]), lane, quarter_n + 16, pixel_row);
            const int corner = (k / COLUMNS + 1 + s.first + tap_row) * PATCH_COLUMNS + k % COLUMNS + 1 + s.first;
#pragma unroll
            for (int v = 0; v < 3; ++v) {
                if (v >= s.tap_columns) continue;
                auto patch_row = [&](int pixel) { return patch_tile + (corner + v + pixel) * PITCH; };
                load_a(a[0], lane, quarter_m, patch_row);
                load_a(a[1], lane, quarter_m + 16, patch_row);
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int n = 0; n < 4; ++n) multiply(sum[v][m][n], a[m], b[n]);
            }
        }
    }
    copy_wait<0>();
    if (tap_row >= s.tap_rows) return;
#pragma unroll
    for (int v = 0; v < 3; ++v)
#pragma unroll
        for (int m = 0; m < 2; ++m)
            if (v < s.tap_columns)
                write_sums(p, s, tap_row, v, s.first_m + quarter_m + 16 * m, s.first_n + quarter_n, sum[v][m]);
}
