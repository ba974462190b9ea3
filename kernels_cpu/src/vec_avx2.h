// AVX2 with FMA and F16C: 8 rows in one register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tinychat {

struct Avx2 {
    static constexpr int kLanes = 8;
    static constexpr int kRows = 8;
    static constexpr bool kWide = false;  // sums of products of bytes have 16 bits at first
    static constexpr int kRegisters = 16;
    static constexpr bool kMatrices = false;
    static constexpr int kPairs = 8;  // of attention
    using F = __m256;
    using I = __m256i;
    using Acc8 = __m256i;
    using Acc16 = __m256i;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F select_lt(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
    static F max_abs(F acc, F x) {
        I bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
        return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(acc), bits));
    }
    static F load_i8(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static F load_f16(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store_f16(uint16_t* p, F a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static F load_bf16(const uint16_t* p) {
        __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    // A sum as it stands here: compilers know that integers may be added in any order, form all products first, and
    // then spill them (of five rows 42 in each half of a stage).
    static I in_order(I a) {
        __asm__("" : "+x"(a));
        return a;
    }
    static I set1i(int32_t x) { return _mm256_set1_epi32(x); }
    static I addi(I a, I b) { return in_order(_mm256_add_epi32(a, b)); }
    static I round(F a) { return _mm256_cvtps_epi32(a); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F pow2(I n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    static void store_i8(int8_t* p, I a) {
        __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(w, w));
    }
    static void store_i16(int16_t* p, I a) {
        __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), w);
    }
    static void storei(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }

    // Lanes i and i + 4, then 2, 1.
    static float sum(F a) {
        const __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
    }
    static float maxf(F a) {
        const __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
        return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
    }
    static int32_t sumi(I a) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static int32_t maxi(I a) {
        __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static I bits(F a) { return _mm256_castps_si256(a); }

    static I line(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    // Codes of 4 bits, eight in a lane: the lowest one as a number; all but the first n.
    static F nibble(I w) { return _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(15))); }
    static I shift(I w, int n) { return _mm256_srli_epi32(w, 4 * n); }
    static I low(I w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
    template <int N>
    static I shift(I w) {
        if constexpr (N > 0) return _mm256_slli_epi16(w, N);
        if constexpr (N < 0) return _mm256_srli_epi16(w, -N);
        return w;
    }
    template <int N>
    static I shift32(I w) {
        return _mm256_slli_epi32(w, N);
    }
    static I or_(I a, I b) { return _mm256_or_si256(a, b); }
    static F as_float(I a) { return _mm256_castsi256_ps(a); }
    static I load_u8(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static I masked(I w, int mask) { return _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>(mask))); }
    static I merge(I base, I bits, int mask) { return _mm256_or_si256(base, masked(bits, mask)); }
    static I lookup(I index, const uint8_t* table) {
        const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), index);
    }
    struct Table {
        __m256 low, high;
    };
    static Table table(const float (&values)[16]) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
    static F lookup(const Table& t, I index) {
        const F high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), high);
    }
    template <int N>
    static I right32(I w) {
        return _mm256_srli_epi32(w, N);
    }
    static void e4m3_pair(const uint8_t* p, F& even, F& odd) {
        const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m128i first = _mm_srai_epi16(_mm_slli_epi16(w, 8), 1), second = _mm_srai_epi16(w, 1);
        const __m128i mask = _mm_set1_epi16(static_cast<short>(0xbf80));
        even = _mm256_cvtph_ps(_mm_and_si128(first, mask));
        odd = _mm256_cvtph_ps(_mm_and_si128(second, mask));
    }
    static void store_line(uint8_t* p, I w) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), w); }
    static I high(I w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
    static I word(const void* x) {
        int32_t v;
        memcpy(&v, x, 4);
        return _mm256_set1_epi32(v);
    }
    static Acc8 acc8() { return _mm256_setzero_si256(); }
    // Bytes 0…63 × -127…127: a pair is at most 2·127 times the largest byte, so int16 holds 8 of bytes up to 15, 4 of
    // bytes up to 31 and 2 of all.
    static Acc8 dot_u8(Acc8 a, I w, const int8_t* x) {
        return in_order(_mm256_add_epi16(a, _mm256_maddubs_epi16(w, word(x))));
    }
    static I finish_u8(Acc8 a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
    static I prepare_s8(I w) { return w; }
    // |w| · (x with w's sign): a pair is at most 2·128·127, so int16 does not saturate for the weights we store (≥
    // -127).
    static Acc8 dot_s8(Acc8 a, I w, const int8_t* x) {
        I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(word(x), w));
        return in_order(_mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    }
    static I finish_s8(Acc8 a, int32_t) { return a; }
    static Acc16 acc16() { return _mm256_setzero_si256(); }
    template <int i4>
    static I pair_u4(I w) {
        return _mm256_and_si256(i4 ? _mm256_srli_epi16(w, 4 * i4) : w, _mm256_set1_epi16(15));
    }
    template <int odd, bool is_signed>
    static I pair_8(I w) {
        if constexpr (!is_signed) return odd ? _mm256_srli_epi16(w, 8) : _mm256_and_si256(w, _mm256_set1_epi16(255));
        return _mm256_srai_epi16(odd ? w : _mm256_slli_epi16(w, 8), 8);
    }
    static Acc16 dot_pair(Acc16 a, I w, const int16_t* x) {
        return in_order(_mm256_add_epi32(a, _mm256_madd_epi16(w, word(x))));
    }
    static I finish16(Acc16 a) { return a; }
    static I zeros4(const uint8_t* p, int first) {
        __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        if (first) b = _mm_srli_epi16(b, 4);
        return _mm256_cvtepu8_epi32(_mm_and_si128(b, _mm_set1_epi8(15)));
    }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace tinychat
