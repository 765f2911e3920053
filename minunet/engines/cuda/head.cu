// The last convolution, to one or a few channels of logits, forward and backward.
//
// Specification: minunet.ops conv2d (stride 1, "same", with bias) for kernel 1 or 3 and few output channels K.
//
// Idea. With K = 1 there is nothing for tensor cores to do: a pixel has 9 C products each way, so few that what counts
// is everything else, the loads, bounds and addresses. So a thread has 4 channels, keeps their nine weights in
// registers, and walks along a strip of pixels.
//
// Forward: a value of x is in nine windows. The thread adds it to the nine logits as it comes by; those of a column are
// complete once the next column has been read, and then the lanes of the strip add up their channels.
//
// Backward: of the nine dlogits around a pixel three are new at each step. dx is the weights times these; dweight is x
// times these, summed in registers over all strips of the thread. It is one kernel: x is read once, and dx may be
// written over it.
//
// Where K > 1, or the channels are no multiple of 4, a thread has one channel and walks once for each output. A kernel
// of 1 x 1 is one of 3 x 3 with zeros. Sums are in an order that only the sizes and the number of multiprocessors
// decide, so the same input gives the same bits.
//
// Cost: memory, that is x read once forward and once backward, and dx written: at level 1 of the reference network,
// batch 16, 64 channels in TF32, 205 MB each, 0.05 ms each at 4.3 TB/s; half of that in bf16. Counted in the machine
// code for sm_90, and not yet measured on a GPU: the threads of a pixel execute together 1100 instructions forward and
// 1800 backward in TF32, 1200 and 1900 in bf16. (With the weights read anew for each pixel, and the bounds checked for
// each tap, that was 9600 and 21400, and 9100 and 12500.) An H200 has the time for about 1700 while 0.05 ms pass.
#include "reduce.cuh"

constexpr int PART = 4;              // channels of a thread: with 8 it runs out of registers
constexpr int COLUMNS = 16;          // of a strip
constexpr int LANES = 16, ROWS = 4;  // forward: lanes that share a strip; its rows
constexpr int AHEAD = ELEMENTS / 2;  // backward: pixels that are read before the first is written

// Zeros, to be read where x would be outside of the image: to choose an address takes fewer instructions than to choose
// between each value and 0.
__device__ Pack outside;

// The weights of V channels for output k, as those of a 3 x 3 kernel: one of 1 x 1 is the middle.
template <int V>
__device__ __forceinline__ void load_weights(float (&w)[9][V], const float* weight, int first, int channels,
                                             int outputs, int kernel, int k) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
        for (int e = 0; e < V; ++e) {
            const bool there = first + e < channels && (kernel == 3 || tap == 4);
            w[tap][e] = there ? weight[((kernel == 3 ? tap : 0) * channels + first + e) * outputs + k] : 0;
        }
}

template <int V>
__device__ __forceinline__ void forward(const element* x, int x_pitch, const float* weight, const float* bias,
                                        float* logits, int images, int height, int width, int channels, int outputs,
                                        int kernel) {
    const int strip = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int down = (height + ROWS - 1) / ROWS, across = (width + COLUMNS - 1) / COLUMNS;
    const int i = strip % down * ROWS, first = strip / down % across * COLUMNS, image = strip / down / across;
    const bool inside = image < images;  // who is not still takes part in the shuffles
    const int last = inside && lane < ROWS && i + lane < height ? min(first + COLUMNS, width) : 0;  // 0: no writer
    const long long pixel = (static_cast<long long>(image) * height + i) * width + first - 1;
    for (int k = 0; k < outputs; ++k)
        for (int part = 0; part < channels; part += LANES * V) {
            const int c = part + lane * V, rows = inside && c < channels ? height : 0;
            const element* from = x + pixel * x_pitch + c;
            float* to = logits + (pixel + lane * width - 1) * outputs + k;
            float w[9][V], sum[ROWS][3] = {};  // sum: of the logits in columns j - 1, j, j + 1
            load_weights(w, weight, c, channels, outputs, kernel, k);
#pragma unroll 1
            for (int j = first - 1; j <= first + COLUMNS; ++j, from += x_pitch, to += outputs) {
                Values<V> in[ROWS + 2];  // column j, with the rows above and below the strip
                for (int r = 0; r < ROWS + 2; ++r) {
                    const bool there = j >= 0 && j < width && i + r > 0 && i + r <= rows;
                    const element* place = there ? from + (r - 1) * width * x_pitch : outside.e;
                    in[r] = *reinterpret_cast<const Values<V>*>(place);
                }
#pragma unroll
                for (int r = 0; r < ROWS + 2; ++r) {
                    float value[V];
                    to_floats(in[r], value);
#pragma unroll
                    for (int tap = 0; tap < 9; ++tap) {  // the logit below and right of x has it above and left: tap 0
                        const int row = r - tap / 3, column = 2 - tap % 3;
                        if (row < 0 || row >= ROWS) continue;
                        for (int e = 0; e < V; ++e) sum[row][column] += value[e] * w[tap][e];
                    }
                }
                // Column j - 1 is complete. Each half of the lanes goes on with half of its rows, until lane r has row
                // r; then these are added up.
                float total[ROWS];
                for (int r = 0; r < ROWS; ++r) {
                    total[r] = sum[r][0];
                    sum[r][0] = sum[r][1], sum[r][1] = sum[r][2], sum[r][2] = 0;
                }
#pragma unroll
                for (int half = ROWS / 2; half > 0; half /= 2)
                    for (int r = 0; r < half; ++r) {
                        const bool upper = lane & half;
                        const float theirs = upper ? total[r] : total[r + half];
                        total[r] = (upper ? total[r + half] : total[r]) + __shfl_xor_sync(0xffffffffu, theirs, half);
                    }
                for (int bits = ROWS; bits < LANES; bits *= 2) total[0] += __shfl_xor_sync(0xffffffffu, total[0], bits);
                if (j > first && j <= last) *to = total[0] + (part == 0 ? bias[k] : *to);
            }
        }
}

// x (images, height, width, channels), pixels of x_pitch; weight (kernel, kernel, channels, outputs); logits (images,
// height, width, outputs). wide: one output, and PART channels at a time can be read.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    head(const element* __restrict__ x, int x_pitch, const float* __restrict__ weight, const float* __restrict__ bias,
         float* __restrict__ logits, int images, int height, int width, int channels, int outputs, int kernel,
         int wide) {
    if (wide) forward<PART>(x, x_pitch, weight, bias, logits, images, height, width, channels, 1, kernel);
    else forward<1>(x, x_pitch, weight, bias, logits, images, height, width, channels, outputs, kernel);
}

template <int V>
__device__ __forceinline__ void backward(const float* dlogits, const element* x, int x_pitch, const float* weight,
                                         element* dx, int dx_pitch, int images, int height, int width, int channels,
                                         int outputs, int kernel, float* partials, float* scratch) {
    const Worker at = worker((channels + V - 1) / V);
    const int c = at.part * V, across = (width + COLUMNS - 1) / COLUMNS;
    for (int k = 0; k < outputs; ++k) {
        float w[9][V], sum[9 * V + 1] = {};  // sum: dweight of each tap and channel, and last dbias
        load_weights(w, weight, c, channels, outputs, kernel, k);
        for (int strip = at.first; at.active && strip < images * height * across; strip += at.step) {
            const int row = strip / across, i = row % height;  // row: of all images'
            const int first = strip % across * COLUMNS, last = min(first + COLUMNS, width);
            const size_t pixel = static_cast<size_t>(row) * width + first;
            const element* from = x + pixel * x_pitch + c;
            element* to = dx + pixel * dx_pitch + c;
            const float* near = dlogits + pixel * outputs;
            const bool there[3] = {i > 0, true, i < height - 1};
            const auto dlogit = [&](int r, int j, int q, int output) {  // in row i + r - 1, column j + q; 0 outside
                // As an unsigned number a column of -1 is a large one.
                return there[r] && static_cast<unsigned int>(j + q) < width
                           ? near[((r - 1) * width + q) * outputs + output]
                           : 0;
            };
            float d[9];                            // the dlogits around a pixel, row by row
            const auto next = [&](int j, int q) {  // a step to the right: column j + q comes in
                for (int r = 0; r < 3; ++r)
                    d[3 * r] = d[3 * r + 1], d[3 * r + 1] = d[3 * r + 2], d[3 * r + 2] = dlogit(r, j, q, k);
            };
            next(first, -1);
            next(first, 0);
#pragma unroll 1
            for (int j = first; j < last; j += AHEAD) {
                Values<V> in[AHEAD];  // dx may be x: what is not read by now would wait until dx is written
                for (int q = 0; q < AHEAD; ++q)
                    if (j + q < last) in[q] = *reinterpret_cast<const Values<V>*>(from + q * x_pitch);
#pragma unroll
                for (int q = 0; q < AHEAD; ++q) {
                    if (j + q >= last) break;
                    next(j, q + 1);
                    float value[V], result[V] = {};
                    to_floats(in[q], value);
                    for (int tap = 0; tap < 9; ++tap)  // the logit below and right of x has it above and left: 8 - tap
                        for (int e = 0; e < V; ++e) {
                            sum[tap * V + e] += d[8 - tap] * value[e];
                            result[e] += d[8 - tap] * w[tap][e];
                        }
                    sum[9 * V] += d[4];
                    if (k < outputs - 1) continue;  // x is needed once more
                    for (int other = 0; other < k; ++other) {
                        float v[9][V];
                        load_weights(v, weight, c, channels, outputs, kernel, other);
                        for (int tap = 0; tap < 9; ++tap)
                            for (int e = 0; e < V; ++e)
                                result[e] += dlogit(2 - tap / 3, j, q + 1 - tap % 3, other) * v[tap][e];
                    }
                    *reinterpret_cast<Values<V>*>(to + q * dx_pitch) = to_elements(result);
                }
                from += AHEAD * x_pitch, to += AHEAD * dx_pitch, near += AHEAD * outputs;
            }
        }
        sum_over_groups(sum, at, scratch);
        if (!at.active || at.group != 0) continue;
        float* to = partials + static_cast<size_t>(at.row) * (kernel * kernel * channels + 1) * outputs + k;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap)
            for (int e = 0; e < V; ++e)
                if (kernel == 3 || tap == 4)
                    to[((kernel == 3 ? tap : 0) * channels + c + e) * outputs] = sum[tap * V + e];
        if (at.part == 0) to[kernel * kernel * channels * outputs] = sum[9 * V];
    }
}

// dx, and partials [block row][dweight, then dbias]: each block's share of the sums over pixels. dx may be x.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    head_backward(const float* __restrict__ dlogits, const element* x, int x_pitch, const float* __restrict__ weight,
                  element* dx, int dx_pitch, int images, int height, int width, int channels, int outputs, int kernel,
                  int wide, float* __restrict__ partials) {
    __shared__ float scratch[THREADS];
    if (wide)
        backward<PART>(dlogits, x, x_pitch, weight, dx, dx_pitch, images, height, width, channels, 1, kernel, partials,
                       scratch);
    else
        backward<1>(dlogits, x, x_pitch, weight, dx, dx_pitch, images, height, width, channels, outputs, kernel,
                    partials, scratch);
}
