// wgmma, Hopper's matrix product: four warps (a warpgroup) multiply two matrices that lie in shared memory.
//
// mma.sync takes its factors from registers, where ldmatrix has to bring them first. wgmma reads shared memory by
// itself and goes on while the warps do something else: alone it runs at the full rate of the tensor cores.
//
// Both factors are named by a descriptor: where the matrix begins, and how its blocks of 8 x 16 bytes lie. The 128
// bytes of a block lie together, and that is all the layout there is ("swizzling", another order of the 16 bytes, is
// not used here). So the two strides between blocks are free. A matrix has one axis of rows (the result's rows or
// columns) and one that is summed over; 16 bytes that lie together may be neighbours along the one or the other:
//
//     along the sum ("K-major")             rows: 8 in a block, and from block to block `rows` bytes
//                                           sum: 16 bytes in a block, and from block to block `sum` bytes
//     along the rows ("MN-major", bf16)     rows: 16 bytes in a block, and from block to block `rows` bytes
//                                           sum: 8 in a block, and from block to block `sum` bytes
//
// With pixels 16 bytes apart, the parts of 16 bytes of their channels in planes, both kinds are there in one layout:
// any 8 neighbouring pixels are a block, wherever they begin. So a convolution's tap is only another beginning.
//
// The result, 64 x N floats, is spread over the 128 threads: warp w has rows 16 w to 16 w + 15, in the pattern of
// mma.sync (ptx.cuh), 8 columns after 8 columns. Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once
#include "element.cuh"

typedef unsigned long long Matrix;

// The descriptor of a matrix that begins at `first` in dynamic shared memory. Beginning and strides are multiples of 16
// bytes, below 256 KB.
__device__ __forceinline__ Matrix matrix(const void* first, int sum, int rows) {
#ifdef EMULATOR
    const unsigned long long address = emulator::shared_address(first);
#else
    const unsigned long long address = static_cast<unsigned int>(__cvta_generic_to_shared(first));
#endif
    return address >> 4 | static_cast<Matrix>(sum >> 4) << 16 | static_cast<Matrix>(rows >> 4) << 32;
}

// The same matrix, beginning so many bytes later.
__device__ __forceinline__ Matrix later(Matrix m, int bytes) { return m + (bytes >> 4); }

// Before the first product that adds to registers which the threads have written.
__device__ __forceinline__ void products_begin() {
#ifndef EMULATOR
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Makes one group of the products since the last call.
__device__ __forceinline__ void products_commit() {
#ifdef EMULATOR
    emulator::products_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most BUT_LAST of the groups are still under way. Until then nobody may touch their sums and factors.
template <int BUT_LAST>
__device__ __forceinline__ void products_wait() {
#ifdef EMULATOR
    emulator::products_wait(BUT_LAST);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BUT_LAST) : "memory");
#endif
}

// Shared memory that this thread has written (or that its copies have) may be read by wgmma, after a barrier.
__device__ __forceinline__ void written_for_products() {
#ifdef EMULATOR
    emulator::fence_proxy();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Named barriers: `threads` threads in all come to barrier `number` (1 to 15), whole warps. Some only say so and go on.
__device__ __forceinline__ void barrier_wait(int number, int threads) {
#ifdef EMULATOR
    emulator::named_barrier(number, threads, true);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(int number, int threads) {
#ifdef EMULATOR
    emulator::named_barrier(number, threads, false);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// C += A B, where C is 64 rows x 8 EIGHTS floats and the sum is over 32 bytes. ACROSS: both factors are MN-major
// (bf16).
#ifdef EMULATOR
template <int ACROSS, int EIGHTS>
inline void multiply_group(float (&c)[EIGHTS][4], Matrix a, Matrix b) {
    emulator::multiply_group(c[0], EIGHTS, a, b, ACROSS, sizeof(element));
}
#else
// The instruction names every register of the sum. The predicate says that it is added to, and not replaced; the two 1s
// that both factors are taken with their own sign.
#ifdef PRECISION_BF16
#define WGMMA(n, sum, a, b, across)                                                                                \
    "{.reg .pred p; setp.eq.b32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sum "}, %" #a \
    ", %" #b ", p, 1, 1, %" #across ", %" #across ";}"
#else
#define WGMMA(n, sum, a, b, across)                                                                               \
    "{.reg .pred p; setp.eq.b32 p, 1, 1; wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" sum "}, %" #a \
    ", %" #b ", p, 1, 1;}"
#endif
#define FOUR(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SIXTEEN(c, i) FOUR(c, i), FOUR(c, i + 1), FOUR(c, i + 2), FOUR(c, i + 3)
#define FIRST16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define SECOND16 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define THIRD16 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FOURTH16 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

template <int ACROSS>
__device__ __forceinline__ void multiply_group(float (&c)[4][4], Matrix a, Matrix b) {
    asm volatile(WGMMA(32, FIRST16, 16, 17, 18) : SIXTEEN(c, 0) : "l"(a), "l"(b), "n"(ACROSS));
}

template <int ACROSS>
__device__ __forceinline__ void multiply_group(float (&c)[8][4], Matrix a, Matrix b) {
    asm volatile(WGMMA(64, FIRST16 "," SECOND16, 32, 33, 34)
                 : SIXTEEN(c, 0), SIXTEEN(c, 4)
                 : "l"(a), "l"(b), "n"(ACROSS));
}

template <int ACROSS>
__device__ __forceinline__ void multiply_group(float (&c)[16][4], Matrix a, Matrix b) {
    asm volatile(WGMMA(128, FIRST16 "," SECOND16 "," THIRD16 "," FOURTH16, 64, 65, 66)
                 : SIXTEEN(c, 0), SIXTEEN(c, 4), SIXTEEN(c, 8), SIXTEEN(c, 12)
                 : "l"(a), "l"(b), "n"(ACROSS));
}
#endif
