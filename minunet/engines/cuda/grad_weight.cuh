// What the two kernels of the gradient of the weights share: which block sums what, and how its pixels are loaded.
//
// Before it is included stand: PATCH_SIDE and PIXEL_SIDE, how many channels of the patch and of the pixels a block has,
// and ROWS of a tile of pixels (programs.py).
#pragma once
#include "element.cuh"

constexpr int COLUMNS = 16, PIXELS = ROWS * COLUMNS, PATCH_COLUMNS = COLUMNS + 2, PATCH = (ROWS + 2) * PATCH_COLUMNS;
constexpr int PATCH_PARTS = PATCH_SIDE / ELEMENTS, PIXEL_PARTS = PIXEL_SIDE / ELEMENTS;  // of 16 bytes, a pixel

// The arguments. patch: pixels of patch_pitch elements, of which the first patch_channels are read: x, or (transposed)
// dy. pixels: the other one of the two; of images x height x width pixels. partials [split][tap][...]: element (patch
// channel m, pixel channel n) of a tap is at m * patch_stride + n * pixel_stride.
struct Product {
    const element* patch;
    int patch_pitch, patch_channels;
    const element* pixels;
    int pixel_pitch, pixel_channels, images, height, width, transposed, kernel, splits, patch_stride, pixel_stride;
    float* partials;
};

// What a block works on: its channels (patch from first_m on, pixels from first_n on), its share of the tiles of
// pixels, and its taps, tap_rows x tap_columns of them: tap (i, j) pairs a pixel with the one of the patch that lies
// (first + i, first + j) away, and is the kernel's (start_row + spacing i, start_column + spacing j). A transposed
// convolution: a block has one parity class of dy, every step-th pixel, and the taps that meet it (conv.cu).
struct Share {
    int first_m, first_n, split, first_tile, last_tile, tiles_across;
    int step, parity, first, spacing, tap_rows, tap_columns, start_row, start_column;
};

// Where a tile begins: its row in the stack of images, and its column.
struct Place {
    int row, column;

    __device__ __forceinline__ Place(const Share& s, int tile)
        : row(tile / s.tiles_across * ROWS), column(tile % s.tiles_across * COLUMNS) {}
    __device__ __forceinline__ void next(const Product& p) {
        column += COLUMNS;
        if (column >= p.width) column = 0, row += ROWS;
    }
};

__device__ __forceinline__ Share share_of(const Product& p) {
    const int patch_blocks = (p.patch_channels + PATCH_SIDE - 1) / PATCH_SIDE;
    const int pixel_blocks = (p.pixel_channels + PIXEL_SIDE - 1) / PIXEL_SIDE;
    Share s;
    int rest = blockIdx.x;
    s.first_m = rest % patch_blocks * PATCH_SIDE;
    rest /= patch_blocks;
    s.first_n = rest % pixel_blocks * PIXEL_SIDE;
    rest /= pixel_blocks;
    s.split = rest % p.splits;
    s.parity = rest / p.splits;
    s.tiles_across = (p.width + COLUMNS - 1) / COLUMNS;
    const long long tiles = static_cast<long long>((p.images * (p.height + 1) + ROWS - 1) / ROWS) * s.tiles_across;
    s.first_tile = static_cast<int>(tiles * s.split / p.splits);
    s.last_tile = static_cast<int>(tiles * (s.split + 1) / p.splits);
    s.step = s.spacing = p.transposed ? 2 : 1;
    s.first = p.kernel == 3 && !p.transposed ? -1 : 0;
    s.start_row = p.transposed ? s.parity / 2 : 0;
    s.start_column = p.transposed ? s.parity % 2 : 0;
    s.tap_rows = !p.transposed ? p.kernel : s.start_row ? 1 : p.kernel - 1;
    s.tap_columns = !p.transposed ? p.kernel : s.start_column ? 1 : p.kernel - 1;
    return s;
}

// Images are stacked as in conv.cuh, with a row of zeros between two. Of row `stacked` of the stack: its number among
// the rows of all images; -1: it is a row of zeros.
__device__ __forceinline__ int row_number(const Product& p, int stacked) {
    const int image = stacked / (p.height + 1), i = stacked % (p.height + 1);
    return stacked >= 0 && i < p.height && image < p.images ? stacked - image : -1;
}

// One of the two factors of a tile, from row first_row of the stack and column first_column on. The pixel (row r,
// column j) of the images lies r * row_pixels + first_place + j * step pixels from the beginning.
struct Factor {
    const element* image;
    int pitch, channels, first_channel, first_row, first_column, width, row_pixels, first_place, step;
};

// Begins to copy ROW_COUNT rows of COLUMN_COUNT columns, 16 bytes at a time. Worker number `worker` brings part worker
// % PARTS of a whole column of pixels, or of several: down a column only the row changes, and a copy takes four
// instructions. to(pixel, part): where the 16 bytes go in shared memory, PIXEL_BYTES from pixel to pixel. rows: as
// row_number says.
template <int PARTS, int ROW_COUNT, int COLUMN_COUNT, int PIXEL_BYTES, class To>
__device__ __forceinline__ void load_factor(const Product& p, const Factor& f, const int* rows, int worker, int workers,
                                            To to) {
    const int part = worker % PARTS, channel = f.first_channel + part * ELEMENTS;
    const int pitch = f.pitch * static_cast<int>(sizeof(element));
    const bool exists = channel < f.channels;
    if (f.channels % ELEMENTS == 0 && f.pitch % ELEMENTS == 0 && reinterpret_cast<size_t>(f.image) % 16 == 0) {
        for (int column = worker / PARTS; column < COLUMN_COUNT; column += workers / PARTS) {
            const int j = f.first_column + column;
            const bool inside = exists && j >= 0 && j < f.width;
            const element* from = address_of(f.image, f.first_place + (inside ? j * f.step : 0), pitch);
            if (exists) from += channel;
            unsigned char* const first_to = address_of(to(0, part), column, PIXEL_BYTES);
            constexpr int AT_ONCE = ROW_COUNT / 2;
#pragma unroll
            for (int first = 0; first < ROW_COUNT; first += AT_ONCE) {
                int row[AT_ONCE];  // read together: the copies need not wait for each other
#pragma unroll
                for (int r = 0; r < AT_ONCE; ++r) row[r] = rows[first + r];
#pragma unroll
                for (int r = 0; r < AT_ONCE; ++r)
                    copy_async(first_to + (first + r) * COLUMN_COUNT * PIXEL_BYTES,
                               address_of(from, max(row[r], 0), f.row_pixels * pitch), inside && row[r] >= 0);
            }
        }
        return;
    }
    const int count = exists ? min(f.channels - channel, ELEMENTS) : 0;
#pragma unroll 1
    for (int pixel = worker / PARTS; pixel < ROW_COUNT * COLUMN_COUNT; pixel += workers / PARTS) {
        const int row = row_number(p, f.first_row + pixel / COLUMN_COUNT), j = f.first_column + pixel % COLUMN_COUNT;
        const bool inside = row >= 0 && j >= 0 && j < f.width;
        const int place = inside ? row * f.row_pixels + f.first_place + j * f.step : 0;
        copy_one_by_one(to(pixel, part), address_of(f.image, place, pitch) + (exists ? channel : 0),
                        inside ? count : 0);
    }
}

// Begins to copy a tile: the patch, with its border, and the pixels. rows [ROWS + 2]: the numbers of the patch's rows.
template <int PATCH_BYTES, int PIXEL_BYTES, class PatchPart, class PixelPart>
__device__ __forceinline__ void load_tile(const Product& p, const Share& s, Place tile, const int* rows, int worker,
                                          int workers, PatchPart patch_part, PixelPart pixel_part) {
    const Factor patch = {p.patch,
                          p.patch_pitch,
                          p.patch_channels,
                          s.first_m,
                          tile.row - 1,
                          tile.column - 1,
                          p.width,
                          s.step * s.step * p.width,
                          s.start_row * s.step * p.width + s.start_column,
                          s.step};
    const Factor pixels = {p.pixels,    p.pixel_pitch, p.pixel_channels, s.first_n, tile.row,
                           tile.column, p.width,       p.width,          0,         1};
    load_factor<PATCH_PARTS, ROWS + 2, PATCH_COLUMNS, PATCH_BYTES>(p, patch, rows, worker, workers, patch_part);
    load_factor<PIXEL_PARTS, ROWS, COLUMNS, PIXEL_BYTES>(p, pixels, rows + 1, worker, workers, pixel_part);
}

// Where the sums of a tap go: that of patch channel m and pixel channel n to [m * patch_stride + n * pixel_stride].
__device__ __forceinline__ float* sums_of(const Product& p, const Share& s, int tap_row, int tap_column) {
    const int tap = (s.start_row + s.spacing * tap_row) * p.kernel + s.start_column + s.spacing * tap_column;
    return p.partials +
           (static_cast<size_t>(s.split) * p.kernel * p.kernel + tap) * p.patch_channels * p.pixel_channels;
}

__device__ __forceinline__ void write_sum(const Product& p, float* to, int m, int n, float sum) {
    if (m < p.patch_channels && n < p.pixel_channels)
        to[static_cast<size_t>(m) * p.patch_stride + static_cast<size_t>(n) * p.pixel_stride] = sum;
}
