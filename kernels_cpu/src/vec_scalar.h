// Portable 16-lane vectors: what every other ISA is compared with, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tinychat {

struct Scalar {
    static constexpr int kLanes = 16;
    static constexpr int kRows = 1;  // activation rows that one pass over a tile serves: more take long to compile
    static constexpr bool kWide = true;
    static constexpr int kRegisters = 16;
    static constexpr bool kMatrices = false;  // no products of small matrices of bytes
    static constexpr int kPairs = 8;          // of attention
    struct F {
        float v[16];
    };
    struct I {
        int32_t v[16];
    };
    using Acc8 = I;
    using Acc16 = I;

#define TC_LANES for (int i = 0; i < 16; i++)
    static F zero() { return F{}; }
    static F set1(float x) {
        F r;
        TC_LANES r.v[i] = x;
        return r;
    }
    static F load(const float* p) {
        F r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
    static F add(F a, F b) {
        TC_LANES a.v[i] += b.v[i];
        return a;
    }
    static F sub(F a, F b) {
        TC_LANES a.v[i] -= b.v[i];
        return a;
    }
    static F mul(F a, F b) {
        TC_LANES a.v[i] *= b.v[i];
        return a;
    }
    static F div(F a, F b) {
        TC_LANES a.v[i] /= b.v[i];
        return a;
    }
    static F fma(F a, F b, F c) {
        TC_LANES c.v[i] = std::fmaf(a.v[i], b.v[i], c.v[i]);
        return c;
    }
    // a > b ? a : b, so that NaN in a gives b: the semantics of maxps.
    static F max(F a, F b) {
        TC_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static F min(F a, F b) {
        TC_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    // a < b ? x : y
    static F select_lt(F a, F b, F x, F y) {
        TC_LANES y.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
        return y;
    }
    // The larger of |x| and acc by bit pattern: NaN beats infinity beats everything, so nothing hides a NaN.
    static F max_abs(F acc, F x) {
        TC_LANES {
            int32_t a, b;
            memcpy(&a, &acc.v[i], 4);
            memcpy(&b, &x.v[i], 4);
            b &= 0x7fffffff;
            a = a > b ? a : b;
            memcpy(&acc.v[i], &a, 4);
        }
        return acc;
    }
    static F load_i8(const int8_t* p) {
        F r;
        TC_LANES r.v[i] = p[i];
        return r;
    }
    static float half_to_float(uint16_t h) {
        uint32_t sign = (h & 0x8000u) << 16, e = (h >> 10) & 31, m = h & 0x3ff, bits;
        if (e == 31) {
            bits = sign | 0x7f800000 | (m << 13);
        } else if (e) {
            bits = sign | ((e + 112) << 23) | (m << 13);
        } else {
            float f = static_cast<float>(m) * 0x1p-24f;
            memcpy(&bits, &f, 4);
            bits |= sign;
        }
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    static uint16_t float_to_half(float f) {
        uint32_t u;
        memcpy(&u, &f, 4);
        uint16_t sign = (u >> 16) & 0x8000;
        u &= 0x7fffffff;
        if (u > 0x7f800000) return sign | 0x7e00;
        if (u >= 0x477ff000) return sign | 0x7c00;
        if (u < 0x38800000) {  // subnormal half: the float adder rounds to nearest even for us
            float a, magic = 0.5f;
            memcpy(&a, &u, 4);
            a += magic;
            uint32_t b;
            memcpy(&b, &a, 4);
            return sign | static_cast<uint16_t>(b - 0x3f000000);
        }
        u += 0xfff + ((u >> 13) & 1);
        return sign | static_cast<uint16_t>((u >> 13) - (112 << 10));
    }
    static F load_f16(const uint16_t* p) {
        F r;
        TC_LANES r.v[i] = half_to_float(p[i]);
        return r;
    }
    static void store_f16(uint16_t* p, F a) { TC_LANES p[i] = float_to_half(a.v[i]); }
    static F load_bf16(const uint16_t* p) {
        F r;
        TC_LANES {
            uint32_t b = static_cast<uint32_t>(p[i]) << 16;
            memcpy(&r.v[i], &b, 4);
        }
        return r;
    }
    static I set1i(int32_t x) {
        I r;
        TC_LANES r.v[i] = x;
        return r;
    }
    static I addi(I a, I b) {
        TC_LANES a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
        return a;
    }
    // To the nearest integer, ties to even; NaN and overflow give the smallest integer, as on x86.
    static I round(F a) {
        I r;
        TC_LANES r.v[i] = std::fabs(a.v[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(a.v[i])) : INT32_MIN;
        return r;
    }
    static F to_float(I a) {
        F r;
        TC_LANES r.v[i] = static_cast<float>(a.v[i]);
        return r;
    }
    // 2^n for n in -126…127
    static F pow2(I n) {
        F r;
        TC_LANES {
            int32_t b = (n.v[i] + 127) << 23;
            memcpy(&r.v[i], &b, 4);
        }
        return r;
    }
    static void store_i8(int8_t* p, I a) {
        TC_LANES p[i] = static_cast<int8_t>(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
    }
    static void store_i16(int16_t* p, I a) {
        TC_LANES p[i] = static_cast<int16_t>(a.v[i] > 32767 ? 32767 : a.v[i] < -32768 ? -32768 : a.v[i]);
    }
    static void storei(int32_t* p, I a) { memcpy(p, a.v, sizeof a.v); }
    // Lanes i and i + 8, then 4, 2, 1.
    static float sum(F a) {
        for (int w = kLanes / 2; w > 0; w /= 2)
            for (int i = 0; i < w; i++) a.v[i] += a.v[i + w];
        return a.v[0];
    }
    static float maxf(F a) {
        for (int i = 1; i < kLanes; i++) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
        return a.v[0];
    }
    // Sums wrap: only NaN inputs get that far, and their scale is NaN.
    static int32_t sumi(I a) {
        uint32_t s = 0;
        TC_LANES s += static_cast<uint32_t>(a.v[i]);
        return static_cast<int32_t>(s);
    }
    static int32_t maxi(I a) {
        int32_t m = a.v[0];
        TC_LANES m = a.v[i] > m ? a.v[i] : m;
        return m;
    }
    static I bits(F a) {
        I r;
        memcpy(r.v, a.v, sizeof r.v);
        return r;
    }

    // Weight lines.
    static I line(const uint8_t* p) {
        I r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    // Codes of 4 bits, eight in a lane: the lowest one as a number; all but the first n.
    static F nibble(I w) {
        F r;
        TC_LANES r.v[i] = static_cast<float>(w.v[i] & 15);
        return r;
    }
    static I shift(I w, int n) {
        TC_LANES w.v[i] = static_cast<int32_t>(static_cast<uint32_t>(w.v[i]) >> 4 * n);
        return w;
    }
    static I low(I w) {
        TC_LANES w.v[i] &= 0x0f0f0f0f;
        return w;
    }
    // Left by N, or right by -N: what crosses a byte is masked off afterwards.
    template <int N>
    static I shift(I w) {
        TC_LANES {
            const uint32_t u = static_cast<uint32_t>(w.v[i]);
            w.v[i] = static_cast<int32_t>(N > 0 ? u << (N & 31) : u >> (-N & 31));
        }
        return w;
    }
    template <int N>
    static I shift32(I w) {
        return shift<N>(w);
    }
    static I or_(I a, I b) {
        TC_LANES a.v[i] |= b.v[i];
        return a;
    }
    static F as_float(I a) {
        F r;
        memcpy(r.v, a.v, sizeof r.v);
        return r;
    }
    // kLanes bytes, an integer each.
    static I load_u8(const uint8_t* p) {
        I r;
        TC_LANES r.v[i] = p[i];
        return r;
    }
    // Bytes & mask.
    static I masked(I w, int mask) {
        TC_LANES w.v[i] &= mask * 0x01010101;
        return w;
    }
    // base | (bits & mask)
    static I merge(I base, I bits, int mask) { return or_(base, masked(bits, mask)); }
    // table[byte] for each byte 0…15.
    static I lookup(I index, const uint8_t* table) {
        TC_LANES {
            uint8_t b[4];
            memcpy(b, &index.v[i], 4);
            for (uint8_t& q : b) q = table[q];
            memcpy(&index.v[i], b, 4);
        }
        return index;
    }
    // Floats by the lowest four bits of each lane.
    using Table = F;
    static Table table(const float (&values)[16]) { return load(values); }
    static F lookup(const Table& t, I index) {
        F r;
        TC_LANES r.v[i] = t.v[index.v[i] & 15];
        return r;
    }
    template <int N>
    static I right32(I w) {
        TC_LANES w.v[i] = static_cast<int32_t>(static_cast<uint32_t>(w.v[i]) >> N);
        return w;
    }
    // kLanes pairs of e4m3 codes → their values · 2^-8: as halves they have the same bits and another bias.
    static void e4m3_pair(const uint8_t* p, F& even, F& odd) {
        const auto value = [](int c) { return half_to_float(static_cast<uint16_t>((c & 128) << 8 | (c & 127) << 7)); };
        TC_LANES even.v[i] = value(p[2 * i]), odd.v[i] = value(p[2 * i + 1]);
    }
    static void store_line(uint8_t* p, I w) { memcpy(p, w.v, sizeof w.v); }
    static I high(I w) {
        TC_LANES w.v[i] = (w.v[i] >> 4) & 0x0f0f0f0f;
        return w;
    }
    static Acc8 acc8() { return I{}; }
    static int32_t dot4(int32_t w, const int8_t* x) {
        int8_t b[4];
        memcpy(b, &w, 4);
        return b[0] * x[0] + b[1] * x[1] + b[2] * x[2] + b[3] * x[3];
    }
    static Acc8 dot_u8(Acc8 a, I w, const int8_t* x) {
        TC_LANES a.v[i] += dot4(w.v[i], x);
        return a;
    }
    static I finish_u8(Acc8 a) { return a; }
    static I prepare_s8(I w) { return w; }
    static Acc8 dot_s8(Acc8 a, I w, const int8_t* x) { return dot_u8(a, w, x); }
    static I finish_s8(Acc8 a, int32_t) { return a; }
    static Acc16 acc16() { return I{}; }
    template <int i4>
    static I pair_u4(I w) {
        TC_LANES w.v[i] = (w.v[i] >> (4 * i4)) & 0x000f000f;
        return w;
    }
    // Bytes 0 and 2, or 1 and 3, as 16-bit integers.
    template <int odd, bool is_signed>
    static I pair_8(I w) {
        TC_LANES {
            int8_t b[4];
            memcpy(b, &w.v[i], 4);
            int16_t s[2] = {b[odd], b[2 + odd]};
            if (!is_signed) s[0] &= 255, s[1] &= 255;
            memcpy(&w.v[i], s, 4);
        }
        return w;
    }
    static Acc16 dot_pair(Acc16 a, I w, const int16_t* x) {
        TC_LANES {
            int16_t s[2];
            memcpy(s, &w.v[i], 4);
            a.v[i] += s[0] * x[0] + s[1] * x[1];
        }
        return a;
    }
    static I finish16(Acc16 a) { return a; }
    // The 4-bit zeros of rows `first` … first + kLanes - 1 of a tile.
    static I zeros4(const uint8_t* p, int) {
        I r;
        TC_LANES r.v[i] = i < 8 ? p[i] & 15 : p[i - 8] >> 4;
        return r;
    }
    static void prefetch(const void* p) { __builtin_prefetch(p); }
#undef TC_LANES
};

}  // namespace tinychat
