// The last convolution, to one or a few channels of logits, forward and backward.
//
// Specification: minunet.ops conv2d (stride 1, "same", with bias) for kernel 1 or 3 and few output channels K.
//
// Idea. With K = 1 there is nothing for tensor cores to do: a pixel has 9 C products. Forward: 8 lanes share a pixel,
// each takes every eighth part of its channels, and a shuffle adds the eight. Backward: dx of a pixel is the weights
// times the nine dlogits around it; dweight the other way round: each thread keeps one part of the channels and sums
// its products with the nine dlogits over its pixels.
//
// Cost: memory, that is x read once (its neighbours come from the caches) and dx written once: at level 1 of the
// reference network, batch 16, 64 channels in TF32, 205 MB each: 0.07 ms each at 3 TB/s. The 9 C K products a pixel
// take about as long.
#include "reduce.cuh"

constexpr int LANES = 8;  // of a pixel, forward

template <int V>
__device__ __forceinline__ void forward(const element* x, int x_pitch, const float* weight, const float* bias,
                                        float* logits, int images, int height, int width, int channels, int outputs,
                                        int kernel) {
    const int lane = threadIdx.x % LANES, radius = kernel / 2;
    const int pixel = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const bool inside = pixel < images * height * width;  // who is not still takes part in the shuffles
    const int j = pixel % width, i = pixel / width % height, image = pixel / width / height;
    for (int k = 0; k < outputs; ++k) {
        float sum = 0;
        for (int tap = 0; inside && tap < kernel * kernel; ++tap) {
            const int row = i + tap / kernel - radius, column = j + tap % kernel - radius;
            if (row < 0 || row >= height || column < 0 || column >= width) continue;
            const element* from = x + (static_cast<size_t>(image) * height * width + row * width + column) * x_pitch;
            for (int c = lane * V; c < channels; c += LANES * V) {
                const Values<V> values = *reinterpret_cast<const Values<V>*>(from + c);
                for (int e = 0; e < V; ++e)
                    sum += to_float(values.e[e]) * weight[(tap * channels + c + e) * outputs + k];
            }
        }
        for (int bits = 1; bits < LANES; bits *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
        if (inside && lane == 0) logits[static_cast<size_t>(pixel) * outputs + k] = sum + bias[k];
    }
}

// x (images, height, width, channels), pixels of x_pitch; weight (kernel, kernel, channels, outputs); logits (images,
// height, width, outputs).
extern "C" __global__ void __launch_bounds__(THREADS)
    head(const element* __restrict__ x, int x_pitch, const float* __restrict__ weight, const float* __restrict__ bias,
         float* __restrict__ logits, int images, int height, int width, int channels, int outputs, int kernel,
         int wide) {
    if (wide) forward<ELEMENTS>(x, x_pitch, weight, bias, logits, images, height, width, channels, outputs, kernel);
    else forward<1>(x, x_pitch, weight, bias, logits, images, height, width, channels, outputs, kernel);
}

// dlogits at (i, j) minus the tap's offset, output k: what this tap has carried x's pixel (i, j) to. 0 outside of the
// image.
__device__ __forceinline__ float reached(const float* dlogits, int image, int i, int j, int tap, int kernel, int height,
                                         int width, int outputs, int k) {
    const int row = i - (tap / kernel - kernel / 2), column = j - (tap % kernel - kernel / 2);
    if (row < 0 || row >= height || column < 0 || column >= width) return 0;
    return dlogits[((static_cast<size_t>(image) * height + row) * width + column) * outputs + k];
}

template <int V>
__device__ __forceinline__ void input_gradient(const float* dlogits, const float* weight, element* dx, int dx_pitch,
                                               int images, int height, int width, int channels, int outputs,
                                               int kernel) {
    const Worker w = worker((channels + V - 1) / V);
    if (!w.active) return;
    for (int pixel = w.first; pixel < images * height * width; pixel += w.step) {
        const int j = pixel % width, i = pixel / width % height, image = pixel / width / height;
        float sum[V] = {};
        for (int tap = 0; tap < kernel * kernel; ++tap)
            for (int k = 0; k < outputs; ++k) {
                const float d = reached(dlogits, image, i, j, tap, kernel, height, width, outputs, k);
                for (int e = 0; e < V; ++e) sum[e] += d * weight[(tap * channels + w.part * V + e) * outputs + k];
            }
        Values<V> result;
        for (int e = 0; e < V; ++e) result.e[e] = to_element(sum[e]);
        *reinterpret_cast<Values<V>*>(dx + static_cast<size_t>(pixel) * dx_pitch + w.part * V) = result;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    head_grad_input(const float* __restrict__ dlogits, const float* __restrict__ weight, element* __restrict__ dx,
                    int dx_pitch, int images, int height, int width, int channels, int outputs, int kernel, int wide) {
    if (wide) input_gradient<ELEMENTS>(dlogits, weight, dx, dx_pitch, images, height, width, channels, outputs, kernel);
    else input_gradient<1>(dlogits, weight, dx, dx_pitch, images, height, width, channels, outputs, kernel);
}

template <int V>
__device__ __forceinline__ void weight_gradient(const float* dlogits, const element* x, int x_pitch, int images,
                                                int height, int width, int channels, int outputs, int kernel,
                                                float* partials, float* scratch) {
    const Worker w = worker((channels + V - 1) / V);
    float* to = partials + static_cast<size_t>(w.row) * (kernel * kernel * channels + 1) * outputs;
    for (int k = 0; k < outputs; ++k) {
        float sum[9 * V + 1] = {};  // of each tap and channel, and last of dlogits alone: dbias
        for (int pixel = w.first; w.active && pixel < images * height * width; pixel += w.step) {
            const int j = pixel % width, i = pixel / width % height, image = pixel / width / height;
            const Values<V> values =
                *reinterpret_cast<const Values<V>*>(x + static_cast<size_t>(pixel) * x_pitch + w.part * V);
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                if (tap >= kernel * kernel) break;
                const float d = reached(dlogits, image, i, j, tap, kernel, height, width, outputs, k);
                for (int e = 0; e < V; ++e) sum[tap * V + e] += d * to_float(values.e[e]);
            }
            sum[9 * V] += dlogits[static_cast<size_t>(pixel) * outputs + k];
        }
        sum_over_groups(sum, w, scratch);
        if (!w.active || w.group != 0) continue;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
            if (tap >= kernel * kernel) break;
            for (int e = 0; e < V; ++e) to[(tap * channels + w.part * V + e) * outputs + k] = sum[tap * V + e];
        }
        if (w.part == 0) to[kernel * kernel * channels * outputs + k] = sum[9 * V];
    }
}

// partials [block row][dweight, then dbias]: each block's share of the sums over pixels.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    head_grad_weight(const float* __restrict__ dlogits, const element* __restrict__ x, int x_pitch, int images,
                     int height, int width, int channels, int outputs, int kernel, int wide,
                     float* __restrict__ partials) {
    __shared__ float scratch[THREADS];
    if (wide)
        weight_gradient<ELEMENTS>(dlogits, x, x_pitch, images, height, width, channels, outputs, kernel, partials,
                                  scratch);
    else weight_gradient<1>(dlogits, x, x_pitch, images, height, width, channels, outputs, kernel, partials, scratch);
}
