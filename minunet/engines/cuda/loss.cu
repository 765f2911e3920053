// The loss and its gradient: soft Dice and cross entropy, of logits.
//
// Specification: minunet.network.loss segmentation_loss_forward and _backward, with the sigmoid and the logarithm in the
// forms that do not overflow.
//
// Idea: three launches. With logit z, probability p and target t: four sums an image, of p t, p, t and the cross
// entropy, each block a share of them; one block that makes the loss and Dice's numbers of these; and the gradient, a
// formula a value. All sums in float64.
//
// Cost: one number a pixel; the launches themselves take longer.

constexpr int THREADS = 256, SUMS = 4;

struct Sigmoid {
    float p, complement, softplus;  // s(z), s(-z), log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|))
};

__device__ __forceinline__ Sigmoid sigmoid(float z) {
    const float e = expf(z > 0 ? -z : z), larger = 1 / (1 + e), smaller = e / (1 + e);
    return {z > 0 ? larger : smaller, z > 0 ? smaller : larger, (z > 0 ? z : 0) + log1pf(e)};
}

// partials [image][block of the image][sum of p t, p, t, cross entropy].
extern "C" __global__ void __launch_bounds__(THREADS)
    loss_sums(const float* __restrict__ logits, const float* __restrict__ target, int values, int blocks_an_image,
              double* __restrict__ partials) {
    __shared__ double sums[SUMS][THREADS];
    const int image = blockIdx.x / blocks_an_image, block = blockIdx.x % blocks_an_image;
    double sum[SUMS] = {};
    for (int i = block * THREADS + threadIdx.x; i < values; i += blocks_an_image * THREADS) {
        const float z = logits[static_cast<size_t>(image) * values + i],
                    t = target[static_cast<size_t>(image) * values + i];
        const Sigmoid s = sigmoid(z);
        sum[0] += s.p * t, sum[1] += s.p, sum[2] += t, sum[3] += s.softplus - t * z;
    }
    for (int k = 0; k < SUMS; ++k) sums[k][threadIdx.x] = sum[k];
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            for (int k = 0; k < SUMS; ++k) sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
    }
    __syncthreads();  // thread 0 has the sums, and threads 1 to 3 write them, too
    if (threadIdx.x < SUMS) partials[static_cast<size_t>(blockIdx.x) * SUMS + threadIdx.x] = sums[threadIdx.x][0];
}

// One block of one warp: the loss, into value, and dice [image][Dice, 1 / (its denominator * number of Dices)]. A Dice
// is (2 sum p t + smooth) / (sum p + sum t + smooth), of each image or, over_batch, one of all.
extern "C" __global__ void __launch_bounds__(32)
    loss_value(const double* __restrict__ partials, int images, int blocks_an_image, int values, double dice_weight,
               double bce_weight, double smooth, int over_batch, float* __restrict__ value, float* __restrict__ dice) {
    __shared__ double total[SUMS];
    double loss = 0, bce = 0;
    if (threadIdx.x < SUMS) total[threadIdx.x] = 0;
    __syncwarp();
    for (int image = 0; image < images; ++image) {
        if (threadIdx.x < SUMS) {
            double sum = 0;
            for (int b = 0; b < blocks_an_image; ++b)
                sum += partials[(static_cast<size_t>(image) * blocks_an_image + b) * SUMS + threadIdx.x];
            total[threadIdx.x] += sum;
        }
        __syncwarp();
        if (threadIdx.x == 0 && (!over_batch || image == images - 1)) {
            const int dices = over_batch ? 1 : images;
            const double denominator = total[1] + total[2] + smooth,
                         coefficient = (2 * total[0] + smooth) / denominator;
            loss += dice_weight * (1 - coefficient) / dices;
            for (int i = over_batch ? 0 : image; i <= image; ++i) {
                dice[2 * i] = static_cast<float>(coefficient);
                dice[2 * i + 1] = static_cast<float>(1 / (denominator * dices));
            }
        }
        if (threadIdx.x == 0 && (!over_batch || image == images - 1)) bce += total[3];
        __syncwarp();
        if (!over_batch && threadIdx.x < SUMS) total[threadIdx.x] = 0;
        __syncwarp();
    }
    if (threadIdx.x == 0)
        value[0] = static_cast<float>(loss + bce_weight * bce / (static_cast<double>(values) * images));
}

// dloss/dp of dice_weight * (1 - Dice) is dice_weight * (Dice - 2 t) / denominator, dp/dz is p (1 - p); the cross
// entropy's gradient is p - t.
extern "C" __global__ void __launch_bounds__(THREADS)
    loss_gradient(const float* __restrict__ logits, const float* __restrict__ target, int values, int images,
                  const float* __restrict__ dice, float dice_weight, float bce_weight_a_value,
                  float* __restrict__ dlogits) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= static_cast<long long>(values) * images) return;
    const int image = static_cast<int>(i / values);
    const float t = target[i];
    const Sigmoid s = sigmoid(logits[i]);
    const float dprobability = dice_weight * (dice[2 * image] - 2 * t) * dice[2 * image + 1];
    dlogits[i] = dprobability * s.p * s.complement + bce_weight_a_value * (s.p - t);
}
