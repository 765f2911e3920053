// What a number is, in each of the three precisions. The kernels are written once, for `element`.
//
//     -DPRECISION_F32     element = float. A product is three TF32 products, together about as exact as float32's own.
//     -DPRECISION_TF32    element = float. A product is one TF32 product: 10 bits of mantissa.
//     -DPRECISION_BF16    element = bf16, the upper half of a float: half the bytes, twice the rate; 7 bits of
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

template <int V>
struct alignas(V * sizeof(element))
    Values {  // V neighbouring channels of a pixel: what a thread reads or writes at once
    element e[V];
};
typedef Values<ELEMENTS> Pack;

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
    return static_cast<unsigned short>(to_bf16(x, 0.0f));
#else
    return x;
#endif
}

// The nearest element that a tensor core can multiply without dropping bits: rounded here, where a tensor is written,
// and not in the inner loop of each kernel that reads it. Of 23 bits TF32 has 10: half of the last of these is added,
// and the other 13 are cut off.
__device__ __forceinline__ element to_factor(float x) {
#ifdef PRECISION_TF32
    unsigned int bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;  // infinite or NaN
    return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
#else
    return to_element(x);
#endif
}

// The same for V at once. Two bf16 numbers share a register, and one instruction rounds both: one by one, packing and
// unpacking them takes more instructions than a batch norm.
template <int V>
__device__ __forceinline__ void to_floats(Values<V> from, float (&x)[V]) {
    if constexpr (sizeof(element) == 2 && V % 2 == 0) {
        const unsigned int* words = reinterpret_cast<const unsigned int*>(from.e);
#pragma unroll
        for (int i = 0; i < V / 2; ++i) {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = to_float(from.e[i]);
    }
}

template <int V>
__device__ __forceinline__ Values<V> to_elements(const float (&x)[V]) {
    Values<V> result;
    if constexpr (sizeof(element) == 2 && V % 2 == 0) {
        unsigned int* words = reinterpret_cast<unsigned int*>(result.e);
#pragma unroll
        for (int i = 0; i < V / 2; ++i) words[i] = to_bf16(x[2 * i], x[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) result.e[i] = to_element(x[i]);
    }
    return result;
}

template <int V>
__device__ __forceinline__ Values<V> to_factors(const float (&x)[V]) {
#ifdef PRECISION_TF32
    Values<V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) result.e[i] = to_factor(x[i]);
    return result;
#else
    return to_elements(x);
#endif
}

// C += A B for fragments of 16 x 32 bytes and 32 bytes x 8 (see ptx.cuh).
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
#if defined(PRECISION_BF16)
    multiply_bf16(c, a, b);
#elif defined(PRECISION_TF32)
    multiply_tf32(c, a, b);
#else
    // x = high + low exactly, with high the TF32 number that the instruction makes of x by ignoring 13 bits. Of the
    // four products low * low is left out: it is below float32's rounding. (An infinite x has a low of NaN: so has the
    // sum.)
    unsigned int a_low[4], b_low[2];
    for (int i = 0; i < 4; ++i) a_low[i] = __float_as_uint(__uint_as_float(a[i]) - __uint_as_float(a[i] & 0xffffe000u));
    for (int i = 0; i < 2; ++i) b_low[i] = __float_as_uint(__uint_as_float(b[i]) - __uint_as_float(b[i] & 0xffffe000u));
    multiply_tf32(c, a_low, b);
    multiply_tf32(c, a, b_low);
    multiply_tf32(c, a, b);
#endif
}

// Which of the COUNT values index, index + 1, ... of an image its dropout mask (dropout.cu) keeps: bit i says it of
// value index + i.
template <int COUNT>
__device__ __forceinline__ unsigned int kept(const unsigned short* bits, int words_an_image, int image, int index) {
    static_assert(COUNT <= 16, "they lie in two words at most");
    const unsigned short* row = bits + static_cast<size_t>(image) * words_an_image;
    const int last = min((index + COUNT - 1) / 16, words_an_image - 1);
    return (row[index / 16] | static_cast<unsigned int>(row[last]) << 16) >> index % 16;
}

// Dropout: what is kept is multiplied by scale, the rest is 0.
template <int V>
__device__ __forceinline__ void drop_out(float (&x)[V], unsigned int kept_bits, float scale) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = kept_bits >> i & 1 ? x[i] * scale : 0;
}

// Fills 16 bytes of shared memory with the `count` elements at `from` and then zeros, one by one: for places that are
// no multiples of 16, such as the 3 channels of an image.
__device__ __forceinline__ void copy_one_by_one(void* shared, const element* from, int count) {
    Pack pack;
    for (int i = 0; i < ELEMENTS; ++i) pack.e[i] = i < count ? from[i] : element(0);
    *static_cast<Pack*>(shared) = pack;
}
