// Runs kernels on the CPU, so that the same .cu files can be tested where no GPU is: each thread of a block is a fiber,
// warps are stepped lane by lane from one collective to the next, blocks run one after the other.
//
// Stricter than a GPU, on purpose: a collective or a barrier that not every lane reaches fails the launch, and what
// cp.async copies arrives only when it is waited for. TINYCHAT_HOST_ORDER=reverse runs warps from the last to the
// first: a missing barrier then changes the result.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int LANES = 32;
constexpr size_t STACK = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    int bytes;
    int group;
};

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    jmp_buf context;
    State state = State::DONE;
    std::vector<Copy> copies;
    int groups = 0;       // committed so far
    int collectives = 0;  // taken part in so far
};

// What the lanes of a warp show each other; two of them, so that one barrier a collective is enough.
struct Exchange {
    float values[LANES];
    float a[16][16], b[8][16];
};

struct Warp {
    Exchange exchange[2];
};

static std::vector<Fiber*> fibers;
static std::vector<Warp> warps;
static Fiber* self = nullptr;
static jmp_buf scheduler;
static ucontext_t starter;
static const char* failure = nullptr;
static unsigned launches = 0;
static void (*body)(void*) = nullptr;
static void* body_arguments = nullptr;

static void yield(State state) {
    self->state = state;
    if (!_setjmp(self->context)) _longjmp(scheduler, 1);
}

[[noreturn]] static void fail(const char* why) {
    failure = why;
    _longjmp(scheduler, 1);
}

static void live() {
    Fiber* me = self;
    if (!_setjmp(me->context)) setcontext(&starter);
    for (;;) {
        body(body_arguments);
        yield(State::DONE);
    }
}

static Fiber* new_fiber() {
    auto* f = new Fiber;
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, live, 0);
    self = f;
    swapcontext(&starter, &context);
    return f;
}

static void resume(int thread) {
    self = fibers[thread];
    threadIdx.x = thread;
    if (!_setjmp(scheduler)) _longjmp(self->context, 1);
}

static int count(int begin, int end, State state) {
    return static_cast<int>(
        std::count_if(fibers.begin() + begin, fibers.begin() + end, [&](Fiber* f) { return f->state == state; }));
}

static void release(int begin, int end) {
    for (int i = begin; i < end; ++i) fibers[i]->state = State::READY;
}

// Runs a warp until every lane is at a block barrier or done. False: the launch failed.
static bool run_warp(int begin, int end) {
    for (;;) {
        for (int i = begin; i < end; ++i) {
            if (fibers[i]->state == State::READY) resume(i);
            if (failure) return false;
        }
        int waiting = count(begin, end, State::AT_WARP);
        if (!waiting) return true;
        if (waiting != end - begin) {
            failure = "a warp's lanes disagree about a collective";
            return false;
        }
        release(begin, end);
    }
}

static bool run_block(int threads, bool reverse) {
    int n = (threads + LANES - 1) / LANES;
    for (int i = 0; i < threads; ++i) {
        fibers[i]->copies.clear();
        fibers[i]->groups = fibers[i]->collectives = 0;
    }
    release(0, threads);
    for (;;) {
        for (int i = 0; i < n; ++i) {
            int w = reverse ? n - 1 - i : i;
            if (!run_warp(w * LANES, std::min((w + 1) * LANES, threads))) return false;
        }
        int done = count(0, threads, State::DONE);
        if (done == threads) return true;
        if (done) {
            failure = "some threads ended before a barrier";
            return false;
        }
        release(0, threads);
    }
}

// Every block of a launch. Nothing, or why it failed; then every fiber is given up.
static const char* run(void (*f)(void*), void* arguments, dim3 grid, dim3 block) {
    int threads = static_cast<int>(block.x);
    if (block.y != 1 || block.z != 1 || threads > 1024) return "blocks have up to 1024 threads in one dimension";
    while (static_cast<int>(fibers.size()) < threads) fibers.push_back(new_fiber());
    warps.resize((threads + LANES - 1) / LANES);
    ++launches;
    body = f;
    body_arguments = arguments;
    gridDim = grid;
    blockDim = block;
    failure = nullptr;
    const char* order = getenv("TINYCHAT_HOST_ORDER");
    bool reverse = order && !strcmp(order, "reverse");
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                if (!run_block(threads, reverse)) {
                    fibers.clear();
                    return failure;
                }
            }
    return nullptr;
}

// A kernel's function with the arguments that cuLaunchKernel is given: a pointer to each.
template <class... A, size_t... I>
static void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
static void call(void (*kernel)(A...), void** arguments) {
    apply(kernel, arguments, std::index_sequence_for<A...>{});
}

// Bytes of each argument, then 0: what a graph has to remember.
template <class... A>
static const int* sizes(void (*)(A...)) {
    static const int all[] = {sizeof(A)..., 0};
    return all;
}

static unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float float_of(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float half_value(unsigned short bits) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return h;
}

static unsigned short half_bits(float x) {
    _Float16 h = static_cast<_Float16>(x);
    unsigned short bits;
    memcpy(&bits, &h, 2);
    return bits;
}

static Exchange& exchange_place() { return warps[threadIdx.x / LANES].exchange[self->collectives++ % 2]; }

static float exchange(float x, int from) {
    Exchange& e = exchange_place();
    e.values[threadIdx.x % LANES] = x;
    yield(State::AT_WARP);
    return e.values[from];
}

static void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    Exchange& e = exchange_place();
    int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
            e.a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = half_value(static_cast<unsigned short>(a[i] >> 16 * half));
        for (int i = 0; i < 2; ++i)
            e.b[g][2 * t + i * 8 + half] = half_value(static_cast<unsigned short>(b[i] >> 16 * half));
    }
    yield(State::AT_WARP);
    for (int i = 0; i < 4; ++i) {
        const float *row = e.a[g + i / 2 * 8], *column = e.b[2 * t + i % 2];
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
        c[i] += sum;
    }
}

static void copy_async(void* to, const void* from, int bytes) {
    if (reinterpret_cast<size_t>(to) % bytes || reinterpret_cast<size_t>(from) % bytes) fail("a copy is not aligned");
    self->copies.push_back({to, from, bytes, self->groups});
}

static void copy_commit() { ++self->groups; }

static void copy_wait(int under_way) {
    auto& copies = self->copies;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < self->groups - under_way; ++n)
        memcpy(copies[n].to, copies[n].from, copies[n].bytes);
    copies.erase(copies.begin(), copies.begin() + n);
}

}  // namespace host

static void __syncthreads() { host::yield(host::State::AT_BLOCK); }
static void __syncwarp() { host::yield(host::State::AT_WARP); }

// What the emulated driver calls: the launcher that EXPORT made of a kernel, over a grid.
extern "C" const char* host_launch(void (*launcher)(void**), void** arguments, const unsigned* grid,
                                   const unsigned* block) {
    struct Launch {
        void (*launcher)(void**);
        void** arguments;
    } launch{launcher, arguments};
    auto body = [](void* p) { static_cast<Launch*>(p)->launcher(static_cast<Launch*>(p)->arguments); };
    return host::run(body, &launch, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]});
}
