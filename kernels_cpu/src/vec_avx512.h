// AVX-512 with VNNI: 16 rows in one register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tinychat {

struct Avx512 {
    static constexpr int kLanes = 16;
    static constexpr int kRows = 8;
    static constexpr bool kWide = true;  // sums of products of bytes have 32 bits from the start
    static constexpr int kRegisters = 32;
    static constexpr bool kMatrices = false;
    static constexpr int kPairs = 12;  // of attention
    using F = __m512;
    using I = __m512i;
    using Acc8 = __m512i;
    using Acc16 = __m512i;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F select_lt(F a, F b, F x, F y) { return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
    static F max_abs(F acc, F x) {
        I bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
        return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(acc), bits));
    }
    static F load_i8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static F load_f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_f16(uint16_t* p, F a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static F load_bf16(const uint16_t* p) {
        __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    static I set1i(int32_t x) { return _mm512_set1_epi32(x); }
    static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
    static I round(F a) { return _mm512_cvtps_epi32(a); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F pow2(I n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
    }
    static void store_i8(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a)); }
    static void store_i16(int16_t* p, I a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
    }
    static void storei(int32_t* p, I a) { _mm512_storeu_si512(p, a); }

    // Lanes i and i + 8, then 4, 2, 1.
    static float sum(F a) {
        const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
        const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
        const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
    }
    static float maxf(F a) { return _mm512_reduce_max_ps(a); }
    static int32_t sumi(I a) { return _mm512_reduce_add_epi32(a); }
    static int32_t maxi(I a) { return _mm512_reduce_max_epi32(a); }
    static I bits(F a) { return _mm512_castps_si512(a); }

    static I line(const uint8_t* p) { return _mm512_load_si512(p); }
    // Codes of 4 bits, eight in a lane: the lowest one as a number; all but the first n.
    static F nibble(I w) {
        // The permutation looks at the lowest 4 bits alone.
        return _mm512_permutexvar_ps(w, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    }
    static I shift(I w, int n) { return _mm512_srli_epi32(w, 4 * n); }
    static I low(I w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
    // Within 16-bit lanes, left by N, or right by -N: what crosses a byte is masked off afterwards.
    template <int N>
    static I shift(I w) {
        if constexpr (N > 0) return _mm512_slli_epi16(w, N);
        if constexpr (N < 0) return _mm512_srli_epi16(w, -N);
        return w;
    }
    template <int N>
    static I shift32(I w) {
        return _mm512_slli_epi32(w, N);
    }
    static I or_(I a, I b) { return _mm512_or_si512(a, b); }
    static F as_float(I a) { return _mm512_castsi512_ps(a); }
    static I load_u8(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I masked(I w, int mask) { return _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(mask))); }
    // base | (bits & mask)
    static I merge(I base, I bits, int mask) {
        return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(static_cast<char>(mask)), base, 0xea);
    }
    static I lookup(I index, const uint8_t* table) {
        const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), index);
    }
    // Floats by the lowest four bits of each lane.
    using Table = __m512;
    static Table table(const float (&values)[16]) { return _mm512_loadu_ps(values); }
    static F lookup(Table t, I index) { return _mm512_permutexvar_ps(index, t); }
    template <int N>
    static I right32(I w) {
        return _mm512_srli_epi32(w, N);
    }
    // Pairs of e4m3 codes → their values · 2^-8: as halves they have the same bits and another bias.
    static void e4m3_pair(const uint8_t* p, F& even, F& odd) {
        const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
        const __m256i first = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 1), second = _mm256_srai_epi16(w, 1);
        const __m256i mask = _mm256_set1_epi16(static_cast<short>(0xbf80));
        even = _mm512_cvtph_ps(_mm256_and_si256(first, mask));
        odd = _mm512_cvtph_ps(_mm256_and_si256(second, mask));
    }
    static void store_line(uint8_t* p, I w) { _mm512_store_si512(p, w); }
    static I high(I w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
    typedef int32_t Word __attribute__((may_alias, aligned(1)));
    static Acc8 acc8() { return _mm512_setzero_si512(); }
    // The broadcast rides on the instruction's memory operand; left to itself the compiler spends another one on it.
    static Acc8 dot_u8(Acc8 a, I w, const int8_t* x) {
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(a) : "v"(w), "m"(*reinterpret_cast<const Word*>(x)));
        return a;
    }
    static I finish_u8(Acc8 a) { return a; }
    // The instruction wants unsigned × signed: weights go up by 128, and 128 · Σx comes off at the end.
    static I prepare_s8(I w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
    static Acc8 dot_s8(Acc8 a, I w, const int8_t* x) { return dot_u8(a, w, x); }
    // nsum fits 16 bits, so the 16-bit dot product with (128, 0) multiplies and adds in one.
    static I finish_s8(Acc8 a, int32_t nsum) {
        return _mm512_dpwssd_epi32(a, _mm512_set1_epi32(128), _mm512_set1_epi32(nsum));
    }
    static Acc16 acc16() { return _mm512_setzero_si512(); }
    template <int i4>
    static I pair_u4(I w) {
        return _mm512_and_si512(i4 ? _mm512_srli_epi16(w, 4 * i4) : w, _mm512_set1_epi16(15));
    }
    template <int odd, bool is_signed>
    static I pair_8(I w) {
        if constexpr (!is_signed) return odd ? _mm512_srli_epi16(w, 8) : _mm512_and_si512(w, _mm512_set1_epi16(255));
        return _mm512_srai_epi16(odd ? w : _mm512_slli_epi16(w, 8), 8);
    }
    static Acc16 dot_pair(Acc16 a, I w, const int16_t* x) {
        __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(a) : "v"(w), "m"(*reinterpret_cast<const Word*>(x)));
        return a;
    }
    static I finish16(Acc16 a) { return a; }
    static I zeros4(const uint8_t* p, int) {
        __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        __m128i both = _mm_unpacklo_epi64(b, _mm_srli_epi16(b, 4));
        return _mm512_cvtepu8_epi32(_mm_and_si128(both, _mm_set1_epi8(15)));
    }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace tinychat
