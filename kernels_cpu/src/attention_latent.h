// Latent attention: of each slot one row is stored, in the order of keys, whose last values are the slot's value too.
// So values stand with slots in the lanes; a weighted sum of them is a sum over lanes for each channel.
#pragma once

#include "cache_impl.h"

namespace tinychat {
namespace {

// Channel i of a block's 16 slots.
template <class S>
inline V16<S> latent_lanes(const KvPool& kv, const uint8_t* head, int i) {
    V16<S> x;
    const int at = i * kBlockSlots;
    for (int j = 0; j < V16<S>::N; j++)
        x.v[j] = kv.bits == 8 ? S::load_i8(reinterpret_cast<const int8_t*>(head) + at + j * S::kLanes)
                              : S::load_f16(reinterpret_cast<const uint16_t*>(head) + at + j * S::kLanes);
    if (kv.bits != 8) return x;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + kv.code_bytes()) + i / kKvGroup * kBlockSlots;
    for (int j = 0; j < V16<S>::N; j++) x.v[j] = S::mul(x.v[j], S::load_f16(scales + j * S::kLanes));
    return x;
}

// The first n lanes, zeros in place of whatever the slots behind them hold.
template <class S>
inline V16<S> first_lanes(V16<S> x, int n) {
    alignas(64) float t[16];
    x.store(t);
    return V16<S>::load_n(t, n);
}

// values[p][i] = Σ_slot weight[p][slot] · channel i of the slot's value, for the slots s0…n_slots-1 of a part.
template <class S, int P>
void weigh_latent(const AttentionArgs& a, int part, int s0, int n_slots, const float* weights, float* values, int ld) {
    using V = V16<S>;
    const KvPool& kv = *a.kv;
    const uint8_t* heads[kPartSlots / kBlockSlots];
    const int first = s0 / kBlockSlots, whole = n_slots / kBlockSlots, rest = n_slots % kBlockSlots;
    for (int i = first; i < whole + (rest > 0); i++)
        heads[i] = kv.keys(a.blocks[part * (kPartSlots / kBlockSlots) + i], a.at.layer, a.kv_head);
    for (int i = 0; i < kv.latent; i++) {
        const int channel = kv.head_dim - kv.latent + i;
        V sum[P];
#pragma GCC unroll 12
        for (int p = 0; p < P; p++) sum[p] = V::set1(0.0f);
        auto add = [&](int block, V x) {
#pragma GCC unroll 12
            for (int p = 0; p < P; p++)
                sum[p] = V::fma(V::load(weights + p * kPartSlots + block * kBlockSlots), x, sum[p]);
        };
        for (int block = first; block < whole; block++) add(block, latent_lanes<S>(kv, heads[block], channel));
        if (rest) add(whole, first_lanes<S>(latent_lanes<S>(kv, heads[whole], channel), rest));
#pragma GCC unroll 12
        for (int p = 0; p < P; p++) values[p * ld + i] = sum[p].sum();
    }
    for (int p = 0; p < P; p++)
        for (int i = kv.latent; i < ld; i++) values[p * ld + i] = 0.0f;
}

// Writes to a.out how far latent values lie from their weighted mean.
template <class S>
void latent_spread(const SpreadArgs& a) {
    using V = V16<S>;
    float total = 0.0f;
    for (int s = 0; s < a.n; s++) total += a.weights[s];
    const V by = V::set1(total == 0.0f ? 1.0f / a.n : 1.0f / total), one = V::set1(1.0f), minus = V::set1(-1.0f);
    std::fill(a.out, a.out + a.n, 0.0f);
    for (int i = a.kv->head_dim - a.kv->latent; i < a.kv->head_dim; i++) {
        V mean = V::set1(0.0f);
        for (int s = 0; s < a.n; s += kBlockSlots) {
            const V x = latent_lanes<S>(*a.kv, a.kv->keys(a.blocks[s / kBlockSlots], a.layer, a.kv_head), i);
            const V w = total == 0.0f ? one : V::load_n(a.weights + s, a.n - s);
            mean = V::fma(w * by, a.n - s < kBlockSlots ? first_lanes<S>(x, a.n - s) : x, mean);
        }
        const V middle = V::set1(mean.sum());
        for (int s = 0; s < a.n; s += kBlockSlots) {
            const V x = latent_lanes<S>(*a.kv, a.kv->keys(a.blocks[s / kBlockSlots], a.layer, a.kv_head), i);
            const V d = V::fma(middle, minus, x);
            V::fma(d, d, V::load_n(a.out + s, a.n - s)).store_n(a.out + s, a.n - s);
        }
    }
    for (int s = 0; s < a.n; s++) a.out[s] = std::sqrt(a.out[s]);
}

}  // namespace
}  // namespace tinychat
