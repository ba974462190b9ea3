// Scores and weighted sums over complete blocks in 4 bits: the loops of attention_impl.h on lines of codes.
#pragma once

#include "cache_impl.h"

namespace tinychat {
namespace {

// to[c][p] = q[p] · key, for C registers of slots. q: [head_dim][P]; keys: lines; grids: scales of their channels, and,
// dim behind them, offsets. Blocks lie far apart: lines of the next keys come meanwhile, and of these slots' values.
template <class S, int P, int C>
void score_lines(const uint8_t* const* keys, const float* const* grids, const float* q, int d, int dim,
                 const uint8_t* const* ahead, const uint8_t* const* behind, float* const* to) {
    using F = typename S::F;
    constexpr int kBlocks = C * S::kLanes > kBlockSlots ? C * S::kLanes / kBlockSlots : 1;
    F sum[P][C];
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) sum[p][c] = S::zero();
    for (int i = 0; i < d; i += 8) {
        typename S::I line[C];
        for (int c = 0; c < C; c++) line[c] = S::line(keys[c] + i * 8);
        for (int block = 0; block < kBlocks; block++) {
            __builtin_prefetch(behind[block] + i * 8, 0, 2);
            S::prefetch(ahead[block] + i * 8);
        }
        const int n = d - i < 8 ? d - i : 8;
        auto channel = [&](int j) {
            F k[C];
            for (int c = 0; c < C; c++) {
                k[c] = S::fma(S::nibble(line[c]), S::set1(grids[c][i + j]), S::set1(grids[c][dim + i + j]));
                line[c] = S::shift(line[c], 1);
            }
#pragma GCC unroll 12
            for (int p = 0; p < P; p++) {
                const F x = S::set1(q[p]);
                for (int c = 0; c < C; c++) sum[p][c] = S::fma(x, k[c], sum[p][c]);
            }
            q += P;
        };
        if (n == 8)
            for (int j = 0; j < 8; j++) channel(j);
        else
            for (int j = 0; j < n; j++) channel(j);
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) S::store(to[c] + p * kPartSlots, sum[p][c]);
}

// scores[p][slot] = q[p] · key[slot] for the blocks of slots s0 … n-1 of a part.
template <class S, int P>
void score_part4(const AttentionArgs& a, const float* q, int part, int s0, int n, float* scores) {
    const int d = a.kv->head_dim, dim = a.kv->padded_dim();
    constexpr int kRegisters = kBlockSlots / S::kLanes;  // of a block
    constexpr int kWide = P > S::kPairs / 2 ? 1 : 2;     // side by side, as long as there are registers
    constexpr int kBlocks = kWide > kRegisters ? 2 : 1;
    float grids[kBlocks][2 * kMaxHeadDim];
    const int* blocks = a.blocks + part * (kPartSlots / kBlockSlots);
    for (int s = s0; s < n;) {
        const int count = s + kBlocks * kBlockSlots <= n ? kBlocks : 1;
        const uint8_t *keys[kWide], *ahead[kBlocks], *behind[kBlocks];
        const float* opened[kWide];
        float* to[kWide];
        for (int block = 0; block < count; block++, s += kBlockSlots) {
            const Block4 here(*a.kv, blocks[s / kBlockSlots], a.at.layer, a.kv_head);
            open_key_grids<S>(here, grids[block], grids[block] + dim);
            const int later = s + count * kBlockSlots < n ? s + count * kBlockSlots : s;
            const Block4 next(*a.kv, blocks[later / kBlockSlots], a.at.layer, a.kv_head);
            for (size_t at = 0; at < a.kv->grid_bytes(); at += 64) S::prefetch(next.grids + at);
            ahead[block] = next.keys, behind[block] = here.values;
            for (int r = 0; r < kRegisters; r += kWide) {
                for (int c = 0; c < kWide && c < kRegisters; c++) {
                    const int place = kBlocks == 2 ? block : c;
                    keys[place] = here.keys + (r + c) * S::kLanes * 4;
                    opened[place] = grids[block];
                    to[place] = scores + s + (r + c) * S::kLanes;
                }
                if (kBlocks == 1) score_lines<S, P, kWide>(keys, opened, q, d, dim, ahead, behind, to);
            }
        }
        if (kBlocks == 2 && count == 2) score_lines<S, P, kWide>(keys, opened, q, d, dim, ahead, behind, to);
        if (kBlocks == 2 && count == 1) score_lines<S, P, 1>(keys, opened, q, d, dim, ahead, behind, to);
    }
}

// Weights of one group of channels times the scales of its slots, and what they make of the
// offsets, which is where the sums begin.
template <class S, int P>
void scale_weights(const AttentionArgs& a, int part, int s0, int n_slots, const float* weights, int group,
                   float* scaled, float* offsets) {
    using V = V16<S>;
    V sum[P];
    for (int p = 0; p < P; p++) sum[p] = V::set1(0.0f);
    for (int s = s0; s < n_slots; s += kBlockSlots) {
        const Block4 b(*a.kv, a.blocks[(part * kPartSlots + s) / kBlockSlots], a.at.layer, a.kv_head);
        const V scale = open_scales<S>(b.value_scales(group)), offset = scale * open_zeros<S>(b.value_zeros(group));
        for (int p = 0; p < P; p++) {
            const V w = V::load(weights + p * kPartSlots + s);
            (w * scale).store(scaled + p * kPartSlots + s);
            sum[p] = V::fma(w, offset, sum[p]);
        }
    }
    for (int p = 0; p < P; p++) offsets[p] = sum[p].sum();
}

// values[p][d0…] = offset[p] + Σ_slot scaled[p][slot] · code[slot][d0…], C registers wide (of one group), slot after
// slot.
template <class S, int P, int C>
void weigh_lines(const AttentionArgs& a, int part, int s0, int n_slots, const float* scaled, const float* offsets,
                 int d0, float* values, int ld) {
    using F = typename S::F;
    const int last = (a.length + a.r1 - 1) / kBlockSlots;
    F acc[P][C];
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) acc[p][c] = S::set1(offsets[p]);
    for (int s = s0; s < n_slots; s += kBlockSlots) {
        const uint8_t* head = a.kv->values(a.blocks[(part * kPartSlots + s) / kBlockSlots], a.at.layer, a.kv_head);
        const int ahead = ((part + 1) * kPartSlots + s) / kBlockSlots;
        if (d0 == 0 && ahead < last) {
            const uint8_t* keys = a.kv->keys(a.blocks[ahead], a.at.layer, a.kv_head);
            for (size_t at = 0; at < a.kv->head_bytes(); at += 64) __builtin_prefetch(keys + at, 0, 2);
        }
        for (int h = 0; h < 2; h++) {
            typename S::I line[C];
            for (int c = 0; c < C; c++) {
                const int channel = d0 + c * S::kLanes;
                line[c] = S::line(head + (channel / 16 * 2 + h) * 64 + channel % 16 * 4);
            }
            const float* w = scaled + s + h * 8;
            for (int j = 0; j < 8; j++) {
                F x[C];
                for (int c = 0; c < C; c++) x[c] = S::nibble(line[c]), line[c] = S::shift(line[c], 1);
#pragma GCC unroll 12
                for (int p = 0; p < P; p++) {
                    const F y = S::set1(w[p * kPartSlots + j]);
                    for (int c = 0; c < C; c++) acc[p][c] = S::fma(y, x[c], acc[p][c]);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) S::store(values + p * ld + d0 + c * S::kLanes, acc[p][c]);
}

}  // namespace
}  // namespace tinychat
