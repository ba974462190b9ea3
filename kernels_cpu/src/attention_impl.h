// Causal attention over the paged cache, online softmax in parts of 256 slots (FlashAttention's idea: nothing of size
// rows × context is ever stored). Parts are cut by slot number and merge in slot order, so the result for a row depends
// neither on the rows beside it nor on how parts were spread over threads.
#pragma once

#include <type_traits>

#include "attention_kv4.h"
#include "attention_latent.h"
#include "cache_impl.h"

namespace tinychat {
namespace {

// A pair is one row of one query head. Its running state: [0] max, [1] sum, [16…] weighted values (padded_dim).
constexpr int kState = 16;

// Pairs that share one conversion of keys and values to fp32.
struct PairBatch {
    int count;
    int from[kMaxPairs];   // first slot that the pair attends to, of this part
    int valid[kMaxPairs];  // behind the last one; 0: none at all
    const float* q;        // [head_dim][count]: side by side, so that one register addresses them all
    float* state[kMaxPairs];
    float *weights[kMaxPairs], *peak[kMaxPairs];  // where a scored pair leaves its exponentials of the part; or null
};

// How keys and values are read: fp16 as it is, or int8 with a scale for each slot and 32 channels.
struct Kv16 {
    using E = uint16_t;
    static constexpr int kGroup = kMaxHeadDim;
    template <class S>
    static typename S::F load(const E* p) {
        return S::load_f16(p);
    }
};
struct Kv4 {};  // complete blocks; a row's own block is as in Kv16
struct Kv8 {
    using E = int8_t;
    static constexpr int kGroup = kKvGroup;
    template <class S>
    static typename S::F load(const E* p) {
        return S::load_i8(p);
    }
};

// scores[p][slot] = q[p] · key[slot], for C registers of slots from s on, of which n are wanted in all. Slots in the
// lanes: no horizontal sums.
template <class S, class K, int P, int C>
void score_slots(const AttentionArgs& a, const PairBatch& b, int part, int s, int n, float* scores) {
    using F = typename S::F;
    using E = typename K::E;
    const int d = a.kv->head_dim;
    const size_t step = 2 * a.kv->head_bytes() / d;  // bytes to fetch ahead for every two dimensions
    const E* keys[C];
    const uint16_t* scales[C];
    const uint8_t *ahead[C], *behind[C];
    for (int c = 0; c < C; c++) {
        const int at = s + c * S::kLanes, later = at + C * S::kLanes, h = at % kBlockSlots;
        const int* block = a.blocks + part * (kPartSlots / kBlockSlots);
        const uint8_t* head = a.kv->keys(block[at / kBlockSlots], a.at.layer, a.kv_head);
        keys[c] = reinterpret_cast<const E*>(head) + h;
        scales[c] = reinterpret_cast<const uint16_t*>(head + a.kv->code_bytes()) + h;
        // Blocks lie far apart, so the hardware does not see the next one coming: its keys into L1, this one's values
        // into L2, little by little.
        ahead[c] = later < n ? a.kv->keys(block[later / kBlockSlots], a.at.layer, a.kv_head) : head;
        behind[c] = a.kv->values(block[at / kBlockSlots], a.at.layer, a.kv_head);
    }
    F total[P][C];
    const float* q = b.q;
    for (int g = 0; g < d; g += K::kGroup) {
        const int end = d - g < K::kGroup ? d : g + K::kGroup;
        F sum[P][C];
#pragma GCC unroll 12
        for (int p = 0; p < P; p++)
            for (int c = 0; c < C; c++) sum[p][c] = S::zero();
        auto dimension = [&](int i) {
            F k[C];
            for (int c = 0; c < C; c++) k[c] = K::template load<S>(keys[c] + i * kBlockSlots);
#pragma GCC unroll 12
            for (int p = 0; p < P; p++) {
                const F x = S::set1(q[p]);
                for (int c = 0; c < C; c++) sum[p][c] = S::fma(x, k[c], sum[p][c]);
            }
            q += P;
        };
        int i = g;
        for (; i + 2 <= end; i += 2) {
            for (int c = 0; c < C; c++) {
                S::prefetch(ahead[c]);
                __builtin_prefetch(behind[c], 0, 2);
                ahead[c] += step, behind[c] += step;
            }
            dimension(i);
            dimension(i + 1);
        }
        if (i < end) dimension(i);
        for (int c = 0; c < C; c++) {
            if (K::kGroup == kMaxHeadDim) {
#pragma GCC unroll 12
                for (int p = 0; p < P; p++) total[p][c] = sum[p][c];
            } else {
                const F scale = S::load_f16(scales[c] + g / K::kGroup * kBlockSlots);
#pragma GCC unroll 12
                for (int p = 0; p < P; p++)
                    total[p][c] = g == 0 ? S::mul(sum[p][c], scale) : S::fma(sum[p][c], scale, total[p][c]);
            }
        }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) S::store(scores + p * kPartSlots + s + c * S::kLanes, total[p][c]);
}

// For the blocks that any pair needs.
template <class S, class K, int P>
void score_part(const AttentionArgs& a, const PairBatch& b, int part, int s0, int n_slots, float* scores) {
    const int n = static_cast<int>(round_up(n_slots, kBlockSlots));
    // Two registers share a query's broadcast, as long as there are registers; scales want as many again.
    constexpr int kWide = K::kGroup != kMaxHeadDim && P > S::kPairs / 2 ? 1 : 2;
    int s = s0;
    for (; s + kWide * S::kLanes <= n; s += kWide * S::kLanes) score_slots<S, K, P, kWide>(a, b, part, s, n, scores);
    if (s < n) score_slots<S, K, P, 1>(a, b, part, s, n, scores);
}

// values[p][d0…] += Σ_slot weight[p][slot] · value[slot][d0…], C registers wide (of one group), slot after slot.
template <class S, class K, int P, int C>
void weigh_values(const AttentionArgs& a, int part, int s0, int n_slots, const float* weights, int d0, float* values,
                  int ld) {
    using F = typename S::F;
    using E = typename K::E;
    const int stride = a.kv->padded_dim();
    const size_t step = a.kv->head_bytes() / kBlockSlots;
    const int last = (a.length + a.r1 - 1) / kBlockSlots;
    F acc[P][C];
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) acc[p][c] = S::zero();
    for (int s = s0; s < n_slots; s += kBlockSlots) {
        const uint8_t* head = a.kv->values(a.blocks[(part * kPartSlots + s) / kBlockSlots], a.at.layer, a.kv_head);
        const E* v = reinterpret_cast<const E*>(head) + d0;
        const int end = n_slots - s < kBlockSlots ? n_slots - s : kBlockSlots;
        float scaled[K::kGroup == kMaxHeadDim ? 1 : P][kBlockSlots];
        if (K::kGroup != kMaxHeadDim) {
            const uint16_t* scales =
                reinterpret_cast<const uint16_t*>(head + a.kv->code_bytes()) + d0 / K::kGroup * kBlockSlots;
            for (int h = 0; h < kBlockSlots; h += S::kLanes) {
                const F scale = S::load_f16(scales + h);
#pragma GCC unroll 12
                for (int p = 0; p < P; p++)
                    S::store(scaled[p] + h, S::mul(S::load(weights + p * kPartSlots + s + h), scale));
            }
        }
        // Meanwhile the keys of the part behind this one come into L2: memory must not idle while values are weighed.
        const int ahead = ((part + 1) * kPartSlots + s) / kBlockSlots;
        const uint8_t* keys = d0 == 0 && ahead <= last ? a.kv->keys(a.blocks[ahead], a.at.layer, a.kv_head) : head;
        for (int j = 0; j < end; j++, v += stride) {
            __builtin_prefetch(keys, 0, 2);
            __builtin_prefetch(keys + step / 2, 0, 2);
            keys += step;
            F x[C];
            for (int c = 0; c < C; c++) x[c] = K::template load<S>(v + c * S::kLanes);
#pragma GCC unroll 12
            for (int p = 0; p < P; p++) {
                F w = S::set1(K::kGroup == kMaxHeadDim ? weights[p * kPartSlots + s + j] : scaled[p][j]);
                for (int c = 0; c < C; c++) acc[p][c] = S::fma(w, x[c], acc[p][c]);
            }
        }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++)
        for (int c = 0; c < C; c++) S::store(values + p * ld + d0 + c * S::kLanes, acc[p][c]);
}

// Weighted sums of the values of a part. scaled: room for as many weights.
template <class S, class K, int P>
void weigh_part(const AttentionArgs& a, int part, int s0, int n_slots, const float* weights, float* scaled,
                float* values) {
    const int dim = a.kv->padded_values();
    int d0 = 0;
    if (a.kv->latent) return weigh_latent<S, P>(a, part, s0, n_slots, weights, values, dim);
    if constexpr (std::is_same_v<K, Kv4>) {
        float offsets[P];
        for (int group = 0; d0 < dim; group++) {
            scale_weights<S, P>(a, part, s0, n_slots, weights, group, scaled, offsets);
            const int end = std::min(dim, d0 + kKv4Group);
            for (; d0 + 2 * S::kLanes <= end; d0 += 2 * S::kLanes)
                weigh_lines<S, P, 2>(a, part, s0, n_slots, scaled, offsets, d0, values, dim);
            for (; d0 < end; d0 += S::kLanes)
                weigh_lines<S, P, 1>(a, part, s0, n_slots, scaled, offsets, d0, values, dim);
        }
    } else {
        for (; d0 + 2 * S::kLanes <= dim; d0 += 2 * S::kLanes)
            weigh_values<S, K, P, 2>(a, part, s0, n_slots, weights, d0, values, dim);
        for (; d0 < dim; d0 += S::kLanes) weigh_values<S, K, P, 1>(a, part, s0, n_slots, weights, d0, values, dim);
    }
}

// Merge (max, sum, values) of a later part into a running state: both shrink to the common max.
template <class S>
inline void merge_state(float* state, float max, float sum, const float* values, int dim) {
    using V = V16<S>;
    if (state[1] == 0.0f) {  // nothing yet; a merged state's sum is at least e^0
        state[0] = max, state[1] = sum;
        memcpy(state + kState, values, dim * sizeof(float));
        return;
    }
    const float top = max > state[0] ? max : state[0];
    float d[16] = {state[0] - top, max - top}, w[16];
    exp16<S>(V::load(d)).store(w);
    state[0] = top;
    state[1] = std::fmaf(sum, w[1], state[1] * w[0]);
    const V old = V::set1(w[0]), fresh = V::set1(w[1]);
    for (int i = 0; i < dim; i += 16)
        V::fma(V::load(values + i), fresh, V::load(state + kState + i) * old).store(state + kState + i);
}

template <class S, class K, int P>
void attend_part(const AttentionArgs& a, const PairBatch& b, int part, float* scores, float* values) {
    using V = V16<S>;
    const int dim = a.kv->padded_values();
    int s0 = kPartSlots, n_slots = 0;  // what any pair attends to, from a whole block on
    for (int p = 0; p < P; p++) {
        n_slots = b.valid[p] > n_slots ? b.valid[p] : n_slots;
        if (b.valid[p] && b.from[p] < s0) s0 = b.from[p] / kBlockSlots * kBlockSlots;
    }
    for (int p = 0; p < P; p++)
        if (b.weights[p] && (!b.valid[p] || s0)) {
            memset(b.weights[p], 0, (n_slots ? s0 : kPartSlots) * sizeof(float));
            *b.peak[p] = -INFINITY;
        }
    if (n_slots == 0) return;
    if constexpr (std::is_same_v<K, Kv4>)
        score_part4<S, P>(a, b.q, part, s0, n_slots, scores);
    else
        score_part<S, K, P>(a, b, part, s0, n_slots, scores);

    const int padded = static_cast<int>(round_up(n_slots, kBlockSlots));
    float max[P], sum[P];
    for (int p = 0; p < P; p++) {
        float* s = scores + p * kPartSlots;
        if (a.at.cap != 0.0f)
            for (int i = s0; i < padded; i += 16) soft_cap<S>(V::load(s + i), a.at.cap).store(s + i);
        for (int i = s0; i < b.from[p]; i++) s[i] = -INFINITY;
        for (int i = b.valid[p] > s0 ? b.valid[p] : s0; i < padded; i++) s[i] = -INFINITY;
        V top = V::set1(-INFINITY);
        for (int i = s0; i < padded; i += 16) top = V::max(V::load(s + i), top);
        max[p] = top.largest();
    }
    for (int p = 0; p < P; p++) {  // apart from the above: a pair's exponentials overlap with the next one's
        float* s = scores + p * kPartSlots;
        const V shift = V::set1(b.valid[p] ? -max[p] : 0.0f);
        V total = V::set1(0.0f);
        for (int i = s0; i < padded; i += 16) {
            V e = V::map([](auto x) { return exp_below<S>(x); }, V::load(s + i) + shift);
            e.store(s + i);
            total = total + e;
        }
        sum[p] = total.sum();
        if (!b.weights[p]) continue;
        memcpy(b.weights[p] + s0, s + s0, (padded - s0) * sizeof(float));
        *b.peak[p] = max[p];
    }
    weigh_part<S, K, P>(a, part, s0, n_slots, scores, values + kMaxPairs * dim, values);
    for (int p = 0; p < P; p++)
        if (b.valid[p]) merge_state<S>(b.state[p], max[p], sum[p], values + p * dim, dim);
}

template <class S, class K>
void attend_batch(const AttentionArgs& a, const PairBatch& b, int part, float* scores, float* values) {
    switch (b.count) {
        case 1:
            return attend_part<S, K, 1>(a, b, part, scores, values);
        case 2:
            return attend_part<S, K, 2>(a, b, part, scores, values);
        case 3:
            return attend_part<S, K, 3>(a, b, part, scores, values);
        case 4:
            return attend_part<S, K, 4>(a, b, part, scores, values);
        case 5:
            return attend_part<S, K, 5>(a, b, part, scores, values);
        case 6:
            return attend_part<S, K, 6>(a, b, part, scores, values);
        case 7:
            return attend_part<S, K, 7>(a, b, part, scores, values);
        case 8:
            return attend_part<S, K, 8>(a, b, part, scores, values);
        default:
            if constexpr (S::kPairs > 8) return attend_part<S, K, S::kPairs>(a, b, part, scores, values);
    }
}

// How many of the pairs that are left go together.
template <class S>
inline int batch_of(int left) {
    return left >= S::kPairs ? S::kPairs : left < 8 ? left : 8;
}

template <int P>
inline void interleave(const float* const* from, int d, float* to) {
    const float* q[P];
    for (int p = 0; p < P; p++) q[p] = from[p];
    for (int i = 0; i < d; i++, to += P)
#pragma GCC unroll 12
        for (int p = 0; p < P; p++) to[p] = q[p][i];
}

template <class S>
inline void finish_pair(const AttentionArgs& a, const float* state, int row, int head) {
    using V = V16<S>;
    const int d = a.at.value_dim();
    float* out = a.out + (static_cast<size_t>(row) * a.at.n_heads + head) * d;
    float total = state[1];
    if (a.at.sinks) {
        float power[16] = {a.at.sinks[head] - state[0]}, sink[16];
        exp16<S>(V::load(power)).store(sink);
        total += sink[0];
    }
    if (a.score.weights && row >= a.score.from) {
        float* totals = a.score.totals + (static_cast<size_t>(row - a.score.from) * a.at.n_heads + head) * 2;
        totals[0] = state[0], totals[1] = total;
    }
    const V inv = V::set1(1.0f / total);
    for (int i = 0; i < d; i += 16) (V::load(state + kState + i) * inv).store_n(out + i, d - i);
}

// In 4 bits: rows over what they read exactly, as parts of their own: the stretch that they lie in, as far as
// themselves, and the first block.
template <class S, class Batches>
void attend_exact(const AttentionArgs& a, int pairs, const Batches& batch_at, float* scores, float* values) {
    constexpr int kBlocks = kStretchSlots / kBlockSlots;
    auto over = [&](int first_block, int n, int state, auto end_of) {
        const ExactBlocks::Place place = a.exact.at(first_block);
        int32_t blocks[kBlocks];
        for (int i = 0; i < n; i++) blocks[i] = a.exact.at(first_block + i).block;
        AttentionArgs own = a;
        own.kv = place.kv, own.blocks = blocks, own.at.layer = place.layer, own.length = own.r1 = 0;
        PairBatch b;
        for (int first = 0; first < pairs; first += b.count) {
            bool any = false;
            b = batch_at(first, state, first_block * kBlockSlots, 0, end_of);
            for (int p = 0; p < b.count; p++) {
                any = any || b.valid[p];
                if (!b.valid[p]) b.weights[p] = nullptr;
            }
            if (any) attend_batch<S, Kv16>(own, b, 0, scores, values);
        }
    };
    const int end = a.length + a.r1;
    for (int start = (a.length + a.r0) / kStretchSlots * kStretchSlots; start < end; start += kStretchSlots) {
        const int n = std::min(kBlocks, (end - start + kBlockSlots - 1) / kBlockSlots);
        over(start / kBlockSlots, n, a.n_parts,
             [&](int visible) { return (visible - 1) / kStretchSlots * kStretchSlots == start ? visible : 0; });
    }
    if (a.at.first_exact())
        over(0, 1, a.n_parts + 1, [](int visible) { return visible > kStretchSlots ? int{kBlockSlots} : 0; });
}

// Where the exponentials of a state begin among those of a row: parts, the row's stretch, the first block.
inline int first_weight(int n_parts, int state) {
    return state <= n_parts ? state * kPartSlots : n_parts * kPartSlots + kStretchSlots;
}

template <class S, class K>
void attention_over(const AttentionArgs& a) {
    const int d = a.at.head_dim, dim = a.kv->padded_values(), per_kv = a.at.per_kv();
    const size_t ld = a.at.cols();
    const int head0 = a.kv_head * per_kv, rows = a.r1 - a.r0, pairs = rows * per_kv;
    float* scores = a.scratch;
    float* values = scores + kMaxPairs * kPartSlots;
    float* scaled = values + kMaxPairs * dim;                                  // of 4-bit values
    float* queries = scaled + (a.kv->bits == 4 ? kMaxPairs * kPartSlots : 0);  // [batch][head_dim][pair]
    float* states = queries + static_cast<size_t>(pairs) * d;
    auto state_of = [&](int pair, int state) {
        const int row = a.r0 + pair / per_kv, head = head0 + pair % per_kv;
        if (!a.partial) return states + static_cast<size_t>(pair) * (dim + kState);
        const size_t at = (static_cast<size_t>(row) * a.at.n_heads + head) * a.n_states + state;
        return a.partial + at * (dim + kState);
    };
    // The pairs from `first` on as one batch; what they attend to lies between two slots, of which the first is `least`
    // or later, and is seen from `start` on.
    auto batch_at = [&](int first, int state, int start, int least, auto end_of) {
        PairBatch b;
        b.count = batch_of<S>(pairs - first);
        b.q = queries + static_cast<size_t>(first) * d;
        for (int p = 0; p < b.count; p++) {
            const int row = a.r0 + (first + p) / per_kv, head = head0 + (first + p) % per_kv;
            const int visible = a.length + row + 1, from = std::max(least, a.at.first_slot(visible)) - start;
            b.valid[p] = end_of(visible) - start;
            b.valid[p] = b.valid[p] < 0 ? 0 : b.valid[p] > kPartSlots ? kPartSlots : b.valid[p];
            b.from[p] = from < 0 ? 0 : from;
            if (b.from[p] >= b.valid[p]) b.from[p] = b.valid[p] = 0;
            b.state[p] = state_of(first + p, state);
            // The stretches of a span take turns in one state.
            if (a.partial && (b.valid[p] || state != a.n_parts)) b.state[p][1] = 0.0f;
            b.weights[p] = b.peak[p] = nullptr;
            if (a.score.weights && row >= a.score.from) {
                const size_t at = static_cast<size_t>(row - a.score.from) * a.at.n_heads + head;
                b.weights[p] = a.score.weights + at * a.score.ld + first_weight(a.n_parts, state);
                b.peak[p] = a.score.peaks + at * a.n_states + state;
            }
        }
        return b;
    };
    if (!a.partial)
        for (int i = 0; i < pairs; i++) state_of(i, 0)[1] = 0.0f;
    for (int first = 0, n; first < pairs; first += n) {
        n = batch_of<S>(pairs - first);
        float* to = queries + static_cast<size_t>(first) * d;
        const float* q[kMaxPairs];
        for (int p = 0; p < n; p++) {
            const int row = a.r0 + (first + p) / per_kv, head = head0 + (first + p) % per_kv;
            q[p] = a.q + row * ld + static_cast<size_t>(head) * d;
        }
        if (n == S::kPairs)
            interleave<S::kPairs>(q, d, to);
        else
            for (int i = 0; i < d; i++)
                for (int p = 0; p < n; p++) *to++ = q[p][i];
    }
    constexpr bool kOwn = std::is_same_v<K, Kv4>;
    const int least = a.at.first_exact() ? kBlockSlots : 0;
    for (int part = a.p0; part < a.p1; part++) {
        PairBatch b;
        for (int first = 0; first < pairs; first += b.count) {
            b = batch_at(first, part - a.part0, part * kPartSlots, least,
                         [&](int visible) { return kOwn ? (visible - 1) / kStretchSlots * kStretchSlots : visible; });
            attend_batch<S, K>(a, b, part, scores, values);
        }
    }
    if (kOwn && a.own) attend_exact<S>(a, pairs, batch_at, scores, values);
    if (!a.partial)
        for (int i = 0; i < pairs; i++) finish_pair<S>(a, state_of(i, 0), a.r0 + i / per_kv, head0 + i % per_kv);
}

template <class S>
void attention(const AttentionArgs& a) {
    if (a.kv->bits == 4)
        attention_over<S, Kv4>(a);
    else if (a.kv->bits == 8)
        attention_over<S, Kv8>(a);
    else
        attention_over<S, Kv16>(a);
}

// Rows r0…r1-1 of the query heads of one KV head: their parts merged in slot order.
template <class S>
void attention_merge(const AttentionArgs& a) {
    const int dim = a.kv->padded_values(), per_kv = a.at.per_kv();
    for (int row = a.r0; row < a.r1; row++)
        for (int head = a.kv_head * per_kv; head < (a.kv_head + 1) * per_kv; head++) {
            float* first = a.partial + (static_cast<size_t>(row) * a.at.n_heads + head) * a.n_states * (dim + kState);
            for (int state = 1; state < a.n_states; state++) {
                const float* s = first + static_cast<size_t>(state) * (dim + kState);
                if (s[1] != 0.0f) merge_state<S>(first, s[0], s[1], s + kState, dim);
            }
            finish_pair<S>(a, first, row, head);
        }
}

// A row: Σ_head e^(score - peak) · e^(peak - top) / total.
template <class S>
void attention_score(const ScoreArgs& a) {
    using V = V16<S>;
    const ScoreScratch& s = a.score;
    alignas(64) float got[kPartSlots];
    for (int row = 0; row < a.rows; row++) {
        const size_t head0 = static_cast<size_t>(row) * a.at.n_heads + a.kv_head * a.at.per_kv();
        const int visible = a.length + row + 1;
        // n slots from `first` on, of which a state has left the exponentials.
        auto add = [&](int state, int first, int n) {
            for (int p0 = 0; p0 < a.at.per_kv(); p0 += 16) {
                const int heads = a.at.per_kv() - p0 < 16 ? a.at.per_kv() - p0 : 16;
                float power[16] = {}, scale[16];
                for (int p = 0; p < heads; p++) {
                    const size_t at = head0 + p0 + p;
                    power[p] = s.peaks[at * a.n_states + state] - s.totals[2 * at];
                }
                exp16<S>(V::load(power)).store(scale);
                for (int p = 0; p < heads; p++) {
                    const size_t at = head0 + p0 + p;
                    const V w = V::set1(scale[p] / s.totals[2 * at + 1]);
                    const float* e = s.weights + at * s.ld + first_weight(a.n_parts, state);
                    if (p0 + p == 0)
                        for (int i = 0; i < n; i += 16) (V::load(e + i) * w).store(got + i);
                    else
                        for (int i = 0; i < n; i += 16) V::fma(V::load(e + i), w, V::load(got + i)).store(got + i);
                }
            }
            float* out = a.out + row * a.row_stride + first;
            for (int i = 0; i < n; i += 16) (V::load_n(out + i, n - i) + V::load(got + i)).store_n(out + i, n - i);
        };
        const bool exact = a.n_states > a.n_parts;
        const int behind = exact ? (visible - 1) / kStretchSlots * kStretchSlots : visible;  // parts
        for (int first = 0; first < behind; first += kPartSlots)
            add(first / kPartSlots, first, std::min(behind - first, static_cast<int>(kPartSlots)));
        if (behind < visible) add(a.n_parts, behind, visible - behind);
        if (a.at.first_exact() && behind) add(a.n_parts + 1, 0, kBlockSlots);
    }
}

}  // namespace
}  // namespace tinychat
