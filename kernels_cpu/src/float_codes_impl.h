// Linear layers whose codes are floats of 8 and 4 bits: e4m3 (FP8) and nf4. Activations stay in fp32.
// Included by the ISA translation units only.
#pragma once

#include <cstring>

#include "beside_impl.h"
#include "codes_impl.h"
#include "tiles_impl.h"

namespace tinychat {
namespace {

constexpr int kMostStretch = 128;  // inputs whose products are summed before they are scaled: as the group allows

// Rows that one pass serves: each has two sums, of which 16 registers hold those of five rows.
template <class S>
constexpr int kFloatRows = S::kRegisters < 32 ? imin(S::kRows, 5) : S::kRows;
// Rows of a block where there are so many in all: panels are whole blocks.
template <class S>
int float_block(int rows) {
    return rows <= kFloatRows<S> || kPanelRows % kFloatRows<S> == 0 ? kFloatRows<S> : kFloatRows<S> / 2 * 2;
}

inline int stretch_of(int group) { return group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32; }

// f(k, value) for the 32 inputs of kLanes rows, in their order, k a constant. lines: the first of these inputs, of the
// tile; h: the first of these rows. Values of e4m3 are 2^-8 of themselves (code_unit).
template <class S, WeightKind C, class Fn>
inline __attribute__((always_inline)) void each_value(const uint8_t* lines, int h, const typename S::Table& table,
                                                      Fn f) {
    if constexpr (C == WeightKind::kE4m3) {
        unroll<16>([&](auto p) {
            typename S::F even, odd;
            S::e4m3_pair(lines + p * 2 * kTile + h * 2, even, odd);
            f(std::integral_constant<int, 2 * p>{}, even);
            f(std::integral_constant<int, 2 * p + 1>{}, odd);
        });
    } else {
        unroll<4>([&](auto l) {
            const typename S::I w = S::line(lines + l * 64 + h * 4);
            unroll<8>([&](auto k) {  // low nibbles hold inputs 0…3 of 8, high ones 4…7
                constexpr int nibble = k % 4 * 2 + k / 4;
                f(std::integral_constant<int, 8 * l + k>{}, S::lookup(table, S::template right32<4 * nibble>(w)));
            });
        });
    }
}

// out[m][r] += scale[r] · Σ_k value[r, k] · x[m, k] over `parts` times 32 inputs, for the 16 rows of one tile. Even and
// odd inputs have a sum each; their order is the same for every M, and whether values were opened before or not.
//   at  code lines, or opened values: fp32 [inputs][16]
template <class S, int M, WeightKind C>
inline void add_stretch(const uint8_t* at, const float* x, size_t ldx, int parts, const float* scale, float* out) {
    using F = typename S::F;
    constexpr bool kOpened = C == WeightKind::kF32;
    constexpr int kBytes = kOpened ? 32 * kTile * 4 : code_bits(C) * 64;
    const typename S::Table table = S::table(kNf4Values);
    for (int h = 0; h < kTile; h += S::kLanes) {
        F sum[2][M];
        for (int m = 0; m < M; m++) sum[0][m] = sum[1][m] = S::zero();
        const uint8_t* p = at;
        const float* from = x;
        for (int s = 0; s < parts; s++, p += kBytes, from += 32) {
            const auto add = [&](int k, F v) __attribute__((always_inline)) {
                for (int m = 0; m < M; m++) sum[k % 2][m] = S::fma(v, S::set1(from[m * ldx + k]), sum[k % 2][m]);
            };
            if constexpr (kOpened) {
                for (int k = 0; k < 32; k += 2)
                    for (int odd = 0; odd < 2; odd++)
                        add(k + odd, S::load(reinterpret_cast<const float*>(p) + (k + odd) * kTile + h));
            } else {
                if (h == 0) fetch_weights<S, M>(p, kBytes);
                each_value<S, C>(p, h, table, add);
            }
        }
        const F s = S::load(scale + h);
        for (int m = 0; m < M; m++) {
            float* y = out + m * kTile + h;
            S::store(y, S::fma(S::add(sum[0][m], sum[1][m]), s, S::load(y)));
        }
    }
}

// Outputs of one tile for activation rows m0…m0+M-1: out[m][16].
//   moves  tile_bytes() of weights, once for all M rows
template <class S, int M, WeightKind C>
void tile_floats(const LinearWeights& w, const uint8_t* tile, const Activations& x, int m0, float* out) {
    const int stretch = stretch_of(w.group), run = w.group < kSuper ? kSuper / w.group : 1;
    const uint8_t* lines = tile + w.tile_meta_bytes();
    const float* from = x.f + static_cast<size_t>(m0) * w.k;
    fetch_weights<S, M>(tile, static_cast<int>(w.tile_meta_bytes()));
    memset(out, 0, sizeof(float) * M * kTile);
    Beside beside;
    for (int g = 0; g < w.groups(); g += run) {
        const int groups = imin(run, w.groups() - g);
        open_beside<S>(w, tile, g, groups, beside);
        for (int i = 0; i < groups; i++)
            for (int k = 0; k < w.group; k += stretch, lines += stretch * kTile * code_bits(C) / 8, from += stretch)
                add_stretch<S, M, C>(lines, from, w.k, stretch / 32, beside.scale + i * kTile, out);
    }
}

// Values of `parts` times 32 inputs of a tile → fp32 [inputs][16].
template <class S, WeightKind C>
void open_values(const uint8_t* lines, int parts, float* out) {
    const typename S::Table table = S::table(kNf4Values);
    for (; parts > 0; parts--, lines += code_bits(C) * 64, out += 32 * kTile)
        for (int h = 0; h < kTile; h += S::kLanes)
            each_value<S, C>(lines, h, table, [&](int k, typename S::F v) { S::store(out + k * kTile + h, v); });
}

template <class S>
void open_floats(WeightKind kind, const uint8_t* lines, int parts, float* out) {
    if (kind == WeightKind::kE4m3) return open_values<S, WeightKind::kE4m3>(lines, parts, out);
    open_values<S, WeightKind::kNf4>(lines, parts, out);
}

}  // namespace
}  // namespace tinychat
