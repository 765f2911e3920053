// Who works on what, in the kernels that treat each channel by itself. A thread has a part of a pixel, V channels; of
// the 256 threads of a block `wide` neighbours have the parts of one pixel (or of a tile of them, if there are more
// than 256), so that there are threads for `groups` pixels at a time.
#pragma once
#include "element.cuh"

constexpr int THREADS = 256;

struct Worker {
    int part;                 // of the pixel: V channels
    int first, step;          // the pixels first, first + step, ...
    int wide, group, groups;  // this thread is the group-th of `groups` threads of the block that have this part
    int row, rows;            // this block is the row-th of `rows` blocks that have this part
    bool active;
};

__device__ __forceinline__ Worker worker(int parts) {
    const int wide = min(parts, THREADS), groups = THREADS / wide, tiles = (parts + wide - 1) / wide;
    Worker w;
    w.group = threadIdx.x / wide;
    w.wide = wide;
    w.groups = groups;
    w.row = blockIdx.x / tiles;
    w.rows = gridDim.x / tiles;
    w.part = blockIdx.x % tiles * wide + threadIdx.x % wide;
    w.first = w.row * groups + w.group;
    w.step = w.rows * groups;
    w.active = w.group < groups && w.part < parts;
    return w;
}

// Adds value[i] over the threads of the block that have the same part, in a fixed order; the first of them, group 0,
// gets the sum. All threads of the block must call it. scratch: THREADS floats of shared memory.
template <int COUNT>
__device__ __forceinline__ void sum_over_groups(float (&value)[COUNT], const Worker& w, float* scratch) {
    const int wide = w.wide;
#pragma unroll  // registers have no index: the compiler must know which one each turn takes
    for (int i = 0; i < COUNT; ++i) {
        scratch[threadIdx.x] = value[i];
        __syncthreads();
        if (w.active && w.group == 0)
#pragma unroll 4
            for (int g = 1; g < w.groups; ++g) value[i] += scratch[threadIdx.x + g * wide];
        __syncthreads();
    }
}
