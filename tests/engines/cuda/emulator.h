// A GPU made of C++: compiles the unmodified .cu files of minunet for the CPU and runs them, block after block.
//
// Every CUDA thread of a block is a fiber: a stack of its own, and a place where it goes on. One of them runs at a
// time. It runs until it must wait for others (a barrier, a shuffle, a tensor-core instruction), then a seeded random
// choice takes the next: mostly of the warp that has the highest rank, and ranks are drawn anew at each barrier. So
// some warps run as far ahead of others as the barriers let them, and a kernel that leans on their order gives a wrong
// result under some seed.
//
// Where the hardware would give something undefined, the emulator gives the worst it can:
//  - shared memory is NaN (bytes 0xff) when a block starts;
//  - an asynchronous copy makes its destination NaN at once, and brings the data as late as is allowed: at the wait;
//  - a shuffle from a lane outside of the mask gives NaN;
//  - tensor cores drop the 13 bits that TF32 does not have;
//  - wgmma reads its factors as soon or as late as it may, by chance;
//  - a global buffer ends at a page that may not be touched (emulator.py puts it there).
// What the hardware forbids is an error with the thread's place: threads that meet in different barriers or warp
// instructions, barriers that some threads never reach (deadlock), misaligned or foreign addresses, copies never waited
// for.
//
// What it cannot show: time, the memory model between blocks, preemption between two meeting points (two threads that
// write one word without a barrier in between are seen only through the order of their whole stretches).
//
// emulator.py compiles   -include emulator.h kernel.cu   and adds one call to emulator::run for each kernel.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct Index3 {
    unsigned int x, y, z;
};

// Defined by the linker: where the static __shared__ variables of the kernels lie. (One lies here, so that the section
// exists.)
extern "C" unsigned char __start_emulated_shared[], __stop_emulated_shared[];
static __attribute__((section("emulated_shared"), used)) unsigned char emulated_shared_begin[16];

namespace emulator {

constexpr size_t STACK_BYTES = 128 * 1024, MOST_THREADS = 1024, DYNAMIC_BYTES = 256 * 1024, SLOT_BYTES = 64;

struct Copy {
    void* to;
    const void* from;
    unsigned int bytes;
};  // of a 16-byte asynchronous copy: what is not copied is 0

struct Product {
    float* sum;  // this thread's part
    int fragments;
    unsigned long long a, b;  // descriptors
    bool across;
    int element_bytes;
};  // of wgmma

// Lanes of a warp that meet in one instruction: each leaves its operands, and reads those of the others when all have
// come.
struct Meeting {
    const char* what;
    unsigned int mask, arrived, left;
    alignas(16) unsigned char operands[32][SLOT_BYTES];
};

struct Thread;
struct Named {  // a barrier with a number
    unsigned int count, arrived;
    std::vector<Thread*> waiting;
};

enum State { READY, AT_BARRIER, AT_MEETING, DONE };

struct Thread {
    Index3 index;
    unsigned int lane, warp;
    State state;
    const char* waits_in;  // the name of what it waits for, and the line of the last barrier
    int line;
    bool started;
    jmp_buf place;
    ucontext_t first;
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;  // committed, the oldest first
    std::vector<Product> open_products;    // wgmma: not yet committed
    std::deque<std::vector<Product>> product_groups;
    bool unfenced;  // copies have arrived since the last fence.proxy.async
};

struct Machine {
    Thread threads[MOST_THREADS];
    std::vector<std::vector<Thread*>> ready;    // of each warp
    std::vector<unsigned int> ranks;            // of the warps
    std::vector<std::deque<Meeting>> meetings;  // of each warp: those not yet left by all
    unsigned int count, at_barrier, done;
    int barrier_line;
    Named named[16];
    Index3 block, blocks, size;
    unsigned char* dynamic;  // the shared memory that the launch asked for: its end is the end of what may be touched
    size_t dynamic_bytes;
    unsigned char *stacks, *pool;
    std::mt19937 random;
    jmp_buf scheduler;
    bool failed;
    char message[512];
    uintptr_t fault;  // the address of a forbidden access, 0 if there was none
    void (*body)(void**);
    void** arguments;
    bool unfenced;  // a thread came to a barrier with copies that wgmma may not see yet
    long long row_conflicts;  // ldmatrix: how often two of 8 rows lay in the same banks (each costs a cycle)
};

inline Machine machine;
inline Thread* current;

[[noreturn]] inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char text[400];
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(machine.message, sizeof machine.message, "block %u thread %u: %s", machine.block.x, current->index.x,
             text);
    machine.failed = true;
    _longjmp(machine.scheduler, 1);  // the fibers are left where they are: they own nothing
}

inline void to_scheduler() {
    if (_setjmp(current->place) == 0) _longjmp(machine.scheduler, 1);
}

inline void make_ready(Thread& thread) {
    thread.state = READY;
    machine.ready[thread.warp].push_back(&thread);
}

inline void draw_ranks() {
    for (unsigned int& rank : machine.ranks) rank = machine.random();
}

// The thread to run next, taken out of its list; null if none is ready.
inline Thread* choose() {
    unsigned int warps = machine.ready.size(), best = warps, start = machine.random() % warps;
    bool any = machine.random() % 8 == 0;  // now and then not the first in rank
    for (unsigned int i = 0; i < warps; ++i) {
        unsigned int warp = (start + i) % warps;
        if (machine.ready[warp].empty()) continue;
        if (best == warps || (!any && machine.ranks[warp] > machine.ranks[best])) best = warp;
    }
    if (best == warps) return nullptr;
    std::vector<Thread*>& lanes = machine.ready[best];
    std::swap(lanes[machine.random() % lanes.size()], lanes.back());
    Thread* chosen = lanes.back();
    lanes.pop_back();
    return chosen;
}

// __syncthreads. All threads of the block must come, to the same line of the source.
inline void barrier(int line) {
    if (machine.at_barrier == 0) machine.barrier_line = line;
    if (machine.barrier_line != line)
        fail("__syncthreads in line %d while others wait in line %d", line, machine.barrier_line);
    machine.unfenced |= current->unfenced;
    current->state = AT_BARRIER;
    current->waits_in = "__syncthreads";
    current->line = line;
    if (++machine.at_barrier == machine.count) {
        machine.at_barrier = 0;
        draw_ranks();
        for (unsigned int t = 0; t < machine.count; ++t) make_ready(machine.threads[t]);
    }
    to_scheduler();
}

// bar.sync and bar.arrive on a barrier with a number: `count` threads must come, and those that wait go on when all have.
inline void named_barrier(int number, unsigned int count, bool waits) {
    if (number < 1 || number > 15) fail("barrier %d: there are 1 to 15", number);
    machine.unfenced |= current->unfenced;
    Named& barrier = machine.named[number];
    if (barrier.arrived > 0 && barrier.count != count) fail("barrier %d: %u and %u threads", number, barrier.count, count);
    barrier.count = count;
    if (waits) barrier.waiting.push_back(current);
    current->state = AT_BARRIER;
    current->waits_in = "a named barrier";
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        draw_ranks();
        for (Thread* thread : barrier.waiting)
            if (thread != current) make_ready(*thread);
        barrier.waiting.clear();
        waits = false;
    }
    if (!waits) make_ready(*current);
    to_scheduler();
}

// Waits for the lanes of `mask`, then gives the operands of all of them to `read`.
template <class Operands, class Read>
inline void meet(const char* what, unsigned int mask, const Operands& mine, Read read) {
    static_assert(sizeof(Operands) <= SLOT_BYTES);
    unsigned int bit = 1u << current->lane;
    if (!(mask & bit)) fail("%s: lane %u is not in its own mask %08x", what, current->lane, mask);
    std::deque<Meeting>& open = machine.meetings[current->warp];
    Meeting* meeting = nullptr;
    for (Meeting& candidate : open)
        if (candidate.mask == mask && candidate.arrived != mask) meeting = &candidate;
    if (!meeting) {
        open.push_back({what, mask, 0, 0, {}});
        meeting = &open.back();
        memset(meeting->operands, 0xff, sizeof meeting->operands);
    }
    if (meeting->what != what && strcmp(meeting->what, what)) fail("lanes of one warp meet in %s and in %s", meeting->what, what);
    memcpy(meeting->operands[current->lane], &mine, sizeof mine);
    meeting->arrived |= bit;
    current->state = AT_MEETING;
    current->waits_in = what;
    if (meeting->arrived == mask)
        for (unsigned int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) make_ready(machine.threads[32 * current->warp + lane]);
    to_scheduler();
    read([meeting](unsigned int lane) -> const Operands& {
        return *reinterpret_cast<const Operands*>(meeting->operands[lane & 31]);
    });
    meeting->left |= bit;
    while (!open.empty() && open.front().left == open.front().mask) open.pop_front();
}

template <class T>
inline T shuffle(const char* what, unsigned int mask, T value, unsigned int source) {
    T result;
    meet(what, mask, value, [&](auto lane) { result = lane(source); });
    return result;
}

inline unsigned char* dynamic_shared() { return machine.dynamic; }

inline bool is_shared(const void* address, size_t bytes) {
    const unsigned char* at = static_cast<const unsigned char*>(address);
    return (at >= machine.dynamic && at + bytes <= machine.dynamic + machine.dynamic_bytes) ||
           (at >= __start_emulated_shared && at + bytes <= __stop_emulated_shared);
}

// --- the PTX instructions of ptx.cuh ---

inline void copy_async(void* shared, const void* global, unsigned int bytes) {
    if (!is_shared(shared, 16)) fail("cp.async to an address outside of shared memory");
    if (reinterpret_cast<uintptr_t>(shared) % 16 || (bytes && reinterpret_cast<uintptr_t>(global) % 16))
        fail("cp.async from or to an address that is no multiple of 16");
    if (bytes > 16) fail("cp.async of %u bytes", bytes);
    memset(shared, 0xff, 16);
    current->uncommitted.push_back({shared, global, bytes});
}

inline void copy_commit() {
    current->groups.push_back(std::move(current->uncommitted));
    current->uncommitted.clear();
}

inline void copy_wait(int but_last) {
    while (static_cast<int>(current->groups.size()) > but_last) {
        for (const Copy& copy : current->groups.front()) {
            unsigned char bytes[16] = {};
            memcpy(bytes, copy.from, copy.bytes);
            memcpy(copy.to, bytes, 16);
            current->unfenced = true;
        }
        current->groups.pop_front();
    }
}

// ldmatrix.x4 on four matrices of 8 rows of 16 bytes; lane 8 q + r brings the address of row r of matrix q.
inline void load_matrices(unsigned int (&d)[4], const void* row, bool transposed) {
    if (!is_shared(row, 16)) fail("ldmatrix from an address outside of shared memory");
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is no multiple of 16");
    unsigned int lane = current->lane;
    meet(transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, row, [&](auto of) {
        for (unsigned int q = 0; q < 4; ++q) {
            if (!transposed) {
                memcpy(&d[q], static_cast<const unsigned char*>(of(8 * q + lane / 4)) + 4 * (lane % 4), 4);
            } else {
                unsigned short low, high;
                memcpy(&low, static_cast<const unsigned char*>(of(8 * q + 2 * (lane % 4))) + 2 * (lane / 4), 2);
                memcpy(&high, static_cast<const unsigned char*>(of(8 * q + 2 * (lane % 4) + 1)) + 2 * (lane / 4), 2);
                d[q] = low | static_cast<unsigned int>(high) << 16;
            }
        }
        if (lane == 0)  // 32 banks of 4 bytes: the 16 bytes of a row fill four of them, and 8 rows should fill all 32
            for (unsigned int q = 0; q < 4; ++q)
                for (unsigned int r = 0; r < 8; ++r)
                    for (unsigned int s = 0; s < r; ++s) {
                        uintptr_t a = reinterpret_cast<uintptr_t>(of(8 * q + r)),
                                  b = reinterpret_cast<uintptr_t>(of(8 * q + s));
                        machine.row_conflicts += a != b && a / 16 % 8 == b / 16 % 8;
                    }
    });
}

inline float tf32(unsigned int bits) {
    bits &= 0xffffe000u;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float bf16(unsigned int bits) {
    bits <<= 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline unsigned int to_bf16(float x) {
    unsigned int bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Fragments {
    unsigned int a[4], b[2];
};

// mma.m16n8k8 (TF32). With g = lane / 4 and t = lane % 4, a lane holds of A (16 x 8) the elements (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4), of B (8 x 8) the elements (t, g), (t + 4, g), and of C (16 x 8) (g, 2t), (g, 2t + 1), (g
// + 8, 2t), (g + 8, 2t + 1).
inline void multiply_tf32(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
    Fragments mine;
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    unsigned int g = current->lane / 4, t = current->lane % 4;
    meet("mma.tf32", ~0u, mine, [&](auto of) {
        for (unsigned int k = 0; k < 8; ++k) {
            const unsigned int* of_a = of(4 * g + k % 4).a + k / 4 * 2;
            const float left[2] = {tf32(of_a[0]), tf32(of_a[1])};
            const float right[2] = {tf32(of(8 * t + k % 4).b[k / 4]), tf32(of(8 * t + 4 + k % 4).b[k / 4])};
            for (unsigned int i = 0; i < 4; ++i) c[i] += left[i / 2] * right[i % 2];
        }
    });
}

// mma.m16n8k16 (bf16): as above with k = 16; a register holds two neighbours in k, the first in its low half:
// of A (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), of B (2t.., g), (2t + 8.., g).
inline void multiply_bf16(float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
    Fragments mine;
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    unsigned int g = current->lane / 4, t = current->lane % 4;
    meet("mma.bf16", ~0u, mine, [&](auto of) {
        for (unsigned int k = 0; k < 16; ++k) {
            const unsigned int half = 16 * (k % 2), holder = k % 8 / 2;
            const unsigned int* of_a = of(4 * g + holder).a + k / 8 * 2;
            const float left[2] = {bf16(of_a[0] >> half & 0xffff), bf16(of_a[1] >> half & 0xffff)};
            const float right[2] = {bf16(of(8 * t + holder).b[k / 8] >> half & 0xffff),
                                    bf16(of(8 * t + 4 + holder).b[k / 8] >> half & 0xffff)};
            for (unsigned int i = 0; i < 4; ++i) c[i] += left[i / 2] * right[i % 2];
        }
    });
}

// --- wgmma: the instructions of wgmma.cuh ---

// Where in shared memory: an address of a descriptor has 18 bits.
inline unsigned long long shared_address(const void* address) {
    if (!is_shared(address, 16)) fail("a matrix outside of shared memory");
    return static_cast<const unsigned char*>(address) - machine.pool;
}

// Element (row, k) of a matrix, see wgmma.cuh.
inline float matrix_element(unsigned long long m, int row, int k, bool across, int element_bytes) {
    const int part = 16 / element_bytes;  // elements in 16 bytes
    const size_t first = (m & 0x3fff) << 4, sum = (m >> 16 & 0x3fff) << 4, rows = (m >> 32 & 0x3fff) << 4;
    const size_t place = across ? first + row / part * rows + k / 8 * sum + k % 8 * 16 + row % part * element_bytes
                                : first + row / 8 * rows + k / part * sum + row % 8 * 16 + k % part * element_bytes;
    const unsigned char* at = machine.pool + place;
    if (!is_shared(at, element_bytes)) fail("wgmma reads outside of shared memory");
    unsigned int bits = 0;
    memcpy(&bits, at, element_bytes);
    return element_bytes == 2 ? bf16(bits) : tf32(bits);
}

// This thread's part of a product: rows 16 w + g and 8 more, of each 8 columns 2 t and 2 t + 1.
inline void compute(const Product& p) {
    const int row = current->warp % 4 * 16 + current->lane / 4, column = current->lane % 4 * 2;
    for (int k = 0; k < 32 / p.element_bytes; ++k) {
        const float upper = matrix_element(p.a, row, k, p.across, p.element_bytes);
        const float lower = matrix_element(p.a, row + 8, k, p.across, p.element_bytes);
        for (int f = 0; f < p.fragments; ++f)
            for (int i = 0; i < 2; ++i) {
                const float right = matrix_element(p.b, 8 * f + column + i, k, p.across, p.element_bytes);
                p.sum[4 * f + i] += upper * right;
                p.sum[4 * f + 2 + i] += lower * right;
            }
    }
}

// The hardware reads the factors at some moment between here and the wait: the emulator at once, or at the wait.
inline void multiply_group(float* sum, int fragments, unsigned long long a, unsigned long long b, bool across,
                           int element_bytes) {
    if (machine.unfenced) fail("wgmma reads what copies have brought without fence.proxy.async");
    if (across && element_bytes != 2) fail("wgmma: factors of 4 bytes must be K-major");
    const std::pair<unsigned long long, unsigned long long> mine{a, b};
    meet("wgmma", ~0u, mine, [&](auto of) {
        if (of(0) != mine) fail("wgmma: lanes of one warp name different matrices");
    });
    const Product product = {sum, fragments, a, b, across, element_bytes};
    if (machine.random() % 2) compute(product);
    else current->open_products.push_back(product);
}

inline void products_commit() {
    current->product_groups.push_back(std::move(current->open_products));
    current->open_products.clear();
}

inline void products_wait(int but_last) {
    while (static_cast<int>(current->product_groups.size()) > but_last) {
        for (const Product& product : current->product_groups.front()) compute(product);
        current->product_groups.pop_front();
    }
}

inline void fence_proxy() { current->unfenced = false; }

// --- a launch ---

inline void fiber() {
    machine.body(machine.arguments);
    if (!current->uncommitted.empty()) fail("the thread ends with copies that it never committed");
    for (auto& group : current->groups)
        if (!group.empty()) fail("the thread ends with copies that it never waited for");
    if (!current->open_products.empty()) fail("the thread ends with products that it never committed");
    for (auto& group : current->product_groups)
        if (!group.empty()) fail("the thread ends with products that it never waited for");
    current->state = DONE;
    machine.done++;
    _longjmp(machine.scheduler, 1);
}

inline void forbidden_access(int, siginfo_t* info, void*) {
    machine.fault = reinterpret_cast<uintptr_t>(info->si_addr);
    snprintf(machine.message, sizeof machine.message, "block %u thread %u: access to forbidden memory", machine.block.x,
             current->index.x);
    machine.failed = true;
    _longjmp(machine.scheduler, 1);
}

inline void run_block() {
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    memset(machine.pool, 0xff, DYNAMIC_BYTES);
    machine.ready.assign((machine.count + 31) / 32, {});
    machine.ranks.resize(machine.ready.size());
    draw_ranks();
    machine.meetings.assign((machine.count + 31) / 32, {});
    machine.at_barrier = machine.done = 0;
    machine.unfenced = false;
    for (Named& barrier : machine.named) barrier = {};
    for (unsigned int t = 0; t < machine.count; ++t) {
        Thread& thread = machine.threads[t];
        thread.index = {t, 0, 0};
        thread.lane = t % 32;
        thread.warp = t / 32;
        thread.started = false;
        thread.uncommitted.clear();
        thread.groups.clear();
        thread.open_products.clear();
        thread.product_groups.clear();
        thread.unfenced = false;
        make_ready(thread);
    }
    while (Thread* chosen = choose()) {
        current = chosen;
        if (_setjmp(machine.scheduler) == 0) {
            if (current->started) _longjmp(current->place, 1);
            current->started = true;
            getcontext(&current->first);
            current->first.uc_stack.ss_sp = machine.stacks + STACK_BYTES * current->index.x;
            current->first.uc_stack.ss_size = STACK_BYTES;
            current->first.uc_link = nullptr;
            makecontext(&current->first, fiber, 0);
            setcontext(&current->first);
        }
        if (machine.failed) return;
    }
    if (machine.done < machine.count) {
        unsigned int t = 0;
        while (machine.threads[t].state == DONE) ++t;
        current = &machine.threads[t];
        snprintf(machine.message, sizeof machine.message,
                 "block %u thread %u: deadlock: it waits in %s, %u threads wait in __syncthreads, %u have ended",
                 machine.block.x, t, current->waits_in, machine.at_barrier, machine.done);
        machine.failed = true;
    }
}

// One letter an argument, so that emulator.py can check what it passes: the GPU's driver would not.
template <class T>
constexpr char letter() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_same_v<T, float>) return 'f';
    if (std::is_same_v<T, double>) return 'd';
    return sizeof(T) == 8 ? 'l' : sizeof(T) == 4 ? 'i' : '?';
}

template <auto kernel, class... A, size_t... I>
void call(void (*)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <auto kernel, class... A>
void call_all(void (*function)(A...), void** arguments) {
    call<kernel>(function, arguments, std::index_sequence_for<A...>());
}

template <class... A>
bool fits(void (*)(A...), const char* letters) {
    const char expected[] = {letter<A>()..., 0};
    if (!strcmp(expected, letters)) return true;
    snprintf(machine.message, sizeof machine.message, "the kernel takes arguments %s, got %s", expected, letters);
    return false;
}

// Runs `kernel` over `blocks` blocks of `threads` threads. Returns 0, or 1 with a message.
template <auto kernel>
int run(unsigned int blocks, unsigned int threads, size_t shared, unsigned int seed, const char* letters,
        void** arguments) {
    machine.fault = 0;
    machine.failed = false;
    machine.row_conflicts = 0;
    if (!fits(kernel, letters)) return 1;
    if (blocks < 1 || threads < 1 || threads > MOST_THREADS || shared > 227 * 1024) {
        snprintf(machine.message, sizeof machine.message,
                 "no GPU launches %u blocks of %u threads with %zu bytes of shared memory", blocks, threads, shared);
        return 1;
    }
    if (!machine.stacks) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        machine.stacks = static_cast<unsigned char*>(
            mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE, flags, -1, 0));
        machine.pool =
            static_cast<unsigned char*>(mmap(nullptr, DYNAMIC_BYTES + 4096, PROT_READ | PROT_WRITE, flags, -1, 0));
        mprotect(machine.pool + DYNAMIC_BYTES, 4096, PROT_NONE);
    }
    machine.dynamic_bytes = (shared + 15) / 16 * 16;
    machine.dynamic = machine.pool + DYNAMIC_BYTES - machine.dynamic_bytes;
    machine.body = [](void** all) { call_all<kernel>(kernel, all); };
    machine.arguments = arguments;
    machine.count = threads;
    machine.blocks = {blocks, 1, 1};
    machine.size = {threads, 1, 1};
    machine.random.seed(seed);

    // A forbidden access ends the launch and not Python. The handler has a stack of its own, since a fiber's may be the
    // cause.
    static unsigned char handler_stack[64 * 1024];
    stack_t own{}, former_stack{};
    own.ss_sp = handler_stack;
    own.ss_size = sizeof handler_stack;
    sigaltstack(&own, &former_stack);
    struct sigaction action{}, former{}, former_bus{};
    action.sa_sigaction = forbidden_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &former);
    sigaction(SIGBUS, &action, &former_bus);

    // Blocks in random order too: no block may wait for another.
    std::vector<unsigned int> order(blocks);
    for (unsigned int b = 0; b < blocks; ++b) order[b] = b;
    for (unsigned int b = blocks; b > 1; --b) std::swap(order[b - 1], order[machine.random() % b]);
    for (unsigned int b : order) {
        machine.block = {b, 0, 0};
        run_block();
        if (machine.failed) break;
    }
    sigaction(SIGSEGV, &former, nullptr);
    sigaction(SIGBUS, &former_bus, nullptr);
    sigaltstack(&former_stack, nullptr);
    return machine.failed;
}

}  // namespace emulator

extern "C" const char* emulator_message() { return emulator::machine.message; }
extern "C" uintptr_t emulator_fault() { return emulator::machine.fault; }
extern "C" long long emulator_row_conflicts() { return emulator::machine.row_conflicts; }

// --- the words of CUDA ---

#define EMULATOR
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::machine.block)
#define blockDim (emulator::machine.size)
#define gridDim (emulator::machine.blocks)
#define __syncthreads() emulator::barrier(__LINE__)

inline void __syncwarp(unsigned int mask = ~0u) {
    emulator::meet("__syncwarp", mask, 0, [](auto) {});
}
template <class T>
T __shfl_xor_sync(unsigned int mask, T value, int bits) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::current->lane ^ bits);
}
template <class T>
T __shfl_sync(unsigned int mask, T value, int lane) {
    return emulator::shuffle("__shfl_sync", mask, value, lane);
}
template <class T>
T __shfl_down_sync(unsigned int mask, T value, int by) {
    unsigned int lane = emulator::current->lane;
    return emulator::shuffle("__shfl_down_sync", mask, value, lane + by < 32 ? lane + by : lane);
}
inline float __uint_as_float(unsigned int bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline unsigned int __float_as_uint(float f) {
    unsigned int bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline void sincospif(float x, float* sine, float* cosine) {
    *sine = static_cast<float>(sin(x * M_PI));
    *cosine = static_cast<float>(cos(x * M_PI));
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
