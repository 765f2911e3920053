// Augmentation: a batch of images and masks, each moved by its own affine map, and noise for the images.
//
// Specification: minunet.data.augment.PixelPasses, warp and add_noise. Places are computed in float64 and rounded to
// 1e-9 of a pixel as there, so masks and images are equal bit for bit. The noise is, too, but for the last bits of log,
// cos and sin.
//
// Idea: for the map a thread has an output pixel; it finds the place once, for all channels of image and mask. For the
// noise it has 8 values, which are what a block of random bits gives (rng.standard_normal, philox.cuh).
//
// Cost: memory: image and mask read and written once (four neighbours come from the caches), and for the noise images
// read and written once, and about 700 instructions for 8 values. Both are far below a step's.

#include "philox.cuh"

// Outside of the image it goes on as in a mirror: ... 1 0 | 0 1 2 ... The pattern repeats after twice the size.
__device__ __forceinline__ int reflect(double place, int size) {
    long long p = static_cast<long long>(place) % (2 * size);
    if (p < 0) p += 2 * size;
    return static_cast<int>(p < size ? p : 2 * size - 1 - p);
}

// images (n, height, width, channels), masks (n, height, width, mask_channels), matrices (n, 2, 2): from output to
// input places.
extern "C" __global__ void __launch_bounds__(256)
    affine(const float* __restrict__ images, const float* __restrict__ masks, const double* __restrict__ matrices,
           float* __restrict__ moved_images, float* __restrict__ moved_masks, int count, int height, int width,
           int channels, int mask_channels) {
    const long long pixel = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
    if (pixel >= static_cast<long long>(count) * height * width) return;
    const int j = static_cast<int>(pixel % width), i = static_cast<int>(pixel / width % height),
              n = static_cast<int>(pixel / width / height);
    const double middle_row = (height - 1) / 2.0, middle_column = (width - 1) / 2.0, y = i - middle_row,
                 x = j - middle_column;
    const double* m = matrices + 4 * n;
    const double row = rint((m[0] * y + m[1] * x) * 1e9) / 1e9 + middle_row;
    const double column = rint((m[2] * y + m[3] * x) * 1e9) / 1e9 + middle_column;

    const double top = floor(row), left = floor(column);
    const float below = static_cast<float>(row - top), right = static_cast<float>(column - left);
    const long long above_row = static_cast<long long>(n) * height + reflect(top, height),
                    below_row = static_cast<long long>(n) * height + reflect(top + 1, height);
    const int left_column = reflect(left, width), right_column = reflect(left + 1, width);
    for (int c = 0; c < channels; ++c) {
        const float upper = (1 - right) * images[(above_row * width + left_column) * channels + c] +
                            right * images[(above_row * width + right_column) * channels + c];
        const float lower = (1 - right) * images[(below_row * width + left_column) * channels + c] +
                            right * images[(below_row * width + right_column) * channels + c];
        moved_images[pixel * channels + c] = (1 - below) * upper + below * lower;
    }
    const long long nearest = (static_cast<long long>(n) * height + reflect(floor(row + 0.5), height)) * width +
                              reflect(floor(column + 0.5), width);
    for (int c = 0; c < mask_channels; ++c) moved_masks[pixel * mask_channels + c] = masks[nearest * mask_channels + c];
}

// noisy = images + strength * noise, each (n, values); strength (n). `noisy` may be `images`.
extern "C" __global__ void __launch_bounds__(256)
    add_noise(const float* images, const float* __restrict__ strength, float* noisy, int values, int count,
              unsigned long long seed, unsigned long long epoch, unsigned long long step, unsigned long long stream,
              unsigned long long first_image) {
    const int blocks = (values + 7) / 8;  // of random bits, an image
    const long long index = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= static_cast<long long>(blocks) * count) return;
    const int n = static_cast<int>(index / blocks), block = static_cast<int>(index % blocks);
    unsigned long long x[4];
    philox(block, {seed, epoch, step, stream, first_image + n}, x);
    const float size = strength[n];
    for (int word = 0; word < 4; ++word) {
        // Both halves of a number of Box & Muller: u in (0, 1], and an angle in units of pi.
        const float u = (static_cast<float>(static_cast<unsigned int>(x[word])) + 0.5f) * 0x1p-32f;
        const float angle = static_cast<float>(static_cast<int>(x[word] >> 32)) * 0x1p-31f;
        const float radius = sqrtf(-2 * logf(u));
        float sine, cosine;
        sincospif(angle, &sine, &cosine);
        for (int half = 0; half < 2; ++half) {
            const int value = 8 * block + 2 * word + half;
            if (value < values) {
                const long long place = static_cast<long long>(n) * values + value;
                noisy[place] = images[place] + size * (radius * (half ? sine : cosine));
            }
        }
    }
}
