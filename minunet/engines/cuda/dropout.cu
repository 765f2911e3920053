// Dropout masks: one bit a value, drawn by counter.
//
// Specification: minunet.rng.random_uint16 and the `kept` of minunet.ops.dropout: value e of an image is kept if its
// 16-bit draw is at least `threshold`. Bit e % 16 of word e / 16 of the image's row says so.
//
// Idea. Philox 4x64-10 turns a 256-bit counter and a 128-bit key into 256 random bits, without any state: ten rounds of
// two 64 x 64 bit products and some exclusive ors. So each thread makes the block of 16 draws that its 16 values need,
// and no other. Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3
// and table 2.
//
// Cost: about 250 instructions for 16 values, and 1 bit written a value: all masks of a step of the reference network,
// batch 16, take about 0.3 ms of arithmetic, less than writing the values themselves.

extern "C" __global__ void __launch_bounds__(256)
    dropout_bits(unsigned short* __restrict__ bits, int words, int images, unsigned long long seed,
                 unsigned long long epoch, unsigned long long step, unsigned long long stream,
                 unsigned long long first_image, int threshold) {
    const long long index = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
    if (index >= static_cast<long long>(words) * images) return;
    const int image = static_cast<int>(index / words), word = static_cast<int>(index % words);

    // The counter starts at 1: NumPy counts up before it draws.
    unsigned long long x[4] = {1ull + word, first_image + image, step, epoch}, key[2] = {seed, stream};
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const unsigned long long high_a = __umul64hi(a, x[0]), low_a = a * x[0], high_b = __umul64hi(b, x[2]),
                                 low_b = b * x[2];
        x[0] = high_b ^ x[1] ^ key[0];
        x[1] = low_b;
        x[2] = high_a ^ x[3] ^ key[1];
        x[3] = low_a;
        key[0] += 0x9E3779B97F4A7C15ull;  // the golden ratio, and the square root of 3 less 1
        key[1] += 0xBB67AE8584CAA73Bull;
    }
    unsigned int result = 0;
    for (int draw = 0; draw < 16; ++draw) {
        const int value =
            static_cast<int>(x[draw / 4] >> (16 * (draw % 4)) & 0xffff);  // the least significant quarter first
        result |= static_cast<unsigned int>(value >= threshold) << draw;
    }
    bits[index] = static_cast<unsigned short>(result);
}
