// Linear layers: one kernel template for 4-bit and 8-bit weights, 8-bit and 16-bit activations, 1…8 rows, any ISA.
// Included by the ISA translation units only.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace tinychat {
namespace {

constexpr int kPrefetchBytes = 4096;  // ahead of the line in use; 2-8 KB measure alike, less does not cover the latency

inline int imin(int a, int b) { return a < b ? a : b; }

// Scale and offset of one group, for the kLanes rows from `first`: w = q · scale + offset.
template <class S, int WBits, Meta MT>
struct GroupMeta {
    typename S::F scale, offset;

    GroupMeta(const uint8_t* p, int first) {
        const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
        if constexpr (MT == Meta::kFloat) {
            scale = S::load(reinterpret_cast<const float*>(p) + first);
            offset = S::load(reinterpret_cast<const float*>(p) + kTile + first);
        } else {
            scale = S::load_f16(half + first);
        }
        if constexpr (MT == Meta::kOffset16) offset = S::load_f16(half + kTile + first);
        if constexpr (MT == Meta::kZero4)
            offset = S::mul(scale, S::sub(S::zero(), S::to_float(S::zeros4(p + 32, first))));
        if constexpr (MT == Meta::kSym && WBits == 4) offset = S::mul(scale, S::set1(-8.0f));
    }
};

// Integer dot product of one activation group (32 inputs) with kLanes rows, for M rows of activations.
//   lines  the group's first code line, at the first of these rows;  x  integers of the first activation row
template <class S, int M, int WBits>
inline void dot32(const uint8_t* lines, const int8_t* x, typename S::Acc8 (&acc)[M]) {
    for (int m = 0; m < M; m++) acc[m] = S::acc8();
    if constexpr (WBits == 4) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
            typename S::I v = S::line(lines + l * 64), lo = S::low(v), hi = S::high(v);
            for (int m = 0; m < M; m++) {
                acc[m] = S::dot_u4(acc[m], lo, x + m * kActGroup + l * 8);
                acc[m] = S::dot_u4(acc[m], hi, x + m * kActGroup + l * 8 + 4);
            }
        }
    } else {
#pragma GCC unroll 8
        for (int l = 0; l < 8; l++) {
            typename S::I w = S::prepare_s8(S::line(lines + l * 64));
            for (int m = 0; m < M; m++) acc[m] = S::dot_s8(acc[m], w, x + m * kActGroup + l * 4);
        }
    }
}

template <class S, int M, int I4>
inline void dot_pairs(typename S::I v, const int16_t* x, typename S::Acc16 (&acc)[M]) {
    typename S::I w = S::template pair_u4<I4>(v);
    for (int m = 0; m < M; m++) acc[m] = S::dot_pair(acc[m], w, x + m * kActGroup + 2 * I4);
}

template <class S, int M, int WBits>
inline void dot32(const uint8_t* lines, const int16_t* x, typename S::Acc16 (&acc)[M]) {
    for (int m = 0; m < M; m++) acc[m] = S::acc16();
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++, x += 8) {
        if constexpr (WBits == 4) {
            typename S::I v = S::line(lines + l * 64);
            dot_pairs<S, M, 0>(v, x, acc);
            dot_pairs<S, M, 1>(v, x, acc);
            dot_pairs<S, M, 2>(v, x, acc);
            dot_pairs<S, M, 3>(v, x, acc);
        } else {
            for (int half = 0; half < 2; half++) {  // line 2l holds inputs 0…3 of these 8, line 2l+1 inputs 4…7
                typename S::I v = S::line(lines + (2 * l + half) * 64);
                typename S::I even = S::template pair_s8<0>(v), odd = S::template pair_s8<1>(v);
                for (int m = 0; m < M; m++) {
                    acc[m] = S::dot_pair(acc[m], even, x + m * kActGroup + 2 * half);
                    acc[m] = S::dot_pair(acc[m], odd, x + m * kActGroup + 4 + 2 * half);
                }
            }
        }
    }
}

// out[m][r] = Σ_g scale[r, g] · Σ_s xscale[m, s] · dot(m, r, s) + offset[r, g] · gsum[m, g]
// for the 16 rows of one tile and activation rows m0…m0+M-1 (within one row block); s runs over the group's 32-input
// parts.
//   moves  tile_bytes() of weights, once for all M rows
// The dot product of 32 inputs is an exact integer; only the fp32 order over s and g counts, and it is the same for
// every M.
template <class S, int M, int WBits, int ABits, Meta MT>
void tile_quantized(const LinearWeights& w, const uint8_t* tile, const Activations& x, int m0, float* out) {
    using F = typename S::F;
    using I = typename S::I;
    using Acc = std::conditional_t<ABits == 8, typename S::Acc8, typename S::Acc16>;
    using X = std::conditional_t<ABits == 8, int8_t, int16_t>;
    constexpr int kHalves = kTile / S::kLanes, kLines = WBits == 4 ? 4 : 8;
    constexpr bool kOffsets = WBits == 4 || MT != Meta::kSym;

    F total[kHalves][M];
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) total[h][m] = S::zero();

    const size_t meta_size = w.tile_meta_bytes();
    for (size_t i = 0; i < meta_size; i += 64) S::prefetch(tile + kPrefetchBytes + i);
    const uint8_t* lines = tile + meta_size;
    const uint8_t* meta = tile;
    const size_t first = x.at(m0, 0);
    const X* xq = static_cast<const X*>(x.q) + first * kActGroup;
    const float* xscale = x.scale + first;
    const float* gsum = x.gsum + x.group_at(m0, 0);
    const int32_t* nsum = x.nsum + first;
    const int parts = w.group / kActGroup;

    for (int left = w.k / w.group; left > 0; left--, meta += meta_bytes(MT), gsum += kRowBlock) {
        const uint8_t* group_lines = lines;
        const X* group_x = xq;
        const float* group_scale = xscale;
        const int32_t* group_nsum = nsum;
        for (int h = 0; h < kHalves; h++) {
            F sum[M];
            for (int m = 0; m < M; m++) sum[m] = S::zero();
            lines = group_lines, xq = group_x, xscale = group_scale, nsum = group_nsum;
            for (int s = 0; s < parts; s++) {
                if (h == 0)
                    for (int l = 0; l < kLines; l++) S::prefetch(lines + l * 64 + kPrefetchBytes);
                Acc acc[M];
                dot32<S, M, WBits>(lines + h * S::kLanes * 4, xq, acc);
                for (int m = 0; m < M; m++) {
                    I dot;
                    if constexpr (ABits == 16)
                        dot = S::finish16(acc[m]);
                    else if constexpr (WBits == 4)
                        dot = S::finish_u4(acc[m]);
                    else
                        dot = S::finish_s8(acc[m], nsum[m]);
                    sum[m] = S::fma(S::to_float(dot), S::set1(xscale[m]), sum[m]);
                }
                lines += kLines * 64, xq += kRowBlock * kActGroup;
                xscale += kRowBlock, nsum += kRowBlock;
            }
            GroupMeta<S, WBits, MT> gm(meta, h * S::kLanes);
            for (int m = 0; m < M; m++) {
                total[h][m] = S::fma(sum[m], gm.scale, total[h][m]);
                if constexpr (kOffsets) total[h][m] = S::fma(S::set1(gsum[m]), gm.offset, total[h][m]);
            }
        }
    }
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) S::store(out + m * kTile + h * S::kLanes, total[h][m]);
}

// out[m][r] = Σ_k w[r, k] · x[m, k], one fused multiply-add after the other; fp32, fp16 or bf16 weights.
template <class S, int M, WeightKind KD>
void tile_dense(const LinearWeights& w, const uint8_t* tile, const Activations& x, int m0, float* out) {
    using F = typename S::F;
    constexpr int kHalves = kTile / S::kLanes, kBytes = KD == WeightKind::kF32 ? 4 : 2;
    const float* xf = x.f + static_cast<size_t>(m0) * w.k;
    F total[kHalves][M];
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) total[h][m] = S::zero();
    for (int k = 0; k < w.k; k++) {
        const uint8_t* p = tile + static_cast<size_t>(k) * kTile * kBytes;
        S::prefetch(p + kPrefetchBytes);
        for (int h = 0; h < kHalves; h++) {
            const uint8_t* q = p + h * S::kLanes * kBytes;
            F v;
            if constexpr (KD == WeightKind::kF32) v = S::load(reinterpret_cast<const float*>(q));
            if constexpr (KD == WeightKind::kF16) v = S::load_f16(reinterpret_cast<const uint16_t*>(q));
            if constexpr (KD == WeightKind::kBF16) v = S::load_bf16(reinterpret_cast<const uint16_t*>(q));
            for (int m = 0; m < M; m++)
                total[h][m] = S::fma(v, S::set1(xf[static_cast<size_t>(m) * w.k + k]), total[h][m]);
        }
    }
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) S::store(out + m * kTile + h * S::kLanes, total[h][m]);
}

using TileFn = void (*)(const LinearWeights&, const uint8_t*, const Activations&, int, float*);

template <class S, int M>
TileFn pick_tile_rows(const LinearWeights& w, int act_bits) {
    switch (w.kind) {
        case WeightKind::kF32:
            return tile_dense<S, M, WeightKind::kF32>;
        case WeightKind::kF16:
            return tile_dense<S, M, WeightKind::kF16>;
        case WeightKind::kBF16:
            return tile_dense<S, M, WeightKind::kBF16>;
        case WeightKind::kW8:
            if (w.meta == Meta::kSym)
                return act_bits == 8 ? tile_quantized<S, M, 8, 8, Meta::kSym> : tile_quantized<S, M, 8, 16, Meta::kSym>;
            return act_bits == 8 ? tile_quantized<S, M, 8, 8, Meta::kFloat> : tile_quantized<S, M, 8, 16, Meta::kFloat>;
        default:
            break;
    }
    switch (w.meta) {
        case Meta::kSym:
            return act_bits == 8 ? tile_quantized<S, M, 4, 8, Meta::kSym> : tile_quantized<S, M, 4, 16, Meta::kSym>;
        case Meta::kZero4:
            return act_bits == 8 ? tile_quantized<S, M, 4, 8, Meta::kZero4> : tile_quantized<S, M, 4, 16, Meta::kZero4>;
        case Meta::kOffset16:
            return act_bits == 8 ? tile_quantized<S, M, 4, 8, Meta::kOffset16>
                                 : tile_quantized<S, M, 4, 16, Meta::kOffset16>;
        default:
            return act_bits == 8 ? tile_quantized<S, M, 4, 8, Meta::kFloat> : tile_quantized<S, M, 4, 16, Meta::kFloat>;
    }
}

template <class S>
TileFn pick_tile(const LinearWeights& w, int act_bits, int m) {
    switch (m) {
        case 1:
            return pick_tile_rows<S, 1>(w, act_bits);
        case 2:
            return pick_tile_rows<S, 2>(w, act_bits);
        case 3:
            return pick_tile_rows<S, 3>(w, act_bits);
        case 4:
            return pick_tile_rows<S, 4>(w, act_bits);
        default:
            break;
    }
    if constexpr (S::kRows == 8) {
        switch (m) {
            case 5:
                return pick_tile_rows<S, 5>(w, act_bits);
            case 6:
                return pick_tile_rows<S, 6>(w, act_bits);
            case 7:
                return pick_tile_rows<S, 7>(w, act_bits);
            default:
                return pick_tile_rows<S, 8>(w, act_bits);
        }
    }
    return nullptr;
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

template <class S>
void linear(const LinearArgs& a) {
    const LinearWeights& w = *a.w;
    const size_t stride = w.tile_bytes();
    TileFn full = pick_tile<S>(w, a.x->bits, S::kRows);
    const int rest = a.rows % S::kRows;
    TileFn last = rest ? pick_tile<S>(w, a.x->bits, rest) : full;
    float out[kTile * kRowBlock];
    for (int panel = 0; panel < a.rows; panel += kPanelRows) {
        const int end = imin(a.rows, panel + kPanelRows);
        for (int t = a.t0; t < a.t1; t++) {
            const uint8_t* tile = w.data + t * stride;
            for (int m = panel; m < end; m += S::kRows) {
                const int rows = imin(S::kRows, end - m);
                (rows == S::kRows ? full : last)(w, tile, *a.x, m, out);
                store_tile<S>(a, out, m, rows, t * kTile);
            }
        }
    }
}

}  // namespace
}  // namespace tinychat
