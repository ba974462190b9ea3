// What tests/ptx.py's translation of compiled kernels runs on: PTX instructions over raw registers. Semantics:
// "Parallel Thread Execution ISA", chapter 9. Memory and what threads do together are in ptx.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;

// Registers hold bits; an instruction's type says what they mean.
template <class To, class From>
To as(From bits) {
    if constexpr (std::is_integral_v<To>) {
        return static_cast<To>(bits);
    } else {
        std::conditional_t<sizeof(To) == 2, u16, std::conditional_t<sizeof(To) == 4, u32, u64>> raw = bits;
        To x;
        memcpy(&x, &raw, sizeof x);
        return x;
    }
}

// Numbers that are narrower than the register are extended as their type says.
template <class T, class Register>
void set(Register& to, T value) {
    static_assert(sizeof(T) <= sizeof(Register), "a register is too narrow");
    if constexpr (std::is_integral_v<T>) {
        to = static_cast<Register>(value);
    } else {
        std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>> raw;
        memcpy(&raw, &value, sizeof raw);
        to = raw;
    }
}

template <class T>
T parameter(const void* argument, int offset) {
    T x;
    memcpy(&x, static_cast<const u8*>(argument) + offset, sizeof x);
    return x;
}

// ---- ptx.cpp

enum class Access { READ, WRITE, ATOMIC };
using Find = bool (*)(u64 address, u64* begin, u64* end);

void begin(int most_threads, bool overlaps);  // called by every thread before the kernel's first instruction
void end(int line);                           // and before it returns
void wait_for_kernels();
u32 tid(int axis), ntid(int axis), ctaid(int axis), nctaid(int axis);
[[noreturn]] void fail(const char* what, int line);

u8* global(u64 address, unsigned bytes, Access, int line);
u8* in_shared(u64 address, unsigned bytes, Access, int line);
u32 atomic_add_shared(u64 address, u32 n, int line);
bool own_memory(const void* table, u64 bytes);

void barrier();
void warp_barrier(u32 lanes, int line);
u32 shuffle_xor(u32 x, u32 mask, u32 clamp, u32 lanes, int line);
void mma_m16n8k16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const f32 (&c)[4]);
void copy_async(u64 to, u64 from, int bytes, bool only_l2, int line);
void copy_commit();
void copy_wait(int under_way);

template <class T, int N>
void load_global(T (&to)[N], u64 address, int line) {
    memcpy(to, global(address, sizeof to, Access::READ, line), sizeof to);
}
template <class T, int N>
void store_global(const T (&from)[N], u64 address, int line) {
    memcpy(global(address, sizeof from, Access::WRITE, line), from, sizeof from);
}
template <class T, int N>
void load_shared(T (&to)[N], u64 address, int line) {
    memcpy(to, in_shared(address, sizeof to, Access::READ, line), sizeof to);
}
template <class T, int N>
void store_shared(const T (&from)[N], u64 address, int line) {
    memcpy(in_shared(address, sizeof from, Access::WRITE, line), from, sizeof from);
}
// A thread's own stack: nobody else knows its address.
template <class T, int N>
void load_local(T (&to)[N], u64 address, int) {
    memcpy(to, reinterpret_cast<void*>(address), sizeof to);
}
template <class T, int N>
void store_local(const T (&from)[N], u64 address, int) {
    memcpy(reinterpret_cast<void*>(address), from, sizeof from);
}

static f32 half_of(u32 pair, int high) { return as<f16>(static_cast<u16>(pair >> 16 * high)); }

// ---- arithmetic that C++ has no operator for

template <class T>
T shift_left(T x, u32 n) {
    return n >= sizeof(T) * 8 ? 0 : static_cast<T>(x << n);
}
template <class T>
T shift_right(T x, u32 n) {
    return n >= sizeof(T) * 8 ? (x < 0 ? static_cast<T>(-1) : 0) : static_cast<T>(x >> n);
}
// The upper word of (high, low), shifted left by up to 31.
static u32 funnel_left(u32 low, u32 high, u32 n) { return static_cast<u32>((u64(high) << 32 | low) << (n & 31) >> 32); }
template <class T>
T divide(T a, T b, int line) {
    if (!b) fail("division by zero", line);
    return a / b;
}
template <class T>
T remainder(T a, T b, int line) {
    if (!b) fail("division by zero", line);
    return a % b;
}
template <class T>
T insert_bits(T a, T b, u32 at, u32 n) {
    for (u32 i = 0; i < n && at + i < sizeof(T) * 8; ++i)
        b = static_cast<T>((b & ~(T(1) << (at + i))) | (a >> i & 1) << (at + i));
    return b;
}
// Each bit of three words, by a table of eight bits.
static u32 logic(u32 a, u32 b, u32 c, u32 table) {
    u32 d = 0;
    for (int i = 0; i < 32; ++i) d |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
    return d;
}
static u32 permute(u32 a, u32 b, u32 selector) {
    const u8 bytes[] = {u8(a), u8(a >> 8), u8(a >> 16), u8(a >> 24), u8(b), u8(b >> 8), u8(b >> 16), u8(b >> 24)};
    u32 d = 0;
    for (int i = 0; i < 4; ++i) {
        u8 x = bytes[selector >> 4 * i & 7];
        if (selector >> 4 * i & 8) x = x & 0x80 ? 0xff : 0;  // its sign, eight times
        d |= u32(x) << 8 * i;
    }
    return d;
}
template <class T>
T larger(T a, T b) {
    if constexpr (std::is_integral_v<T>) return a > b ? a : b;
    return std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
T smaller(T a, T b) {
    if constexpr (std::is_integral_v<T>) return a < b ? a : b;
    return std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
static f32 flushed(f32 x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
static f32 exp2_approx(f32 x) { return flushed(std::exp2(flushed(x))); }
static f32 reciprocal_approx(f32 x) { return flushed(1 / flushed(x)); }
static f32 fma_down(f32 a, f32 b, f32 c) {
    long double exact = static_cast<long double>(a) * b + c;
    f32 x = static_cast<f32>(exact);
    return x > exact ? std::nextafter(x, -INFINITY) : x;
}
static f32 saturated(f32 x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN: 0
static s32 to_int(f32 x) {
    return std::isnan(x) ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : static_cast<s32>(x);
}
static f32 add(f32 a, f32 b) { return a + b; }
static f32 sub(f32 a, f32 b) { return a - b; }
static f32 mul(f32 a, f32 b) { return a * b; }
// Sums and products of two halves are exact in fp32 (or round once more without harm), then round to nearest even.
static u32 of_pair(f32 (*f)(f32, f32), u32 a, u32 b) {
    u32 d = 0;
    for (int high = 0; high < 2; ++high) {
        u16 raw;
        set(raw, static_cast<f16>(f(half_of(a, high), half_of(b, high))));
        d |= u32(raw) << 16 * high;
    }
    return d;
}
// The product of two halves is exact in fp64, and so is its sum with a third: rounded once.
static u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int high = 0; high < 2; ++high) {
        f64 sum = static_cast<f64>(half_of(a, high)) * half_of(b, high) + half_of(c, high);
        u16 raw;
        set(raw, static_cast<f16>(sum));
        d |= u32(raw) << 16 * high;
    }
    return d;
}
static u32 pack_halves(f32 high, f32 low) {
    u16 h, l;
    set(h, static_cast<f16>(high));
    set(l, static_cast<f16>(low));
    return u32(h) << 16 | l;
}

}  // namespace ptx
