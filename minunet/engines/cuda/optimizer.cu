// The optimiser: all parameters of a network in one launch.
//
// Specification: minunet.training.optim AdamW.step, the norm in clip_by_global_norm, WeightEMA.update. The same operations in
// the same order, so the same bits as NumPy's.
//
// Idea. A network has some hundred small arrays and a few large ones; a launch for each would leave the GPU waiting. So
// all arrays are cut into chunks of CHUNK numbers, and block b works on chunk b: of which tensor, and where in it, is
// in a list. tensors [tensor][field] are pointers; sizes [tensor]; chunks [chunk][tensor, place in units of CHUNK].
//
// Cost: AdamW reads 4 and writes 3 numbers a parameter: 34.5 M of them 0.97 GB, 0.32 ms at 3 TB/s.

constexpr int THREADS = 256, CHUNK = 8192;

// The numbers that a block works on: `count` from `offset` in tensor `tensor`.
struct Chunk {
    int tensor;
    long long offset, count;
};

__device__ __forceinline__ Chunk chunk_of(const int* chunks, const long long* sizes) {
    const int tensor = chunks[2 * blockIdx.x];
    const long long offset = static_cast<long long>(chunks[2 * blockIdx.x + 1]) * CHUNK, rest = sizes[tensor] - offset;
    return {tensor, offset, rest < CHUNK ? rest : CHUNK};
}

// Below the smallest normal number a moment is 0 (optim.py says why). Times 0: a NaN stays one.
__device__ __forceinline__ float flush(float moment) {
    return fabsf(moment) >= 1.17549435e-38f ? moment : moment * 0.0f;
}

// Fields: theta, g, m, v. decays [tensor]: the weight decay, 0 for a tensor that does not decay. correction: 1 -
// beta^steps.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(float* const* __restrict__ tensors, const long long* __restrict__ sizes, const int* __restrict__ chunks,
          const double* __restrict__ decays, double lr, float beta1, float one_less_beta1, float beta2,
          float one_less_beta2, float eps, float correction1, float correction2) {
    const Chunk chunk = chunk_of(chunks, sizes);
    float* const* fields = tensors + 4 * chunk.tensor;
    float *theta = fields[0] + chunk.offset, *g = fields[1] + chunk.offset, *m = fields[2] + chunk.offset,
          *v = fields[3] + chunk.offset;
    const float rate = static_cast<float>(lr), decay = static_cast<float>(lr * decays[chunk.tensor]);
    for (int i = threadIdx.x; i < chunk.count; i += THREADS) {
        float weight = theta[i];
        weight -= decay * weight;
        const float first = flush(beta1 * m[i] + one_less_beta1 * g[i]);
        const float second = flush(beta2 * v[i] + one_less_beta2 * g[i] * g[i]);
        m[i] = first;
        v[i] = second;
        theta[i] = weight - rate * (first / correction1) / (sqrtf(second / correction2) + eps);
    }
}

// Fields: average, value. average = decay * average + (1 - decay) * value.
extern "C" __global__ void __launch_bounds__(THREADS)
    lerp(float* const* __restrict__ tensors, const long long* __restrict__ sizes, const int* __restrict__ chunks,
         float decay, float one_less_decay) {
    const Chunk chunk = chunk_of(chunks, sizes);
    float *average = tensors[2 * chunk.tensor] + chunk.offset, *value = tensors[2 * chunk.tensor + 1] + chunk.offset;
    for (int i = threadIdx.x; i < chunk.count; i += THREADS)
        average[i] = decay * average[i] + one_less_decay * value[i];
}

// The sum over the block, for thread 0, by halving.
__device__ __forceinline__ double sum_over_block(double value, double* sums) {
    sums[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

// partials [block]: its share of the sum of squares of g.
extern "C" __global__ void __launch_bounds__(THREADS)
    squares(const float* __restrict__ g, long long size, double* __restrict__ partials) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < size;
         i += static_cast<long long>(gridDim.x) * THREADS)
        sum += static_cast<double>(g[i]) * g[i];
    sum = sum_over_block(sum, sums);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block: the sum of all partials.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_doubles(const double* __restrict__ partials, int count, double* __restrict__ out) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += partials[i];
    sum = sum_over_block(sum, sums);
    if (threadIdx.x == 0) out[0] = sum;
}
