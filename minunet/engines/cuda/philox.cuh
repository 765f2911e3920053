// Random numbers by counter.
//
// Specification: minunet.base.rng.philox.
//
// Idea. Philox 4x64-10 turns a 256-bit counter and a 128-bit key into 256 random bits, without any state: ten rounds of
// two 64 x 64 bit products and some exclusive ors. So a thread makes the block of bits that it needs, and no other.
// Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2.
//
// Cost: about 250 instructions for 256 bits.
#pragma once

struct Key {  // minunet.base.rng.Key
    unsigned long long seed, epoch, step, stream, image;
};

// Block number `block` of the stream that `at` names: 4 words. The constants are the paper's.
__device__ __forceinline__ void philox(unsigned long long block, Key at, unsigned long long (&x)[4]) {
    x[0] = 1 + block;  // NumPy counts up before it draws
    x[1] = at.image;
    x[2] = at.step;
    x[3] = at.epoch;
    unsigned long long key[2] = {at.seed, at.stream};
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
}
