// Linear layers: one kernel template for codes of any form, 8-bit and 16-bit activations, 1…8 rows, any ISA.
// Included by the ISA translation units only.
#pragma once

#include <cstring>
#include <type_traits>

#include "beside_impl.h"
#include "codes_impl.h"
#include "float_codes_impl.h"
#include "tiles_impl.h"

namespace tinychat {
namespace {

// The same as `dot` for units that multiply small matrices: two rows of activations at a time, 8 inputs deep.
template <class S, int M, WeightKind C, int First, int Count>
inline __attribute__((always_inline)) void dot_pairs(const uint8_t* lines, const int8_t* x, typename S::I (&out)[M]) {
    typename S::Pair acc[(M + 1) / 2];
    for (auto& a : acc) a = S::pair();
    unroll<Count / 2>([&](auto b) {
        constexpr int line = First + 2 * b;
        const typename S::Pair w = S::eights(byte_line<S, C, line>(lines), byte_line<S, C, line + 1>(lines));
        for (int m = 0; m < M; m += 2) {  // the last of an odd number of rows is a pair with itself
            const int8_t* row = x + m * kActGroup + line * 4;
            acc[m / 2] = S::dot_eights(acc[m / 2], w, row, m + 1 < M ? row + kActGroup : row);
        }
    });
    for (int m = 0; m < M; m++) out[m] = m % 2 ? S::second(acc[m / 2]) : S::first(acc[m / 2]);
}

// Integer dot product of Count byte-lines with kLanes rows, for M rows of activations.
//   lines  the first code line of 32 inputs, at the first of these rows;  x  integers of the first activation row
//   nsum   of these 32 inputs, which signed bytes need, so their Count is 8
template <class S, int M, WeightKind C, int First, int Count>
inline __attribute__((always_inline)) void dot(const uint8_t* lines, const int8_t* x, const int32_t* nsum,
                                               typename S::I (&out)[M]) {
    if constexpr (S::kMatrices && M > 1) {
        dot_pairs<S, M, C, First, Count>(lines, x, out);
    } else if constexpr (has_signed_bytes(C)) {
        typename S::Acc8 acc[M];
        for (int m = 0; m < M; m++) acc[m] = S::acc8();
        unroll<Count>([&](auto b) {
            const typename S::I w = S::prepare_s8(byte_line<S, C, b>(lines));
            for (int m = 0; m < M; m++) acc[m] = S::dot_s8(acc[m], w, x + m * kActGroup + b * 4);
        });
        for (int m = 0; m < M; m++) out[m] = S::finish_s8(acc[m], nsum[m]);
    } else {
        // Byte-lines whose products a narrow accumulator holds
        constexpr int kFit = S::kWide || largest_byte(C) <= 15 ? Count : largest_byte(C) <= 31 ? 4 : 2;
        unroll<Count / kFit>([&](auto part) {
            typename S::Acc8 acc[M];
            for (int m = 0; m < M; m++) acc[m] = S::acc8();
            unroll<kFit>([&](auto b) {
                constexpr int line = First + part * kFit + b;
                const typename S::I w = byte_line<S, C, line>(lines);
                for (int m = 0; m < M; m++) acc[m] = S::dot_u8(acc[m], w, x + m * kActGroup + line * 4);
            });
            for (int m = 0; m < M; m++) out[m] = part ? S::addi(out[m], S::finish_u8(acc[m])) : S::finish_u8(acc[m]);
        });
    }
}

// With 16-bit activations: each 8 inputs lie in the order 0 2 4 6 1 3 5 7.
template <class S, int M, WeightKind C, int First, int Count>
inline __attribute__((always_inline)) void dot(const uint8_t* lines, const int16_t* x, const int32_t*,
                                               typename S::I (&out)[M]) {
    typename S::Acc16 acc[M];
    for (int m = 0; m < M; m++) acc[m] = S::acc16();
    const auto add = [&](typename S::I w, int at) {
        for (int m = 0; m < M; m++) acc[m] = S::dot_pair(acc[m], w, x + m * kActGroup + at);
    };
    if constexpr (C == WeightKind::kW4) {
        unroll<Count / 2>([&](auto l) {
            constexpr int line = First / 2 + l;
            const typename S::I v = S::line(lines + line * 64);
            unroll<4>([&](auto i) { add(S::template pair_u4<i>(v), line * 8 + 2 * i); });
        });
    } else {
        unroll<Count>([&](auto b) {  // an even byte-line holds inputs 0…3 of its 8, an odd one inputs 4…7
            constexpr int line = First + b, at = line / 2 * 8 + 2 * (line % 2);
            const typename S::I v = byte_line<S, C, line>(lines);
            add(S::template pair_8<0, has_signed_bytes(C)>(v), at);
            add(S::template pair_8<1, has_signed_bytes(C)>(v), at + 4);
        });
    }
    for (int m = 0; m < M; m++) out[m] = S::finish16(acc[m]);
}

// With sums that are there already: [32 inputs][their halves][8 rows][16 outputs]; the first half has them of all 32
// where codes are not cut in halves.
template <class S, int M, WeightKind C, int First, int Count>
inline __attribute__((always_inline)) void dot(const uint8_t*, const int32_t* sums, const int32_t*,
                                               typename S::I (&out)[M]) {
    static_assert(S::kLanes == kTile, "the sums of a row are one register");
    const int32_t* half = sums + First / 4 * kRowBlock * kTile;
    for (int m = 0; m < M; m++) out[m] = S::line(reinterpret_cast<const uint8_t*>(half + m * kTile));
}

// Where a stretch of groups begins: code lines, and the activations of M rows within one row block.
template <class X>
struct Stretch {
    const uint8_t* lines;
    const X* x;
    const float* xscale;
    const int32_t* nsum;
    const float* gsum;

    // 32 inputs further
    void next(int line_bytes) {
        lines += line_bytes, x += kRowBlock * kActGroup;
        xscale += kRowBlock, nsum += kRowBlock;
    }
};

// Bits of what dot() reads: activations in 8 or 16, or sums.
constexpr int kSummed = 32;
template <int ABits>
using Integers = std::conditional_t<ABits == 8, int8_t, std::conditional_t<ABits == 16, int16_t, int32_t>>;

template <int ABits>
Stretch<Integers<ABits>> stretch_at(const uint8_t* lines, const Activations& x, int m0, int k) {
    const size_t first = x.at(m0, k / kActGroup);
    return {lines, static_cast<const Integers<ABits>*>(x.q) + first * kActGroup, x.scale + first, x.nsum + first,
            x.gsum + x.group_at(m0, k / x.group)};
}

template <class S, int M>
using Totals = typename S::F[kTile / S::kLanes][M];

// total[m][r] += Σ_g scale[r, g] · Σ_s xscale[m, s] · dot(m, r, s) + offset[r, g] · gsum[m, g]
// over the groups g0…g1-1 of what is opened beside, of `parts` times 32 inputs each, for the 16 rows of one tile; s
// runs over the parts. The dot product of 32 inputs is an exact integer; only the fp32 order over s and g counts, and
// it is the same for every M, and whether the codes were opened before or not.
template <class S, int M, WeightKind C, int ABits>
inline void add_groups(Stretch<Integers<ABits>> at, int g0, int g1, int parts, const Beside& beside, bool stored,
                       Totals<S, M>& total) {
    using F = typename S::F;
    using I = typename S::I;
    constexpr int kHalves = kTile / S::kLanes, kLines = code_bits(C);
    constexpr bool kOpened = C == WeightKind::kBytes || C == WeightKind::kSigned;
    const F zero = S::set1(beside.zero);
    for (int g = g0; g < g1; g++, at.gsum += kRowBlock) {
        Stretch<Integers<ABits>> p = at;
        for (int h = 0; h < kHalves; h++) {
            F sum[M];
            for (int m = 0; m < M; m++) sum[m] = S::zero();
            p = at;
            for (int s = 0; s < parts; s++) {
                if (h == 0 && !kOpened) fetch_weights<S, M>(p.lines, kLines * 64);
                I d[M];
                dot<S, M, C, 0, 8>(p.lines + h * S::kLanes * 4, p.x, p.nsum, d);
                for (int m = 0; m < M; m++) sum[m] = S::fma(S::to_float(d[m]), S::set1(p.xscale[m]), sum[m]);
                p.next(kLines * 64);
            }
            const F scale = S::load(beside.scale + g * kTile + h * S::kLanes);
            for (int m = 0; m < M; m++) total[h][m] = S::fma(sum[m], scale, total[h][m]);
            if (has_signed_bytes(C) && !stored) continue;
            const F offset = stored ? S::load(beside.offset + g * kTile + h * S::kLanes) : S::mul(scale, zero);
            for (int m = 0; m < M; m++) total[h][m] = S::fma(S::set1(at.gsum[m]), offset, total[h][m]);
        }
        at = {p.lines, p.x, p.xscale, p.nsum, at.gsum};
    }
}

// The same for groups of 16, two of which share 32 activations: total += xscale · (scale · dot + scale' · dot') + …
template <class S, int M, WeightKind C, int ABits>
inline void add_half_groups(Stretch<Integers<ABits>> at, int g0, int g1, const Beside& beside, bool stored,
                            Totals<S, M>& total) {
    using F = typename S::F;
    using I = typename S::I;
    constexpr int kHalves = kTile / S::kLanes, kLines = code_bits(C);
    const F zero = S::set1(beside.zero);
    for (int g = g0; g < g1; g += 2, at.gsum += 2 * kRowBlock) {
        if (C != WeightKind::kBytes) fetch_weights<S, M>(at.lines, kLines * 64);
        for (int h = 0; h < kHalves; h++) {
            const int row = g * kTile + h * S::kLanes;
            const F scale = S::load(beside.scale + row), scale2 = S::load(beside.scale + kTile + row);
            const F offset = stored ? S::load(beside.offset + row) : S::mul(scale, zero);
            const F offset2 = stored ? S::load(beside.offset + kTile + row) : S::mul(scale2, zero);
            I first[M], second[M];
            dot<S, M, C, 0, 4>(at.lines + h * S::kLanes * 4, at.x, nullptr, first);
            F sum[M];
            for (int m = 0; m < M; m++) sum[m] = S::mul(S::to_float(first[m]), scale);
            dot<S, M, C, 4, 4>(at.lines + h * S::kLanes * 4, at.x, nullptr, second);
            for (int m = 0; m < M; m++) {
                sum[m] = S::fma(S::to_float(second[m]), scale2, sum[m]);
                total[h][m] = S::fma(sum[m], S::set1(at.xscale[m]), total[h][m]);
                total[h][m] = S::fma(S::set1(at.gsum[m]), offset, total[h][m]);
                total[h][m] = S::fma(S::set1(at.gsum[kRowBlock + m]), offset2, total[h][m]);
            }
        }
        at.next(kLines * 64);
    }
}

template <class S, int M, WeightKind C, int ABits, bool Half>
inline void add_any_groups(const Stretch<Integers<ABits>>& at, const LinearWeights& w, int g0, int g1,
                           const Beside& beside, Totals<S, M>& total) {
    if constexpr (Half)
        add_half_groups<S, M, C, ABits>(at, g0, g1, beside, w.stores_offsets(), total);
    else
        add_groups<S, M, C, ABits>(at, g0, g1, w.group / kActGroup, beside, w.stores_offsets(), total);
}

// Outputs of one tile for activation rows m0…m0+M-1, within one row block: out[m][16].
//   moves  tile_bytes() of weights, once for all M rows
template <class S, int M, WeightKind C, int ABits, bool Half>
void tile_quantized(const LinearWeights& w, const uint8_t* tile, const Activations& x, int m0, float* out) {
    constexpr int kHalves = kTile / S::kLanes;
    Totals<S, M> total;
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) total[h][m] = S::zero();
    const size_t meta_size = w.tile_meta_bytes();
    fetch_weights<S, M>(tile, static_cast<int>(meta_size));
    const int run = w.group < kSuper ? kSuper / w.group : 1, all = w.groups();
    Beside beside;
    for (int g = 0; g < all; g += run) {
        const int groups = imin(run, all - g), k = g * w.group;
        open_beside<S>(w, tile, g, groups, beside);
        const uint8_t* lines = tile + meta_size + static_cast<size_t>(k / 32) * code_bits(C) * 64;
        add_any_groups<S, M, C, ABits, Half>(stretch_at<ABits>(lines, x, m0, k), w, 0, groups, beside, total);
    }
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) S::store(out + m * kTile + h * S::kLanes, total[h][m]);
}

// Codes of a tile that are opened once for many rows of activations; they stay in the nearest caches.
constexpr int kOpenInputs = 1024;
struct alignas(64) OpenedTile {
    uint8_t lines[kOpenInputs * kTile];
    Beside beside;
};

// Adds the opened inputs from k on to out[m][16], of activation rows m0…m0+M-1.
template <class S, int M, WeightKind C, int ABits, bool Half>
void opened_quantized(const LinearWeights& w, const OpenedTile& t, const Activations& x, int m0, int k, int groups,
                      float* out) {
    constexpr int kHalves = kTile / S::kLanes;
    Totals<S, M> total;
    for (int h = 0; h < kHalves; h++)
        for (int m = 0; m < M; m++) total[h][m] = S::load(out + m * kTile + h * S::kLanes);
    add_any_groups<S, M, C, ABits, Half>(stretch_at<ABits>(t.lines, x, m0, k), w, 0, groups, t.beside, total);
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
        fetch_weights<S, M>(p, kTile * kBytes);
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

using OpenedFn = void (*)(const LinearWeights&, const OpenedTile&, const Activations&, int, int, int, float*);

// f(C) for the kind, a constant.
template <class Fn>
auto with_codes(WeightKind kind, Fn f) {
    switch (kind) {
#define TC_KIND(k)      \
    case WeightKind::k: \
        return f(std::integral_constant<WeightKind, WeightKind::k>{})
        TC_KIND(kW2);
        TC_KIND(kW3);
        TC_KIND(kW4);
        TC_KIND(kW5);
        TC_KIND(kW6);
        TC_KIND(kIq4Nl);
        TC_KIND(kE2m1);
        default:
            TC_KIND(kW8);
#undef TC_KIND
    }
}

template <class S>
TileFn pick_tile(const LinearWeights& w, int act_bits, int rows) {
    return with_rows<S>(rows, [&](auto m) -> TileFn {
        constexpr int M = m;
        if (w.kind == WeightKind::kF32) return tile_dense<S, M, WeightKind::kF32>;
        if (w.kind == WeightKind::kF16) return tile_dense<S, M, WeightKind::kF16>;
        if (w.kind == WeightKind::kBF16) return tile_dense<S, M, WeightKind::kBF16>;
        if constexpr (M <= kFloatRows<S>) {
            if (w.kind == WeightKind::kE4m3) return tile_floats<S, M, WeightKind::kE4m3>;
            if (w.kind == WeightKind::kNf4) return tile_floats<S, M, WeightKind::kNf4>;
        }
        return with_codes(w.kind, [&](auto c) -> TileFn {
            constexpr WeightKind C = c;
            if constexpr (!has_signed_bytes(C))
                if (w.group < kActGroup)
                    return act_bits == 8 ? tile_quantized<S, M, C, 8, true> : tile_quantized<S, M, C, 16, true>;
            return act_bits == 8 ? tile_quantized<S, M, C, 8, false> : tile_quantized<S, M, C, 16, false>;
        });
    });
}

template <class S>
OpenedFn pick_opened(const LinearWeights& w, int act_bits, int rows) {
    constexpr WeightKind kB = WeightKind::kBytes, kS = WeightKind::kSigned;
    return with_rows<S>(rows, [&](auto m) -> OpenedFn {
        constexpr int M = m;
        if (has_signed_bytes(w.kind))
            return act_bits == 8 ? opened_quantized<S, M, kS, 8, false> : opened_quantized<S, M, kS, 16, false>;
        if (w.group < kActGroup)
            return act_bits == 8 ? opened_quantized<S, M, kB, 8, true> : opened_quantized<S, M, kB, 16, true>;
        return act_bits == 8 ? opened_quantized<S, M, kB, 8, false> : opened_quantized<S, M, kB, 16, false>;
    });
}

template <class S>
void linear_direct(const LinearArgs& a) {
    const LinearWeights& w = *a.w;
    const size_t stride = w.tile_bytes();
    const int block = has_float_codes(w.kind) ? float_block<S>(a.rows) : S::kRows;
    const RowKernels<TileFn> kernels(block, a.rows, [&](int m) { return pick_tile<S>(w, a.x->bits, m); });
    float out[kTile * kRowBlock];
    for (int panel = 0; panel < a.rows; panel += kPanelRows) {
        const int end = imin(a.rows, panel + kPanelRows);
        for (int t = a.t0; t < a.t1; t++)
            kernels.each(panel, end, [&](int m, int rows, TileFn kernel) {
                kernel(w, w.data + t * stride, *a.x, m, out);
                store_tile<S>(a, out, m, rows, t * kTile);
            });
    }
}

// Prefill: a tile's codes are opened once for a panel of rows, so that every form runs at one rate.
// pick(rows): the kernel for so many rows of a block.
template <class S, class Pick>
void linear_opened(const LinearArgs& a, Pick pick) {
    const LinearWeights& w = *a.w;
    const size_t stride = w.tile_bytes(), meta = w.tile_meta_bytes();
    const RowKernels<OpenedFn> kernels(S::kRows, a.rows, pick);
    const int most = kOpenInputs / w.group;
    OpenedTile tile;
    alignas(64) float out[kPanelRows * kTile];
    for (int panel = 0; panel < a.rows; panel += kPanelRows) {
        const int end = imin(a.rows, panel + kPanelRows);
        for (int t = a.t0; t < a.t1; t++) {
            const uint8_t* packed = w.data + t * stride;
            memset(out, 0, sizeof out);
            for (int g = 0; g < w.groups(); g += most) {
                const int groups = imin(most, w.groups() - g), k = g * w.group;
                open_beside<S>(w, packed, g, groups, tile.beside);
                with_codes(w.kind, [&](auto c) {
                    constexpr WeightKind C = c;
                    open_codes<S, C>(packed + meta + static_cast<size_t>(k / 32) * code_bits(C) * 64,
                                     groups * w.group / 32, tile.lines);
                });
                kernels.each(panel, end, [&](int m, int, OpenedFn kernel) {
                    kernel(w, tile, *a.x, m, k, groups, out + (m - panel) * kTile);
                });
            }
            kernels.each(panel, end, [&](int m, int rows, OpenedFn) {
                store_tile<S>(a, out + (m - panel) * kTile, m, rows, t * kTile);
            });
        }
    }
}

// The same for codes that are floats: opened into fp32.
template <class S>
void linear_opened_floats(const LinearArgs& a) {
    using StretchFn = void (*)(const uint8_t*, const float*, size_t, int, const float*, float*);
    const LinearWeights& w = *a.w;
    const RowKernels<StretchFn> kernels(float_block<S>(a.rows), a.rows, [](int m) {
        return with_rows<S>(m, [](auto m) -> StretchFn { return add_stretch<S, m, WeightKind::kF32>; });
    });
    const int stretch = stretch_of(w.group), run = w.group < kSuper ? kSuper / w.group : 1;
    alignas(64) float values[kMostStretch * kTile], out[kPanelRows * kTile];
    Beside beside;
    for (int panel = 0; panel < a.rows; panel += kPanelRows) {
        const int end = imin(a.rows, panel + kPanelRows);
        for (int t = a.t0; t < a.t1; t++) {
            const uint8_t *tile = w.data + t * w.tile_bytes(), *lines = tile + w.tile_meta_bytes();
            memset(out, 0, sizeof out);
            for (int k = 0, g = 0; k < w.k; k += stretch) {
                if (k % (run * w.group) == 0)
                    g = k / w.group, open_beside<S>(w, tile, g, imin(run, w.groups() - g), beside);
                open_floats<S>(w.kind, lines + static_cast<size_t>(k) * kTile * code_bits(w.kind) / 8, stretch / 32,
                               values);
                const float* scale = beside.scale + (k / w.group - g) * kTile;
                kernels.each(panel, end, [&](int m, int, StretchFn kernel) {
                    kernel(reinterpret_cast<const uint8_t*>(values), a.x->f + static_cast<size_t>(m) * w.k + k, w.k,
                           stretch / 32, scale, out + (m - panel) * kTile);
                });
            }
            kernels.each(panel, end, [&](int m, int rows, StretchFn) {
                store_tile<S>(a, out + (m - panel) * kTile, m, rows, t * kTile);
            });
        }
    }
}

// Opening takes a pass over the codes, so it pays where a tile's codes would be read by more than two blocks of rows.
// 8-bit codes are bytes already; 4-bit ones come cheap to 8 rows at once, and to 16-bit activations without it.
template <class S>
void linear(const LinearArgs& a) {
    const WeightKind kind = a.w->kind;
    if (a.rows <= 2 * S::kRows || a.w->dense()) return linear_direct<S>(a);
    if (has_float_codes(kind)) return linear_opened_floats<S>(a);
    const bool cheap =
        kind == WeightKind::kW8 || (kind == WeightKind::kW4 && (S::kRows == kRowBlock || a.x->bits == 16));
    if (cheap || a.w->group > kOpenInputs) return linear_direct<S>(a);
    linear_opened<S>(a, [&](int m) { return pick_opened<S>(*a.w, a.x->bits, m); });
}

}  // namespace
}  // namespace tinychat
