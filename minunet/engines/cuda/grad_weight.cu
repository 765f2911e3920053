// The gradient of a convolution with respect to its weights, on tensor cores.
// Not yet run on a GPU: emulated (tests/cuda), and compiled.
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
#include "element.cuh"

constexpr int MOST_THREADS = 384;
constexpr int STAGES = 2, SIDE = 64;
constexpr int ROWS = 8, COLUMNS = 16, PIXELS = ROWS * COLUMNS, PATCH_COLUMNS = COLUMNS + 2,
              PATCH = (ROWS + 2) * PATCH_COLUMNS;
constexpr int PITCH =
    SIDE * sizeof(element) + (sizeof(element) == 4 ? 32 : 16);  // bytes from pixel to pixel, see above
constexpr int PARTS = SIDE / ELEMENTS;                          // 16-byte parts of a pixel
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

// patch, pixels: the two factors, with pixels of so many elements (pitch), of which so many are used (channels).
// height, width: of the smaller image, where the two differ. transposed: 0, or 1 for the parity classes, all four in
// one launch. splits: over how many blocks the pixels are divided. partials [split][kernel * kernel][channel of
// one][channel of the other], the strides saying which.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    grad_weight(const element* __restrict__ patch, int patch_pitch, int patch_channels,
                const element* __restrict__ pixels, int pixel_pitch, int pixel_channels, int images, int height,
                int width, int transposed, int kernel, int splits, int patch_stride, int pixel_stride,
                float* __restrict__ partials) {
    DYNAMIC_SHARED(shared);
    __shared__ int
        place[2][PATCH + PIXELS];  // where each pixel of the patch and of the tile is, or -1: zero. For two tiles

    const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32;
    const int tap_row = warp / 4, quarter_m = warp / 2 % 2 * 32, quarter_n = warp % 2 * 32;

    const int patch_blocks = (patch_channels + SIDE - 1) / SIDE, pixel_blocks = (pixel_channels + SIDE - 1) / SIDE;
    int block = blockIdx.x;
    const int first_m = block % patch_blocks * SIDE;
    block /= patch_blocks;
    const int first_n = block % pixel_blocks * SIDE;
    block /= pixel_blocks;
    const int split = block % splits, parity = block / splits;
    const int step = transposed ? 2 : 1;
    // The taps at hand: offset first + index along each axis, of which there are so many, and the kernel's row start +
    // spacing * index.
    const int first = transposed ? 0 : -1, spacing = step;
    const int tap_rows = !transposed  ? 3
                         : parity / 2 ? 1
                                      : kernel - 1,
              tap_columns = !transposed  ? 3
                            : parity % 2 ? 1
                                         : kernel - 1;
    const int start_row = transposed ? parity / 2 : 0, start_column = transposed ? parity % 2 : 0;

    const int tiles_across = (width + COLUMNS - 1) / COLUMNS,
              tiles = (images * (height + 1) + ROWS - 1) / ROWS * tiles_across;
    const int first_tile = static_cast<long long>(tiles) * split / splits,
              last_tile = static_cast<long long>(tiles) * (split + 1) / splits;
    const bool patch_aligned = patch_pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(patch) % 16 == 0;
    const bool pixels_aligned = pixel_pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(pixels) % 16 == 0;

    auto locate = [&](int tile) {
        if (tile >= last_tile) return;
        const int first_row = tile / tiles_across * ROWS, first_column = tile % tiles_across * COLUMNS;
        for (int p = thread; p < PATCH + PIXELS; p += threads) {
            const bool in_patch = p < PATCH;
            int row = in_patch ? first_row + p / PATCH_COLUMNS - 1 : first_row + (p - PATCH) / COLUMNS;
            int j = in_patch ? first_column + p % PATCH_COLUMNS - 1 : first_column + (p - PATCH) % COLUMNS;
            int image = row / (height + 1), i = row % (height + 1);  // images are stacked as in conv.cu
            bool inside = row >= 0 && image < images && i < height && j >= 0 && j < width;
            int index = in_patch
                            ? ((image * height + i) * step * width + j) * step + start_row * step * width + start_column
                            : (image * height + i) * width + j;
            place[tile % 2][p] = inside ? index : -1;
        }
    };
    auto load = [&](int tile) {
        if (tile >= last_tile) return;
        unsigned char* to = shared + tile % STAGES * STAGE_BYTES;
        for (int part = thread; part < (PATCH + PIXELS) * PARTS; part += threads) {
            const int p = part / PARTS, pixel = place[tile % 2][p];
            const bool in_patch = p < PATCH;
            const int channel = part % PARTS * ELEMENTS + (in_patch ? first_m : first_n);
            const int count =
                pixel < 0 ? 0 : max(0, min((in_patch ? patch_channels : pixel_channels) - channel, ELEMENTS));
            const element* from = in_patch ? patch : pixels;
            if (count) from += static_cast<size_t>(pixel) * (in_patch ? patch_pitch : pixel_pitch) + channel;
            fetch(to + p * PITCH + part % PARTS * 16, from, count, in_patch ? patch_aligned : pixels_aligned);
        }
    };

    float sum[3][2][4][4] = {};  // [tap of the row][16 patch channels][8 pixel channels]
    locate(first_tile);
    __syncthreads();
    load(first_tile);
    copy_commit();
    locate(first_tile + 1);
    for (int tile = first_tile; tile < last_tile; ++tile) {
        copy_wait<0>();
        __syncthreads();  // the tile is there for all; all are done with the one before, whose buffer is filled now
        load(tile + 1);
        copy_commit();
        locate(tile + 2);
        if (tap_row >= tap_rows) continue;
        const unsigned char* patch_tile = shared + tile % STAGES * STAGE_BYTES;
        const unsigned char* pixel_tile = patch_tile + PATCH * PITCH;
        for (int k = 0; k < PIXELS; k += K_STEP) {
            unsigned int a[2][4], b[4][2];
            auto pixel_row = [&](int pixel) { return pixel_tile + (k + pixel) * PITCH; };
            load_b(reinterpret_cast<unsigned int (&)[2][2]>(b[0]), lane, quarter_n, pixel_row);
            load_b(reinterpret_cast<unsigned int (&)[2][2]>(b[2]), lane, quarter_n + 16, pixel_row);
            const int corner = (k / COLUMNS + 1 + first + tap_row) * PATCH_COLUMNS + k % COLUMNS + 1 + first;
#pragma unroll
            for (int v = 0; v < 3; ++v) {
                if (v >= tap_columns) continue;
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

    if (tap_row >= tap_rows) return;
    const size_t size = static_cast<size_t>(patch_channels) * pixel_channels;
#pragma unroll
    for (int v = 0; v < 3; ++v) {
        if (v >= tap_columns) continue;
        const int tap = (start_row + spacing * tap_row) * kernel + start_column + spacing * v;
        float* to = partials + (static_cast<size_t>(split) * kernel * kernel + tap) * size;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = first_m + quarter_m + 16 * m + lane / 4 + i / 2 * 8;
                    const int column = first_n + quarter_n + 8 * n + lane % 4 * 2 + i % 2;
                    if (row < patch_channels && column < pixel_channels)
                        to[static_cast<size_t>(row) * patch_stride + static_cast<size_t>(column) * pixel_stride] =
                            sum[v][m][n][i];
                }
    }
}
