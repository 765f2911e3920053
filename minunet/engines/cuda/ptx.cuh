// The machine instructions that CUDA C++ has no words for, one small function each.
//
// Tensor cores multiply small matrices; what one holds is spread over the 32 lanes of a warp ("fragments").
// With g = lane / 4 and t = lane % 4, and a word = 4 bytes = 1 TF32 number or 2 bf16 numbers, neighbours in k:
//
//     A, 16 rows of 8 words    the lane has words (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)       (row, word in k)
//     B, 8 columns of 8 words                     (g, t), (g, t + 4)                                (column, word in k)
//     C = A B, 16 x 8 floats                      (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)      (row, column)
//
// So counted in bytes TF32 (k = 8) and bf16 (k = 16) look the same, and one kernel source serves both. ldmatrix loads
// four blocks of 8 rows x 16 bytes from shared memory in just this pattern: the word (g, t) of block q goes to register
// q.
//
// In an asm statement %0, %1, ... are what follows the colons: first what it writes ("=", "+" if it is read, too), then
// what it reads; "r" and "l" are registers of 32 and 64 bits, "f" holds a float, "n" is a constant.
//
// The emulator (tests/engines/cuda/emulator.h) has these functions for a machine without a GPU. Source: PTX ISA, "mma",
// "ldmatrix", "cp.async", "cvt".
#pragma once

// Above 48 KB shared memory must be asked for at the launch ("dynamic"): `name` points to it.
#ifdef EMULATOR
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// base + index * bytes, by one instruction that multiplies two 32-bit numbers. In C++ both would be of 64 bits, and
// their product takes three to six instructions; a warp that only copies does little else.
template <class T>
__device__ __forceinline__ T* address_of(T* base, int index, int bytes) {
#ifdef EMULATOR
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + static_cast<long long>(index) * bytes);
#else
    long long offset;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(index), "r"(bytes));
    return reinterpret_cast<T*>(reinterpret_cast<size_t>(base) + offset);
#endif
}

// Begins to copy 16 bytes from global to shared memory, without passing through registers; or 16 zeros, if not `real`.
// Both addresses must be multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real = true) {
#ifdef EMULATOR
    emulator::copy_async(shared, global, real ? 16 : 0);
#else
    unsigned int to = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    asm volatile(
        "{.reg .pred none; setp.eq.s32 none, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, none;}" ::"r"(to),
        "l"(global), "r"(static_cast<int>(real))
        : "memory");
#endif
}

// Makes one group of the thread's copies since the last call (an empty group counts too).
__device__ __forceinline__ void copy_commit() {
#ifdef EMULATOR
    emulator::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most BUT_LAST of the thread's groups are still under way. Other threads' copies need a barrier, too.
template <int BUT_LAST>
__device__ __forceinline__ void copy_wait() {
#ifdef EMULATOR
    emulator::copy_wait(BUT_LAST);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(BUT_LAST) : "memory");
#endif
}

// Loads four blocks of 8 rows x 16 bytes; lane 8 q + r brings the address of row r of block q.
__device__ __forceinline__ void load_matrices(unsigned int (&d)[4], const void* row) {
#ifdef EMULATOR
    emulator::load_matrices(d, row, false);
#else
    unsigned int from = static_cast<unsigned int>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
#endif
}

// The same, each block of 8 x 8 16-bit numbers transposed. There is no such thing for 32-bit numbers.
__device__ __forceinline__ void load_matrices_transposed(unsigned int (&d)[4], const void* row) {
#ifdef EMULATOR
    emulator::load_matrices(d, row, true);
#else
    unsigned int from = static_cast<unsigned int>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
#endif
}

// C += A B on a tensor core, TF32: 8 bits of exponent and 10 of mantissa; the other 13 bits of a float are ignored.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
#ifdef EMULATOR
    emulator::multiply_tf32(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// C += A B on a tensor core, bf16.
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
#ifdef EMULATOR
    emulator::multiply_bf16(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two floats as bf16, each rounded to the nearest (of two equally near ones the even one): `low` in the lower half.
__device__ __forceinline__ unsigned int to_bf16(float low, float high) {
#ifdef EMULATOR
    return emulator::to_bf16(low) | emulator::to_bf16(high) << 16;
#else
    unsigned int both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}
