// Second stages: partial sums become sums, in a fixed order and in float64, so that the same input gives the same bits.
//
// Specification: sum_partials, out = partials.sum(axis=0); column_sums, the first stage of x.sum(axis=(0, 1, 2)), dbias
// of a transposed convolution; finish_statistics, mean and biased variance of all values from those of shares of them.
//
// Cost: each number is read once. The largest: 264 partials of 64 x 64 x 9 weights, two for each of 132
// multiprocessors: 39 MB, 13 microseconds at 3 TB/s.
#include "reduce.cuh"

// out[i] = sum over p of partials[p][i], for i < size.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_partials(const float* __restrict__ partials, int count, int size, float* __restrict__ out) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= size) return;
    double sum = 0;
    for (int p = 0; p < count; ++p) sum += partials[static_cast<size_t>(p) * size + i];
    out[i] = static_cast<float>(sum);
}

// The same for few columns and many partials: 32 columns a block, and 32 threads a column, each with every 32nd
// partial.
extern "C" __global__ void __launch_bounds__(1024)
    sum_many_partials(const float* __restrict__ partials, int count, int size, float* __restrict__ out) {
    __shared__ double sums[32][32];
    const int column = threadIdx.x % 32, slice = threadIdx.x / 32, i = blockIdx.x * 32 + column;
    double sum = 0;
    if (i < size)
        for (int p = slice; p < count; p += 32) sum += partials[static_cast<size_t>(p) * size + i];
    sums[slice][column] = sum;
    __syncthreads();
    if (slice > 0 || i >= size) return;
    for (int s = 1; s < 32; ++s) sum += sums[s][column];
    out[i] = static_cast<float>(sum);
}

// partials [block row][channels]: each block's share of the sum over pixels.
template <int V>
__device__ __forceinline__ void sum_columns(const element* x, int pitch, int pixels, int channels, float* partials,
                                            float* scratch) {
    const Worker w = worker((channels + V - 1) / V);
    float sum[V] = {};
    if (w.active)
        for (int pixel = w.first; pixel < pixels; pixel += w.step) {
            const Values<V> values =
                *reinterpret_cast<const Values<V>*>(x + static_cast<size_t>(pixel) * pitch + w.part * V);
            for (int i = 0; i < V; ++i) sum[i] += to_float(values.e[i]);
        }
    sum_over_groups(sum, w, scratch);
    if (w.active && w.group == 0)
        for (int i = 0; i < V; ++i) partials[static_cast<size_t>(w.row) * channels + w.part * V + i] = sum[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums(const element* __restrict__ x, int pitch, int pixels, int channels, int wide,
                float* __restrict__ partials) {
    __shared__ float scratch[THREADS];
    if (wide) sum_columns<ELEMENTS>(x, pitch, pixels, channels, partials, scratch);
    else sum_columns<1>(x, pitch, pixels, channels, partials, scratch);
}

// partials [share][count, mean, squares around the mean][channels], a share being a tile of a convolution (conv.cuh).
// The mean of all comes first, in each thread; then all squares = the shares' own + count * (mean of the share - mean
// of all)^2. Source: Chan, Golub & LeVeque 1983, equation 2.1. 32 channels a block, 32 threads a channel.
extern "C" __global__ void __launch_bounds__(1024)
    finish_statistics(const float* __restrict__ partials, int shares, int channels, float* __restrict__ mean,
                      float* __restrict__ var) {
    __shared__ double sums[32][33], counts[32][33];
    const int column = threadIdx.x % 32, slice = threadIdx.x / 32, channel = blockIdx.x * 32 + column;
    const bool active = channel < channels;
    double count = 0, sum = 0;
    if (active)
        for (int s = slice; s < shares; s += 32) {
            const float* share = partials + static_cast<size_t>(s) * 3 * channels + channel;
            count += share[0];
            sum += static_cast<double>(share[0]) * share[channels];
        }
    sums[slice][column] = sum;
    counts[slice][column] = count;
    __syncthreads();
    count = sum = 0;
    for (int s = 0; s < 32; ++s) count += counts[s][column], sum += sums[s][column];
    const double centre = sum / count;
    __syncthreads();

    double squares = 0;
    if (active)
        for (int s = slice; s < shares; s += 32) {
            const float* share = partials + static_cast<size_t>(s) * 3 * channels + channel;
            const double distance = share[channels] - centre;
            squares += share[2 * channels] + share[0] * distance * distance;
        }
    sums[slice][column] = squares;
    __syncthreads();
    if (slice > 0 || !active) return;
    for (int s = 1; s < 32; ++s) squares += sums[s][column];
    mean[channel] = static_cast<float>(centre);
    var[channel] = static_cast<float>(squares / count);
}
