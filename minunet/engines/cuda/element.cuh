// What a number is, in each of the three precisions. The kernels are written once, for `element`.
//
//     -DPRECISION_F32     element = float. A product is three TF32 products, together about as exact as float32's own.
//     -DPRECISION_TF32    element = float. A product is one TF32 product: 10 bits of mantissa.
//     -DPRECISION_BF16    element = bf16, the upper half of a float: half the bytes, twice the rate, 7 bits of
//     mantissa.
//
// Sums are always float32, and where many numbers are joined (statistics, losses) float64 at the end.
#pragma once
#include "ptx.cuh"

#ifdef PRECISION_BF16
typedef unsigned short element;
#else
typedef float element;
#endif

constexpr int ELEMENTS = 16 / sizeof(element);  // in 16 bytes, the widest access of a thread

struct alignas(16) Pack {  // what a thread reads or writes at once
    element e[ELEMENTS];
};

__device__ __forceinline__ float to_float(element x) {
#ifdef PRECISION_BF16
    return __uint_as_float(static_cast<unsigned int>(x) << 16);
#else
    return x;
#endif
}

// The nearest element, of two equally near ones the even one. NaN stays NaN.
__device__ __forceinline__ element to_element(float x) {
#ifdef PRECISION_BF16
    unsigned int bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return x;
#endif
}

// The nearest element that a tensor core can multiply without dropping bits: rounded here, where a tensor is written,
// and not in the inner loop of each kernel that reads it.
__device__ __forceinline__ element to_factor(float x) {
#ifdef PRECISION_TF32
    unsigned int bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;  // infinite or NaN
    return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
#else
    return to_element(x);
#endif
}

// C += A B for fragments of 16 x 32 bytes and 32 bytes x 8 (see ptx.cuh).
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
#if defined(PRECISION_BF16)
    multiply_bf16(c, a, b);
#elif defined(PRECISION_TF32)
    multiply_tf32(c, a, b);
#else
    // x = high + low exactly, with high a TF32 number (an infinite x has a low of NaN, and so has what it is in). low *
    // low is below float32's rounding.
    unsigned int a_low[4], b_low[2];
    for (int i = 0; i < 4; ++i) a_low[i] = __float_as_uint(__uint_as_float(a[i]) - __uint_as_float(a[i] & 0xffffe000u));
    for (int i = 0; i < 2; ++i) b_low[i] = __float_as_uint(__uint_as_float(b[i]) - __uint_as_float(b[i] & 0xffffe000u));
    multiply_tf32(c, a_low, b);
    multiply_tf32(c, a, b_low);
    multiply_tf32(c, a, b);
#endif
}

// Whether bit `index` of an image's dropout mask (dropout.cu) says "kept".
__device__ __forceinline__ bool kept(const unsigned short* bits, int words_an_image, int image, size_t index) {
    return bits[static_cast<size_t>(image) * words_an_image + index / 16] >> (index % 16) & 1;
}

// Fills 16 bytes of shared memory with the `count` elements at `from` and then zeros, one by one: for places that are
// no multiples of 16, such as the 3 channels of an image.
__device__ __forceinline__ void copy_one_by_one(void* shared, const element* from, int count) {
    Pack pack;
    for (int i = 0; i < ELEMENTS; ++i) pack.e[i] = i < count ? from[i] : element(0);
    *static_cast<Pack*>(shared) = pack;
}
