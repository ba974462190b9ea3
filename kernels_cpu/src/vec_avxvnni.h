// AVX2 with the dot products of bytes and words on 256 bits (VNNI): laptops of Intel since 2021, AMD since Zen 5.
// CPUs with AVX-512 have the same instructions in another encoding, so they run this unit too (and its tests).
#pragma once

#include "vec_avx2.h"

namespace tinychat {

// Evex: the encoding of AVX-512, else that of AVX-VNNI.
template <bool Evex>
struct AvxVnni : Avx2 {
    static constexpr int kRows = 8;
    static constexpr bool kWide = true;  // sums of products of bytes have 32 bits from the start

    static I dp_bytes(I a, I w, I x) {
        if constexpr (Evex)
            __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(a) : "x"(w), "x"(x));
        else
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(a) : "x"(w), "x"(x));
        return a;
    }
    static I dp_words(I a, I w, I x) {
        if constexpr (Evex)
            __asm__("%{evex%} vpdpwssd %2, %1, %0" : "+x"(a) : "x"(w), "x"(x));
        else
            __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(a) : "x"(w), "x"(x));
        return a;
    }
    static Acc8 dot_u8(Acc8 a, I w, const int8_t* x) { return dp_bytes(a, w, word(x)); }
    static I finish_u8(Acc8 a) { return a; }
    // The instruction wants unsigned × signed: weights go up by 128, and 128 · Σx comes off at the end.
    static I prepare_s8(I w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
    static Acc8 dot_s8(Acc8 a, I w, const int8_t* x) { return dp_bytes(a, w, word(x)); }
    // nsum fits 16 bits, so the 16-bit dot product with (128, 0) multiplies and adds in one.
    static I finish_s8(Acc8 a, int32_t nsum) { return dp_words(a, _mm256_set1_epi32(128), _mm256_set1_epi32(nsum)); }
    static Acc16 dot_pair(Acc16 a, I w, const int16_t* x) { return dp_words(a, w, word(x)); }
};

}  // namespace tinychat
