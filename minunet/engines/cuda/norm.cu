// Batch norm and ReLU in one pass, with max pooling and dropout where these follow, and all of it backward in two.
//
// Specification: minunet.ops batch_norm2d (training), relu, max_pool2d (size 2), dropout; forward and backward.
//
// Idea. All of these are limited by memory: what counts is how often a tensor is read and written. So only the
// convolution's output y is kept; x_hat, the ReLU's sign and the pool's winner are found again from y, by the very same
// instructions (normalise) both times: else rounding could make another pixel the winner. Backward needs two sums over
// all pixels before it can write: a pass that reduces, and a pass that applies.
//
// Cost against the roofline, in accesses of the full tensor: norm_relu 2, norm_relu_pool 2.25, backward 5 (reads 2 + 2,
// writes 1; with the pool 5.5). Level 1 of the reference network, batch 16, TF32: 205 MB each, so 0.14 ms forward, 0.34
// ms backward at 3 TB/s.
#include "reduce.cuh"

// Batch norm's numbers for V channels: gamma (y - mean) / sqrt(var + eps) + beta, in one subtraction and one
// multiplication with addition.
template <int V>
struct Norm {
    float mean[V], slope[V], beta[V];  // slope: gamma / sqrt(var + eps)

    __device__ __forceinline__ Norm(const float* mean_, const float* var_, const float* gamma_, const float* beta_,
                                    float eps, int first) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            mean[i] = mean_[first + i];
            slope[i] = gamma_[first + i] * inverse_std(var_[first + i], eps);
            beta[i] = beta_[first + i];
        }
    }
    __device__ __forceinline__ static float inverse_std(float var, float eps) { return rsqrtf(var + eps); }
    __device__ __forceinline__ float normalise(float y, int i) const { return fmaf(slope[i], y - mean[i], beta[i]); }
};

template <int V>
__device__ __forceinline__ void read(const element* from, float (&x)[V]) {
    to_floats(*reinterpret_cast<const Values<V>*>(from), x);
}

template <int V>
__device__ __forceinline__ void write(element* to, const float (&x)[V]) {
    *reinterpret_cast<Values<V>*>(to) = to_factors(x);
}

__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0 : x; }  // a NaN passes

// Of the 2 x 2 window: does `candidate`, later in the order of rows then columns, win over `best`? Of equals the first
// wins, and a NaN always.
__device__ __forceinline__ bool wins(float candidate, float best) { return candidate > best || candidate != candidate; }

template <int V>
__device__ __forceinline__ void apply(const element* y, int y_pitch, element* out, int out_pitch, int pixels,
                                      int channels, const float* mean, const float* var, const float* gamma,
                                      const float* beta, float eps) {
    const Worker w = worker((channels + V - 1) / V);
    if (!w.active) return;
    const int first = w.part * V;
    const Norm<V> norm(mean, var, gamma, beta, eps, first);
    const element* from = y + static_cast<size_t>(w.first) * y_pitch + first;
    element* to = out + static_cast<size_t>(w.first) * out_pitch + first;
    for (int pixel = w.first; pixel < pixels; pixel += w.step) {
        float x[V];
        read(from, x);
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = relu(norm.normalise(x[i], i));
        write(to, x);
        from += static_cast<size_t>(w.step) * y_pitch;
        to += static_cast<size_t>(w.step) * out_pitch;
    }
}

// out = relu(batch_norm(y)). wide: whether 16 bytes at a time can be read and written. (The 4 asks the compiler for so
// few registers that 4 blocks fit into a multiprocessor.)
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    norm_relu(const element* __restrict__ y, int y_pitch, element* __restrict__ out, int out_pitch, int pixels,
              int channels, const float* __restrict__ mean, const float* __restrict__ var,
              const float* __restrict__ gamma, const float* __restrict__ beta, float eps, int wide) {
    if (wide) apply<ELEMENTS>(y, y_pitch, out, out_pitch, pixels, channels, mean, var, gamma, beta, eps);
    else apply<1>(y, y_pitch, out, out_pitch, pixels, channels, mean, var, gamma, beta, eps);
}

// The four pixels of pooled pixel number `window`, in the full image of twice the width, and the image they are in.
struct Window {
    int image, row, column;  // of the pooled pixel
    size_t pixel[4];
};

__device__ __forceinline__ Window window_of(int window, int height, int width) {  // height, width: pooled
    Window w;
    w.column = window % width;
    w.row = window / width % height;
    w.image = window / width / height;
    for (int i = 0; i < 4; ++i)
        w.pixel[i] = (static_cast<size_t>(w.image) * 2 * height + 2 * w.row + i / 2) * 2 * width + 2 * w.column + i % 2;
    return w;
}

template <int V>
__device__ __forceinline__ void apply_and_pool(const element* y, int y_pitch, element* skip, int skip_pitch,
                                               element* pooled, int pooled_pitch, int images, int height, int width,
                                               int channels, const float* mean, const float* var, const float* gamma,
                                               const float* beta, float eps, const unsigned short* skip_bits,
                                               int skip_words, int skip_total, int skip_first,
                                               const unsigned short* pooled_bits, int pooled_words, float scale) {
    const Worker w = worker((channels + V - 1) / V);
    if (!w.active) return;
    const int first = w.part * V;
    const Norm<V> norm(mean, var, gamma, beta, eps, first);
    for (int window = w.first; window < images * height * width; window += w.step) {
        const Window at = window_of(window, height, width);
        float best[V];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            float x[V];
            read(y + at.pixel[q] * y_pitch + first, x);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                x[i] = relu(norm.normalise(x[i], i));
                if (q == 0 || wins(x[i], best[i])) best[i] = x[i];
            }
            const int place = (2 * at.row + q / 2) * 2 * width + 2 * at.column + q % 2;
            if (skip_bits)
                drop_out(x, kept<V>(skip_bits, skip_words, at.image, place * skip_total + skip_first + first), scale);
            write(skip + at.pixel[q] * skip_pitch + first, x);
        }
        if (pooled_bits) {
            const int place = at.row * width + at.column;
            drop_out(best, kept<V>(pooled_bits, pooled_words, at.image, place * channels + first), scale);
        }
        write(pooled + static_cast<size_t>(window) * pooled_pitch + first, best);
    }
}

// a = relu(batch_norm(y)); skip = dropout(a), pooled = dropout(max_pool(a)), each where its bits are given. height,
// width: pooled.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    norm_relu_pool(const element* __restrict__ y, int y_pitch, element* __restrict__ skip, int skip_pitch,
                   element* __restrict__ pooled, int pooled_pitch, int images, int height, int width, int channels,
                   const float* __restrict__ mean, const float* __restrict__ var, const float* __restrict__ gamma,
                   const float* __restrict__ beta, float eps, const unsigned short* __restrict__ skip_bits,
                   int skip_words, int skip_total, int skip_first, const unsigned short* __restrict__ pooled_bits,
                   int pooled_words, float scale, int wide) {
    if (wide)
        apply_and_pool<ELEMENTS>(y, y_pitch, skip, skip_pitch, pooled, pooled_pitch, images, height, width, channels,
                                 mean, var, gamma, beta, eps, skip_bits, skip_words, skip_total, skip_first,
                                 pooled_bits, pooled_words, scale);
    else
        apply_and_pool<1>(y, y_pitch, skip, skip_pitch, pooled, pooled_pitch, images, height, width, channels, mean,
                          var, gamma, beta, eps, skip_bits, skip_words, skip_total, skip_first, pooled_bits,
                          pooled_words, scale);
}

// With the pool a thread takes 4 channels in any precision: with the 8 that 16 bytes of bf16 hold it runs out of
// registers.
constexpr int POOLED = 4;

// Calls use(pixel, g, centred) for each pixel of this thread, with arrays of V: centred is y - mean, g the gradient of
// batch norm's output, which is da where the ReLU passed and 0 elsewhere. With dpooled (not null) the winner of each
// window first gets the pool's gradient in addition to da.
template <int V, class Use>
__device__ __forceinline__ void for_gradients(const Worker& w, const Norm<V>& norm, const element* da, int da_pitch,
                                              const element* dpooled, int dpooled_pitch, const element* y, int y_pitch,
                                              int images, int height, int width, Use use) {
    const int first = w.part * V;
    // From the gradient of the ReLU's output, in g, and y, in x, to what `use` wants.
    auto through_relu = [&](float (&g)[V], float (&x)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (norm.normalise(x[i], i) <= 0) g[i] = 0;
            x[i] -= norm.mean[i];
        }
    };
    float g[V], x[V];
    if (!dpooled) {
        for (int pixel = w.first; pixel < images * height * width; pixel += w.step) {
            read(y + static_cast<size_t>(pixel) * y_pitch + first, x);
            read(da + static_cast<size_t>(pixel) * da_pitch + first, g);
            through_relu(g, x);
            use(static_cast<size_t>(pixel), g, x);
        }
        return;
    }
    for (int window = w.first; window < images * (height / 2) * (width / 2); window += w.step) {
        const Window at = window_of(window, height / 2, width / 2);
        Values<V> in[4];  // read before dy is written
        float best[V];
        int winner[V] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            in[q] = *reinterpret_cast<const Values<V>*>(y + at.pixel[q] * y_pitch + first);
            to_floats(in[q], x);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float a = relu(norm.normalise(x[i], i));
                if (q == 0) best[i] = a;
                else if (wins(a, best[i])) best[i] = a, winner[i] = q;
            }
        }
        float from_pool[V];
        read(dpooled + static_cast<size_t>(window) * dpooled_pitch + first, from_pool);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            to_floats(in[q], x);
            read(da + at.pixel[q] * da_pitch + first, g);
#pragma unroll
            for (int i = 0; i < V; ++i)
                if (winner[i] == q) g[i] += from_pool[i];
            through_relu(g, x);
            use(at.pixel[q], g, x);
        }
    }
}

template <int V>
__device__ __forceinline__ void reduce(const element* da, int da_pitch, const element* dpooled, int dpooled_pitch,
                                       const element* y, int y_pitch, int images, int height, int width, int channels,
                                       const float* mean, const float* var, const float* gamma, const float* beta,
                                       float eps, float* partials, float* scratch) {
    const Worker w = worker((channels + V - 1) / V);
    const int first = w.part * V;
    float sum[2 * V] = {};  // of g (y - mean), then of g
    if (w.active) {
        const Norm<V> norm(mean, var, gamma, beta, eps, first);
        for_gradients<V>(w, norm, da, da_pitch, dpooled, dpooled_pitch, y, y_pitch, images, height, width,
                         [&](size_t, const float (&g)[V], const float (&centred)[V]) {
#pragma unroll
                             for (int i = 0; i < V; ++i) sum[i] += g[i] * centred[i], sum[V + i] += g[i];
                         });
    }
    sum_over_groups(sum, w, scratch);
    if (!w.active || w.group != 0) return;
    float* to = partials + static_cast<size_t>(w.row) * 2 * channels + first;
    for (int i = 0; i < V; ++i) {  // dgamma is the sum of g x_hat, and x_hat = (y - mean) / sqrt(var + eps)
        to[i] = sum[i] * Norm<V>::inverse_std(var[first + i], eps);
        to[channels + i] = sum[V + i];
    }
}

// First pass: partials [block row][dgamma, dbeta][channels].
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    norm_relu_reduce(const element* __restrict__ da, int da_pitch, const element* __restrict__ dpooled,
                     int dpooled_pitch, const element* __restrict__ y, int y_pitch, int images, int height, int width,
                     int channels, const float* __restrict__ mean, const float* __restrict__ var,
                     const float* __restrict__ gamma, const float* __restrict__ beta, float eps, int wide,
                     float* __restrict__ partials) {
    __shared__ float scratch[THREADS];
    if (wide && dpooled)
        reduce<POOLED>(da, da_pitch, dpooled, dpooled_pitch, y, y_pitch, images, height, width, channels, mean, var,
                       gamma, beta, eps, partials, scratch);
    else if (wide)
        reduce<ELEMENTS>(da, da_pitch, nullptr, 0, y, y_pitch, images, height, width, channels, mean, var, gamma, beta,
                         eps, partials, scratch);
    else
        reduce<1>(da, da_pitch, dpooled, dpooled_pitch, y, y_pitch, images, height, width, channels, mean, var, gamma,
                  beta, eps, partials, scratch);
}

template <int V>
__device__ __forceinline__ void write_gradient(const element* da, int da_pitch, const element* dpooled,
                                               int dpooled_pitch, const element* y, int y_pitch, element* dy,
                                               int dy_pitch, int images, int height, int width, int channels,
                                               const float* mean, const float* var, const float* gamma,
                                               const float* beta, float eps, const float* dgamma, const float* dbeta) {
    const Worker w = worker((channels + V - 1) / V);
    if (!w.active) return;
    const int first = w.part * V;
    const Norm<V> norm(mean, var, gamma, beta, eps, first);
    // dy = slope (g - mean(g) - x_hat mean(g x_hat)), where mean(g) = dbeta / m and mean(g x_hat) = dgamma / m.
    const float m = static_cast<float>(images) * height * width;
    float of_one[V], of_centred[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
        of_one[i] = norm.slope[i] * (dbeta[first + i] / m);
        of_centred[i] = norm.slope[i] * (dgamma[first + i] / m) * Norm<V>::inverse_std(var[first + i], eps);
    }
    for_gradients<V>(w, norm, da, da_pitch, dpooled, dpooled_pitch, y, y_pitch, images, height, width,
                     [&](size_t pixel, float (&g)[V], const float (&centred)[V]) {
#pragma unroll
                         for (int i = 0; i < V; ++i)
                             g[i] = fmaf(norm.slope[i], g[i], -fmaf(of_centred[i], centred[i], of_one[i]));
                         write(dy + pixel * dy_pitch + first, g);
                     });
}

// Second pass: dy, which may be da or y itself: a thread reads its pixel, or its window, before it writes there.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    norm_relu_gradient(const element* da, int da_pitch, const element* __restrict__ dpooled, int dpooled_pitch,
                       const element* y, int y_pitch, element* dy, int dy_pitch, int images, int height, int width,
                       int channels, const float* __restrict__ mean, const float* __restrict__ var,
                       const float* __restrict__ gamma, const float* __restrict__ beta, float eps,
                       const float* __restrict__ dgamma, const float* __restrict__ dbeta, int wide) {
    if (wide && dpooled)
        write_gradient<POOLED>(da, da_pitch, dpooled, dpooled_pitch, y, y_pitch, dy, dy_pitch, images, height, width,
                               channels, mean, var, gamma, beta, eps, dgamma, dbeta);
    else if (wide)
        write_gradient<ELEMENTS>(da, da_pitch, nullptr, 0, y, y_pitch, dy, dy_pitch, images, height, width, channels,
                                 mean, var, gamma, beta, eps, dgamma, dbeta);
    else
        write_gradient<1>(da, da_pitch, dpooled, dpooled_pitch, y, y_pitch, dy, dy_pitch, images, height, width,
                          channels, mean, var, gamma, beta, eps, dgamma, dbeta);
}
