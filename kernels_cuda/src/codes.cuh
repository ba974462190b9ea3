// From codes as they lie in memory (layout.cuh) to exact halves for the tensor cores.
#pragma once

#include "layout.cuh"

constexpr u32 EACH = 0x10001;            // 1 in both halves of a word
constexpr u32 HALF_1024 = 0x6400;        // 1024 + n as a half has n in its lowest bits, for n up to 1023
constexpr u32 HALF_512 = 0x6000;         // and 512 + n / 2
constexpr u32 HALF_256 = 0x5c00;         // 256
constexpr u32 HALF_SIXTEENTH = 0x2c00;   // 1 / 16
constexpr u32 MINUS_64 = 0xd400;         // −64 − n / 16 as a half has n in its lowest bits, for n up to 1023
constexpr int SMALL = BITS < 4 ? 2 : 4;  // bits of a code in the first of two planes
constexpr u32 LESS = BITS <= 8 && DECODED == Decoding::SIGNED ? 1 << (BITS - 1) % 8 : 0;

// A lane's words of a stage.
struct Codes {
    u32 low[LOW / 4], high[HIGH ? HIGH / 4 : 1];
};

constexpr int LOW_COPY = LOW < 16 ? LOW : 16;  // bytes that a lane reads at once

// A stage to shared memory, in the background. low, high: the lane's first bytes in each plane.
DEVICE void fetch_codes(u8* to, const u8* low, const u8* high, u64 policy) {
    int lane = lane_id();
#pragma unroll
    for (int i = 0; i < LOW / LOW_COPY; ++i)
        copy_once<LOW_COPY>(to + lane * LOW_COPY + i * WARP * LOW_COPY, low + i * WARP * LOW_COPY, policy);
    if constexpr (HIGH > 0) copy_once<HIGH>(to + lane * HIGH + LOW * WARP, high, policy);
}

// The lane's part of a stage, from shared or global memory.
DEVICE void read_codes(const u8* stage, Codes& c) {
    int lane = lane_id();
    if constexpr (LOW >= 16) {
        auto* vectors = reinterpret_cast<const uint4*>(stage) + lane;
#pragma unroll
        for (int i = 0; i < LOW / 16; ++i) {
            uint4 v = vectors[i * WARP];
            c.low[4 * i] = v.x, c.low[4 * i + 1] = v.y, c.low[4 * i + 2] = v.z, c.low[4 * i + 3] = v.w;
        }
    } else {
        uint2 v = reinterpret_cast<const uint2*>(stage)[lane];
        c.low[0] = v.x, c.low[1] = v.y;
    }
    const u8* high = stage + LOW * WARP;
    if constexpr (HIGH == 8) {
        uint2 v = reinterpret_cast<const uint2*>(high)[lane];
        c.high[0] = v.x, c.high[1] = v.y;
    } else if constexpr (HIGH == 4) {
        c.high[0] = reinterpret_cast<const u32*>(high)[lane];
    }
}

DEVICE u32 shifted(u32 x, int right) { return right >= 0 ? x >> right : x << -right; }

// Codes of up to 6 bits plus 1024, inputs 2i and 2i + 1 of the lane's eight of a chunk: half 0 of output g, 1 of g + 8.
DEVICE u32 code_pair(const Codes& c, int chunk, int half, int i) {
    constexpr u32 BASE = HALF_1024 * EACH;
    if constexpr (SMALL == 2) {
        u32 code = and_or(c.low[chunk] >> (8 * half + 2 * i), 3 * EACH, BASE);
        if constexpr (HIGH == 4) code = and_or(shifted(c.high[0], 8 * chunk + 4 * half + i - SMALL), 4 * EACH, code);
        return code;
    } else {
        u32 code = and_or(c.low[2 * chunk + half] >> 4 * i, 15 * EACH, BASE);
        if constexpr (HIGH == 4) code = and_or(shifted(c.high[0], 8 * chunk + 4 * half + i - SMALL), 16 * EACH, code);
        if constexpr (HIGH == 8) code = and_or(shifted(c.high[chunk], 8 * half + 2 * i - SMALL), 48 * EACH, code);
        return code;
    }
}

// A byte of a table for each of four codes, the nibbles of the lower half of `codes`.
template <u32 A, u32 B, u32 C, u32 D>
DEVICE u32 look_up(u32 codes) {
    u32 place = codes & 0x7777;
    return pick_bytes(pick_bytes(A, B, place), pick_bytes(C, D, place), 0x3210 | (codes >> 1 & 0x4444));
}

// Values of tables + 128; E2M1's are doubled.
DEVICE u32 table_bytes(u32 codes) {
    if constexpr (DECODED == Decoding::IQ4_NL)
        return look_up<0x3f2d1801, 0x766a5d4f, 0xa6998d81, 0xf1d9c5b5>(codes);
    else
        return look_up<0x83828180, 0x8c888684, 0x7d7e7f80, 0x74787a7c>(codes);
}

// NF4's values as halves (part 0), and what those are off by times 2048: the lower and the upper byte.
template <int PART>
DEVICE void nf4_bytes(u32 codes, u32& lower, u32& upper) {
    if constexpr (PART == 0) {
        lower = look_up<0x52339200, 0x00d4ea8d, 0x68e02618, 0x00c9800d>(codes);
        upper = look_up<0xb6b8b9bc, 0x00adb1b4, 0x3533312d, 0x3c393837>(codes);
    } else {
        lower = look_up<0xb0984f00, 0x008f609a, 0x74dd7201, 0x0026abb8>(codes);
        upper = look_up<0x32b53200, 0x00272da8, 0x2a282da5, 0x00b6332c>(codes);
    }
}

// Four values of output g or g + 8 (half 0 or 1): two pairs of halves, exactly. quad 0, 1: the first or the last four
// of the lane's eight inputs. zero: of this output's group.
template <int PART>
DEVICE void unpack_quad(const Codes& c, int chunk, int half, int quad, u32 zero, u32 (&a)[2]) {
    if constexpr (BITS >= 16) {
        const u32* words = c.low + (2 * PART + half) * 4 + 2 * quad;
        a[0] = words[0], a[1] = words[1];
    } else if constexpr (DECODED == Decoding::NF4) {
        u32 lower, upper;
        nf4_bytes<PART>(c.low[half] >> 16 * quad, lower, upper);
        a[0] = pick_bytes(lower, upper, 0x5140), a[1] = pick_bytes(lower, upper, 0x7362);
    } else if constexpr (DECODED == Decoding::E4M3) {
        // sign, 4 bits of exponent, 3 of mantissa; a half's exponent is 8 more
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 high = pick_bytes(c.low[2 * half + quad], 0, i ? 0x3424 : 0x1404);
            a[i] = multiply_halves((high & 0x8000 * EACH) | (high >> 1 & 0x3f80 * EACH), HALF_256 * EACH);
        }
    } else if constexpr (TABLE || BITS == 8) {
        constexpr u32 BASE = DECODED == Decoding::E2M1 ? HALF_512 : HALF_1024, LEAD = BASE >> 8;
        u32 bytes = TABLE ? table_bytes(c.low[2 * chunk + half] >> 16 * quad) : c.low[2 * half + quad];
        a[0] = subtract_halves(pick_bytes(bytes, LEAD * 0x1010101, 0x4140), (BASE + 128) * EACH);
        a[1] = subtract_halves(pick_bytes(bytes, LEAD * 0x1010101, 0x4342), (BASE + 128) * EACH);
    } else {
        u32 less = (HALF_1024 + LESS) * EACH + zero * EACH;
        a[0] = subtract_halves(code_pair(c, chunk, half, 2 * quad), less);
        if constexpr (BITS == 4) {
            // The odd nibbles where they are, 16 times as large: 1024 + 16 q, by 1/16, less 64 and the zero.
            u32 code = and_or(c.low[2 * chunk + half] >> 8 * quad, 240 * EACH, HALF_1024 * EACH);
            a[1] = fma_halves(code, HALF_SIXTEENTH * EACH, (MINUS_64 + 16 * LESS) * EACH + zero * (16 * EACH));
        } else {
            a[1] = subtract_halves(code_pair(c, chunk, half, 2 * quad + 1), less);
        }
    }
}

// Of one chunk, `quads` quads from the first on: pairs of halves of outputs g and g + 8. PART: the halves, or what they
// are off by. zeros: of both outputs, as they lie in a byte.
template <int PART>
DEVICE void unpack(const Codes& c, int chunk, int first, int quads, u32 zeros, u32 (&a)[4], u32 (&b)[4]) {
    u32 zero_a = KIND == Beside::ZERO ? zeros & 15 : 0, zero_b = KIND == Beside::ZERO ? zeros >> 4 & 15 : 0;
#pragma unroll
    for (int quad = first; quad < first + quads; ++quad) {
        u32 low[2], high[2];
        unpack_quad<PART>(c, chunk, 0, quad, zero_a, low);
        unpack_quad<PART>(c, chunk, 1, quad, zero_b, high);
        a[2 * quad] = low[0], a[2 * quad + 1] = low[1];
        b[2 * quad] = high[0], b[2 * quad + 1] = high[1];
    }
}

// The value of one code, for those who need few: row 0…15 of a tile, input k of it.
DEVICE float value_at(const u8* codes, int row, int k) {
    int half = row / 8, chunk = k % STAGE / CHUNK, k32 = k % CHUNK;
    int t = HALVES ? k32 % 16 / 4 : k32 / 8, i = HALVES ? k32 / 16 * 4 + k32 % 4 : k32 % 8, lane = row % 8 * 4 + t;
    const u8* low = codes + lane * (LOW < 16 ? LOW : 16);
    auto* words = reinterpret_cast<const u32*>(low);
    if constexpr (BITS >= 16) {
        const u8* vector = low + half * WARP * 16;
        float q = to_float(reinterpret_cast<const u16*>(vector)[i]);
        if constexpr (BITS == 32) q += to_float(reinterpret_cast<const u16*>(vector + 2 * WARP * 16)[i]) * OFF_BY;
        return q;
    } else if constexpr (DECODED == Decoding::NF4) {
        u32 code = words[half] >> 4 * i, lower, upper;
        nf4_bytes<0>(code, lower, upper);
        float near = to_float(static_cast<u16>((lower & 255) | upper << 8));
        nf4_bytes<1>(code, lower, upper);
        return near + to_float(static_cast<u16>((lower & 255) | upper << 8)) * OFF_BY;
    } else if constexpr (DECODED == Decoding::E4M3) {
        u32 code = low[half * 8 + i];
        return to_float(static_cast<u16>((code & 0x80) << 8 | (code & 0x7f) << 7)) * 256;
    } else if constexpr (BITS == 8) {
        return static_cast<float>(static_cast<int>(low[half * 8 + i]) - 128);
    } else if constexpr (TABLE) {
        int n = static_cast<int>(table_bytes(words[2 * chunk + half] >> 4 * i) & 255) - 128;
        return static_cast<float>(n) * (DECODED == Decoding::E2M1 ? 0.5f : 1.0f);
    } else {
        int pair = i / 2, odd = i % 2 * 16;
        u32 code = SMALL == 2 ? words[chunk] >> (8 * half + 2 * pair + odd) & 3
                              : words[2 * chunk + half] >> (4 * pair + odd) & 15;
        [[maybe_unused]] auto* high = reinterpret_cast<const u32*>(codes + LOW * WARP + lane * HIGH);
        if constexpr (HIGH == 4) code |= (high[0] >> (8 * chunk + 4 * half + pair + odd) & 1) << SMALL;
        if constexpr (HIGH == 8) code |= (high[chunk] >> (8 * half + 2 * pair + odd) & 3) << SMALL;
        return static_cast<float>(static_cast<int>(code) - static_cast<int>(LESS));
    }
}
