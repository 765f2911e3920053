// Bulk copies: one thread asks for many bytes, and Hopper's copy engine brings them to shared memory by itself.
//
// The asynchronous copies of ptx.cuh are the threads' own: 16 bytes for each lane of an instruction, and the address of
// each has to be worked out. A bulk copy of some kilobytes costs one thread one instruction.
//
// Who waits for it waits at a barrier in shared memory (an "mbarrier"), which counts bytes: the asking thread says how
// many will come, the engine counts them down, and at zero the barrier changes its phase: 0, 1, 0, ... A waiting thread
// names the phase that it wants to see ended. Source: PTX ISA, "mbarrier" and "cp.async.bulk".
#pragma once
#include "ptx.cuh"

typedef unsigned long long Arrival;  // such a barrier

#ifndef EMULATOR
__device__ __forceinline__ unsigned int shared_place(const void* address) {
    return static_cast<unsigned int>(__cvta_generic_to_shared(address));
}
#endif

// To be called by one thread, before a __syncthreads.
__device__ __forceinline__ void arrival_init(Arrival* arrival) {
#ifdef EMULATOR
    emulator::arrival_init(arrival);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_place(arrival)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine sees it, too
#endif
}

// So many bytes will come before this phase ends.
__device__ __forceinline__ void arrival_expect(Arrival* arrival, int bytes) {
#ifdef EMULATOR
    emulator::arrival_expect(arrival, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_place(arrival)), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void arrival_wait(Arrival* arrival, int phase) {
#ifdef EMULATOR
    emulator::arrival_wait(arrival, phase);
#else
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(shared_place(arrival)),
        "r"(phase)
        : "memory");
#endif
}

// Begins to copy: addresses and bytes are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, Arrival* arrival) {
#ifdef EMULATOR
    emulator::copy_bulk(shared, global, bytes, arrival);
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_place(shared)),
                 "l"(global), "r"(bytes), "r"(shared_place(arrival))
                 : "memory");
#endif
}
