// What kernels are written with: one instruction a helper, and beside it the plain twin that the host emulation runs
// (host.h). No header of CUDA's is needed: a half is a u16, two of them a u32 (the first in the low bits).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef TINYCHAT_HOST
#include "host.h"
#define DEVICE static inline
#define DEVICE_MEMBER
#define EXPORT(kernel)                                                                 \
    extern "C" void host_##kernel(void** arguments) { host::call(kernel, arguments); } \
    extern "C" const int* host_##kernel##_sizes() { return host::sizes(kernel); }
#else
#define DEVICE __device__ __forceinline__
#define DEVICE_MEMBER __device__
#define INFINITY __int_as_float(0x7f800000)
#define EXPORT(kernel)
#endif

constexpr int WARP = 32;
constexpr int SLOTS = 16;  // in a block of the KV cache
constexpr float LARGEST_HALF = 65504.0f;
constexpr double TURN = 6.283185307179586;

DEVICE int lane_id() {
#ifdef TINYCHAT_HOST
    return threadIdx.x % WARP;
#else
    u32 lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));  // nobody has to mask it
    return lane;
#endif
}
DEVICE int warp_id() { return threadIdx.x / WARP; }
DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// From sm_90 on a kernel may start before the one that it follows has ended (driver.py asks for it, wherever a kernel
// follows a kernel). It then waits until all before it have ended and what they wrote is seen; until then it may read
// what no kernel of a step writes: weights. Every thread of every kernel waits, also those with nothing to do: else
// "the one before has ended" would not mean that those before that one have.
DEVICE void let_next_start() {
#if !defined(TINYCHAT_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE void wait_for_kernels() {
#if !defined(TINYCHAT_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The first line of a kernel that can do nothing ahead.
DEVICE void start() {
    let_next_start();
    wait_for_kernels();
}

// Whether copies of what is read once say so (evict-first), so that they push nothing out of L2. Not from sm_90 on:
// ptxas before 13.4 can leave the register unwritten there that such a copy's policy is in (Triton #11660), which is an
// illegal instruction, or bytes at a wrong place. Where the other copies fail as well, kernels are compiled with HINTS
// 0.
#ifndef HINTS
#define HINTS (__CUDA_ARCH__ < 900)
#endif

DEVICE u64 evict_first() {
#ifdef TINYCHAT_HOST
    return 0;
#else
    u64 policy = 0;
    if (HINTS) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#endif
}

// 4, 8 or 16 bytes, through L1: what neighbouring warps read too.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from) {
#ifdef TINYCHAT_HOST
    host::copy_async(to, from, BYTES);
#else
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
#endif
}

// The same of what is read once, to shared memory in the background. 16 bytes go past L1, which smaller ones cannot.
template <int BYTES>
DEVICE void copy_once(void* to, const void* from, [[maybe_unused]] u64 policy) {
#ifdef TINYCHAT_HOST
    host::copy_async(to, from, BYTES);
#else
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    if constexpr (BYTES < 16 && !HINTS) {
        copy_async<BYTES>(to, from);
    } else if constexpr (BYTES < 16) {
        asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                     "n"(BYTES), "l"(policy)
                     : "memory");
    } else if constexpr (HINTS) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                     "l"(policy)
                     : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    }
#endif
}

// The copies of this thread since the last commit are one group; wait until at most N groups are under way.
DEVICE void copy_commit() {
#ifdef TINYCHAT_HOST
    host::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N>
DEVICE void copy_wait() {
#ifdef TINYCHAT_HOST
    host::copy_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

DEVICE u32 bits_of(float x) {
#ifdef TINYCHAT_HOST
    return host::bits_of(x);
#else
    return __float_as_uint(x);
#endif
}

DEVICE float float_of(u32 bits) {
#ifdef TINYCHAT_HOST
    return host::float_of(bits);
#else
    return __uint_as_float(bits);
#endif
}

// Adds to a number that several threads add to, in no particular order; what it was.
DEVICE int add_together(int* to, int n) {
#ifdef TINYCHAT_HOST
    return std::exchange(*to, *to + n);
#else
    return atomicAdd(to, n);
#endif
}

// Rounded to nearest even; what no half can hold becomes the largest one.
DEVICE u16 to_half(float x) {
    x = fminf(fmaxf(x, -LARGEST_HALF), LARGEST_HALF);
#ifdef TINYCHAT_HOST
    return host::half_bits(x);
#else
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#endif
}

DEVICE float to_float(u16 h) {
#ifdef TINYCHAT_HOST
    return host::half_value(h);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#endif
}

DEVICE float low_float(u32 pair) { return to_float(static_cast<u16>(pair)); }
DEVICE float high_float(u32 pair) { return to_float(static_cast<u16>(pair >> 16)); }

// For numbers that are known to fit.
DEVICE u32 to_halves(float low, float high) {
#ifdef TINYCHAT_HOST
    return host::half_bits(low) | static_cast<u32>(host::half_bits(high)) << 16;
#else
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

DEVICE u32 subtract_halves(u32 a, u32 b) {
#ifdef TINYCHAT_HOST
    return to_halves(low_float(a) - low_float(b), high_float(a) - high_float(b));
#else
    u32 d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#endif
}

// a · b + c, rounded once; the twin's is where the product and the sum are exact.
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
#ifdef TINYCHAT_HOST
    return to_halves(fmaf(low_float(a), low_float(b), low_float(c)), fmaf(high_float(a), high_float(b), high_float(c)));
#else
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#endif
}

// (a & b) | c in one instruction, where the compiler makes two of constants.
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
#ifdef TINYCHAT_HOST
    return (a & b) | c;
#else
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#endif
}

DEVICE u32 multiply_halves(u32 a, u32 b) {
#ifdef TINYCHAT_HOST
    return to_halves(low_float(a) * low_float(b), high_float(a) * high_float(b));
#else
    u32 d;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#endif
}

// Four bytes out of the eight of a and b (a's are 0…3), one for each nibble of the selector.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) {
#ifdef TINYCHAT_HOST
    u64 both = static_cast<u64>(b) << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) d |= static_cast<u32>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return d;
#else
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
#endif
}

// Every lane of the warp takes part.
DEVICE float shuffle_xor(float x, int mask) {
#ifdef TINYCHAT_HOST
    return host::exchange(x, (static_cast<int>(threadIdx.x) % WARP) ^ mask);
#else
    return __shfl_xor_sync(~0u, x, mask);
#endif
}

DEVICE u64 shuffle_xor(u64 x, int mask) {
#ifdef TINYCHAT_HOST
    u64 low = bits_of(shuffle_xor(float_of(static_cast<u32>(x)), mask));
    return low | static_cast<u64>(bits_of(shuffle_xor(float_of(static_cast<u32>(x >> 32)), mask))) << 32;
#else
    return __shfl_xor_sync(~0u, x, mask);
#endif
}

DEVICE float warp_sum(float x) {
    for (int mask = WARP / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

DEVICE float warp_max(float x) {
    for (int mask = WARP / 2; mask; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// c += a b for a 16×16 a, a 16×8 b and a 16×8 c, all spread over the warp. With g = lane / 4 and t = lane % 4:
//   a   rows g, g+8, g, g+8, columns 2t, 2t, 2t+8, 2t+8 (and the next: two halves each)
//   b   column g, rows 2t and 2t+8 (and the next)
//   c   row g columns 2t and 2t+1, row g+8 columns 2t and 2t+1
// An element of c takes the same roundings wherever it lies in the tile; row independence stands on that.
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#ifdef TINYCHAT_HOST
    host::mma(c, a0, a1, a2, a3, b0, b1);
#else
    // volatile: all lanes of a warp come here together, so it may not move to where only some of them go
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
