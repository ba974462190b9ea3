// NEON with products of matrices of bytes (i8mm): Apple since M2, Arm's servers since Neoverse V1.
#pragma once

#include "vec_neon.h"

namespace tinychat {

// smmla multiplies 2 rows × 8 inputs by 8 inputs × 2 outputs, twice what the dot product does. One row of activations
// goes without it, and so do 16-bit ones. The sums are exact, so their bits are those of the dot product.
struct NeonI8mm : Neon {
    static constexpr bool kMatrices = true;
    // Outputs 0-1 and 2-3: of weights 8 inputs of each, of sums [2 rows of activations][2 outputs].
    struct Pair {
        int32x4_t lo, hi;
    };
    static Pair pair() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
    // The byte-lines of inputs 0…3 and 4…7.
    static Pair eights(I even, I odd) { return {vzip1q_s32(even, odd), vzip2q_s32(even, odd)}; }
    static Pair dot_eights(Pair a, const Pair& w, const int8_t* row0, const int8_t* row1) {
        const int8x16_t x = vcombine_s8(vld1_s8(row0), vld1_s8(row1));
        return {vmmlaq_s32(a.lo, x, vreinterpretq_s8_s32(w.lo)), vmmlaq_s32(a.hi, x, vreinterpretq_s8_s32(w.hi))};
    }
    static I first(const Pair& a) {
        return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a.lo), vreinterpretq_s64_s32(a.hi)));
    }
    static I second(const Pair& a) {
        return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a.lo), vreinterpretq_s64_s32(a.hi)));
    }
};

}  // namespace tinychat
