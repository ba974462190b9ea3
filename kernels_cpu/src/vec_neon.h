// NEON with the ARMv8.2 dot product: 4 rows in one register.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace tinychat {

struct Neon {
    static constexpr int kLanes = 4;
    static constexpr int kRows = 8;
    static constexpr bool kWide = true;
    static constexpr int kRegisters = 32;
    static constexpr bool kMatrices = false;
    static constexpr int kPairs = 8;  // of attention
    using F = float32x4_t;
    using I = int32x4_t;
    using Acc8 = int32x4_t;
    struct Acc16 {
        int32x4_t lo, hi;  // two products for each row, rows 0-1 and rows 2-3
    };

    static F zero() { return vdupq_n_f32(0); }
    static F set1(float x) { return vdupq_n_f32(x); }
    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F a) { vst1q_f32(p, a); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static F select_lt(F a, F b, F x, F y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
    static F max_abs(F acc, F x) {
        I bits = vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff));
        return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(acc), bits));
    }
    static F load_i8(const int8_t* p) {
        int32_t four;
        memcpy(&four, p, 4);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
    }
    static F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static void store_f16(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
    static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static I set1i(int32_t x) { return vdupq_n_s32(x); }
    static I addi(I a, I b) { return vaddq_s32(a, b); }
    static I round(F a) { return vcvtnq_s32_f32(a); }
    static F to_float(I a) { return vcvtq_f32_s32(a); }
    static F pow2(I n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
    static void store_i8(int8_t* p, I a) {
        int16x4_t h = vqmovn_s32(a);
        int8x8_t b = vqmovn_s16(vcombine_s16(h, h));
        int32_t four = vget_lane_s32(vreinterpret_s32_s8(b), 0);
        memcpy(p, &four, 4);
    }
    static void store_i16(int16_t* p, I a) { vst1_s16(p, vqmovn_s32(a)); }
    static void storei(int32_t* p, I a) { vst1q_s32(p, a); }

    // Lanes i and i + 2, then 1.
    static float sum(F a) {
        const float32x2_t d = vadd_f32(vget_low_f32(a), vget_high_f32(a));
        return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
    }
    static float maxf(F a) { return vmaxvq_f32(a); }
    static int32_t sumi(I a) { return vaddvq_s32(a); }
    static int32_t maxi(I a) { return vmaxvq_s32(a); }
    static I bits(F a) { return vreinterpretq_s32_f32(a); }

    static I line(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
    // Codes of 4 bits, eight in a lane: the lowest one as a number; all but the first n.
    static F nibble(I w) { return vcvtq_f32_s32(vandq_s32(w, vdupq_n_s32(15))); }
    static I shift(I w, int n) {
        return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(w), vdupq_n_s32(-4 * n)));
    }
    static I low(I w) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(w), vdupq_n_u8(15))); }
    template <int N>
    static I shift(I w) {
        if constexpr (N > 0) return vreinterpretq_s32_u8(vshlq_n_u8(vreinterpretq_u8_s32(w), N));
        if constexpr (N < 0) return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(w), -N));
        return w;
    }
    template <int N>
    static I shift32(I w) {
        return vshlq_n_s32(w, N);
    }
    static I or_(I a, I b) { return vorrq_s32(a, b); }
    static F as_float(I a) { return vreinterpretq_f32_s32(a); }
    static I load_u8(const uint8_t* p) {
        uint32_t four;
        memcpy(&four, p, 4);
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
    }
    static I masked(I w, int mask) {
        return vandq_s32(w, vreinterpretq_s32_u8(vdupq_n_u8(static_cast<uint8_t>(mask))));
    }
    static I merge(I base, I bits, int mask) { return vorrq_s32(base, masked(bits, mask)); }
    static I lookup(I index, const uint8_t* table) {
        return vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s32(index)));
    }
    using Table = uint8x16x4_t;
    static Table table(const float (&values)[16]) { return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(values)); }
    static F lookup(const Table& t, I index) {  // four bytes from 4 · index on
        const I four = vshlq_n_s32(vandq_s32(index, vdupq_n_s32(15)), 2);
        const I bytes = vmlaq_s32(vdupq_n_s32(0x03020100), four, vdupq_n_s32(0x01010101));
        return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_s32(bytes)));
    }
    template <int N>
    static I right32(I w) {
        if constexpr (N == 0) return w;
        return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(w), N ? N : 1));
    }
    static void e4m3_pair(const uint8_t* p, F& even, F& odd) {
        int16x4_t w;
        memcpy(&w, p, 8);
        const int16x4_t first = vshr_n_s16(vshl_n_s16(w, 8), 1), second = vshr_n_s16(w, 1);
        const int16x4_t mask = vdup_n_s16(static_cast<int16_t>(0xbf80));
        even = vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(first, mask)));
        odd = vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(second, mask)));
    }
    static void store_line(uint8_t* p, I w) { vst1q_u8(p, vreinterpretq_u8_s32(w)); }
    static I high(I w) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(w), 4)); }
    static int32x4_t word(const void* x) {
        int32_t v;
        memcpy(&v, x, 4);
        return vdupq_n_s32(v);
    }
    static Acc8 acc8() { return vdupq_n_s32(0); }
    static Acc8 dot_u8(Acc8 a, I w, const int8_t* x) {
        return vdotq_s32(a, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(word(x)));
    }
    static I finish_u8(Acc8 a) { return a; }
    static I prepare_s8(I w) { return w; }
    static Acc8 dot_s8(Acc8 a, I w, const int8_t* x) { return dot_u8(a, w, x); }
    static I finish_s8(Acc8 a, int32_t) { return a; }
    static Acc16 acc16() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
    template <int i4>
    static I pair_u4(I w) {
        uint16x8_t h = vreinterpretq_u16_s32(w);
        if constexpr (i4 > 0) h = vshrq_n_u16(h, 4 * i4);
        return vreinterpretq_s32_u16(vandq_u16(h, vdupq_n_u16(15)));
    }
    template <int odd, bool is_signed>
    static I pair_8(I w) {
        if constexpr (!is_signed) {
            const uint16x8_t u = vreinterpretq_u16_s32(w);
            return vreinterpretq_s32_u16(odd ? vshrq_n_u16(u, 8) : vandq_u16(u, vdupq_n_u16(255)));
        }
        int16x8_t h = vreinterpretq_s16_s32(w);
        if constexpr (!odd) h = vshlq_n_s16(h, 8);
        return vreinterpretq_s32_s16(vshrq_n_s16(h, 8));
    }
    static Acc16 dot_pair(Acc16 a, I w, const int16_t* x) {
        int16x8_t q = vreinterpretq_s16_s32(w), v = vreinterpretq_s16_s32(word(x));
        return {vmlal_s16(a.lo, vget_low_s16(q), vget_low_s16(v)), vmlal_high_s16(a.hi, q, v)};
    }
    static I finish16(Acc16 a) { return vpaddq_s32(a.lo, a.hi); }
    static I zeros4(const uint8_t* p, int first) {
        int32_t z[4];
        for (int i = 0; i < 4; i++) {
            int r = first + i;
            z[i] = r < 8 ? p[r] & 15 : p[r - 8] >> 4;
        }
        return vld1q_s32(z);
    }
    static void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace tinychat
