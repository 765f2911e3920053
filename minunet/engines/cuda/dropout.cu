// Dropout masks: one bit a value, drawn by counter.
//
// Specification: minunet.base.rng.random_uint16 and the `kept` of minunet.ops.dropout: value e of an image is kept if its
// 16-bit draw is at least `threshold`, the rate of dropout times 2^16. Bit e % 16 of word e / 16 of the image's row
// says so.
//
// Idea: a thread makes one word. Its 16 draws are one block of Philox's 256 random bits (philox.cuh).
//
// Cost: about 250 instructions for 16 values, and 1 bit written a value: all masks of a step of the reference network,
// batch 16, take about 0.3 ms of arithmetic, less than writing the values themselves.

#include "philox.cuh"

extern "C" __global__ void __launch_bounds__(256)
    dropout_bits(unsigned short* __restrict__ bits, int words, int images, unsigned long long seed,
                 unsigned long long epoch, unsigned long long step, unsigned long long stream,
                 unsigned long long first_image, int threshold) {
    const long long index = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= static_cast<long long>(words) * images) return;
    const int image = static_cast<int>(index / words), word = static_cast<int>(index % words);
    unsigned long long x[4];
    philox(word, {seed, epoch, step, stream, first_image + image}, x);
    unsigned int result = 0;
    for (int draw = 0; draw < 16; ++draw) {
        const int value =
            static_cast<int>(x[draw / 4] >> (16 * (draw % 4)) & 0xffff);  // the least significant quarter first
        result |= static_cast<unsigned int>(value >= threshold) << draw;
    }
    bits[index] = static_cast<unsigned short>(result);
}
