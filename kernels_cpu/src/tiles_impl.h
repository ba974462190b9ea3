// How linears go over tiles of outputs and blocks of rows, whatever their kernels are.
// Included by the ISA translation units only.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace tinychat {
namespace {

constexpr int imin(int a, int b) { return a < b ? a : b; }

// Bytes ahead of the lines in use at which weights are fetched into L1; 2-8 KB measure alike, less does not cover the
// latency. Each such line holds one of the core's few places for them (24 on Zen 4) all the way from memory, which is
// what bounds few rows where memory is fast: their weights come into L2 far ahead, and from there into L1 shortly
// before. More rows are bound by arithmetic, and two fetches for each line cost them 1 to 2 % (AVX2, AVX-VNNI).
constexpr int kAheadBytes = 4096, kFarBytes = 12288, kNearBytes = 1024, kFarRows = 5;
template <class S, int M>
inline void fetch_weights(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        if (M <= kFarRows) __builtin_prefetch(p + kFarBytes + i, 0, 2);
        S::prefetch(p + (M <= kFarRows ? kNearBytes : kAheadBytes) + i);
    }
}

using TileFn = void (*)(const LinearWeights&, const uint8_t*, const Activations&, int, float*);

// f(M) for the constant M that is m, 1…kRows.
template <class S, int M = 1, class Fn>
auto with_rows(int m, Fn f) {
    if constexpr (M < S::kRows) {
        if (m > M) return with_rows<S, M + 1>(m, f);
    }
    return f(std::integral_constant<int, M>{});
}

// Bias, residual, and the tail of the last tile.
template <class S>
inline void store_tile(const LinearArgs& a, const float* out, int m0, int rows, int n0) {
    const int cols = imin(kTile, a.w->n - n0);
    const float* bias = a.w->bias ? a.w->bias + n0 : nullptr;
    for (int m = 0; m < rows; m++, out += kTile) {
        float* y = a.y + static_cast<size_t>(m0 + m) * a.ldy + n0;
        const float* add = a.add ? a.add + static_cast<size_t>(m0 + m) * a.ldadd + n0 : nullptr;
        if (cols == kTile) {
            for (int i = 0; i < kTile; i += S::kLanes) {
                typename S::F v = S::load(out + i);
                if (bias) v = S::add(v, S::load(bias + i));
                if (add) v = S::add(v, S::load(add + i));
                S::store(y + i, v);
            }
            continue;
        }
        for (int i = 0; i < cols; i++) {
            float v = out[i];
            if (bias) v += bias[i];
            if (add) v += add[i];
            y[i] = v;
        }
    }
}

// Kernels for whole row blocks of a step and for the rows that are left.
template <class Fn>
struct RowKernels {
    int block;
    Fn full, last;
    template <class Pick>
    RowKernels(int block, int rows, Pick pick)
        : block(block), full(pick(block)), last(rows % block ? pick(rows % block) : full) {}
    // f(first row, number of rows, kernel) for the rows m0 … m1 - 1; m1 ends a block, or all rows.
    template <class Do>
    void each(int m0, int m1, Do f) const {
        for (int m = m0; m < m1; m += block) {
            const int rows = imin(block, m1 - m);
            f(m, rows, rows == block ? full : last);
        }
    }
};

}  // namespace
}  // namespace tinychat
