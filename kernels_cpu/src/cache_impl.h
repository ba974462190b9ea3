// Keys and values into the paged cache and out of it: rotary embedding, fp16 and int8 storage, what eviction asks.
#pragma once

#include "kv4_impl.h"
#include "rows_impl.h"

namespace tinychat {
namespace {

// Positions run into the hundred thousands, so the angle is a double.
template <class S>
void rope_table(const RopeTableArgs& a) {
    for (int r = a.r0; r < a.r1; r++) {
        float* t = a.table + static_cast<size_t>(r) * 2 * a.half;
        for (int i = 0; i < a.half; i++) {
            const double angle = static_cast<double>(a.positions[r]) * a.freq[i];
            t[i] = static_cast<float>(a.magnitude * std::cos(angle));
            t[a.half + i] = static_cast<float>(a.magnitude * std::sin(angle));
        }
    }
}

// Halves convention: (x[i], x[i + half]) turns by the angle of frequency i. in and out may be the same.
template <class S>
inline void rotate_head(const float* in, const float* table, int half, int dim, float scale, float* out) {
    using V = V16<S>;
    const V sc = V::set1(scale), minus = V::set1(-1.0f);
    for (int i = 0; i < half; i += 16) {
        const int n = half - i;
        V a = V::load_n(in + i, n), b = V::load_n(in + half + i, n);
        V c = V::load_n(table + i, n), s = V::load_n(table + half + i, n);
        V x = V::fma(a, c, b * s * minus) * sc, y = V::fma(b, c, a * s) * sc;
        x.store_n(out + i, n);
        y.store_n(out + half + i, n);
    }
    for (int i = 2 * half; i < dim; i++) out[i] = in[i] * scale;
}

// To fp16; beyond its range to the largest finite value, since an infinite key would poison the softmax of every later
// token.
template <class S>
inline void to_half16(const float* x, uint16_t* out) {
    for (int i = 0; i < 16; i += S::kLanes) {
        typename S::F v = S::load(x + i);
        v = S::select_lt(S::set1(65504.0f), v, S::set1(65504.0f), v);
        v = S::select_lt(v, S::set1(-65504.0f), S::set1(-65504.0f), v);
        S::store_f16(out + i, v);
    }
}

// A key or value to the cache, or back: `stride` elements lie between its channels. x has padded_dim values.
template <class S>
inline void store_half(const KvPool& kv, const float* x, uint8_t* head, int slot, bool key) {
    uint16_t* to = reinterpret_cast<uint16_t*>(head);
    uint16_t half[16];
    for (int i = 0; i < kv.padded_dim(); i += 16) {
        if (!key) {
            to_half16<S>(x + i, to + slot * kv.padded_dim() + i);
            continue;
        }
        to_half16<S>(x + i, half);
        for (int j = 0; j < 16; j++) to[(i + j) * kBlockSlots + slot] = half[j];
    }
}

// int8 codes of 32 channels and their scale. The codes are those of the scale as fp16 holds it. NaN makes the scale
// NaN, so it stays visible; infinity is the largest finite fp16, as in an fp16 cache.
template <class S>
inline void store_int8(const KvPool& kv, const float* x, uint8_t* head, int slot, bool key) {
    using V = V16<S>;
    int8_t* to = reinterpret_cast<int8_t*>(head);
    uint16_t* scales = reinterpret_cast<uint16_t*>(head + kv.code_bytes());
    for (int g = 0; g < kv.groups(); g++) {
        const int first = g * kKvGroup, n = kv.padded_dim() - first < kKvGroup ? kv.padded_dim() - first : kKvGroup;
        float y[kKvGroup], scale[16];
        uint16_t half[16];
        V peak = V::set1(0.0f);
        for (int i = 0; i < n; i += 16) {
            to_half16<S>(x + first + i, half);
            for (int j = 0; j < 16; j += S::kLanes) S::store(y + i + j, S::load_f16(half + j));
            peak = V::max_abs(peak, V::load(y + i));
        }
        V::set1(peak.largest_bits() * (1.0f / 127.0f)).store(scale);
        to_half16<S>(scale, half);
        for (int j = 0; j < 16; j += S::kLanes) S::store(scale + j, S::load_f16(half + j));
        scales[g * kBlockSlots + slot] = half[0];
        const typename S::F inv = S::set1(scale[0] == 0.0f ? 0.0f : 1.0f / scale[0]);
        int8_t codes[kKvGroup];
        for (int i = 0; i < n; i += S::kLanes) S::store_i8(codes + i, S::round(S::mul(S::load(y + i), inv)));
        if (!key)
            memcpy(to + slot * kv.padded_dim() + first, codes, n);
        else
            for (int i = 0; i < n; i++) to[(first + i) * kBlockSlots + slot] = codes[i];
    }
}

template <class S>
inline void store_slot(const KvPool& kv, const float* x, uint8_t* head, int slot, bool key) {
    if (kv.bits == 8)
        store_int8<S>(kv, x, head, slot, key);
    else
        store_half<S>(kv, x, head, slot, key);
}

template <class S>
inline void load_key(const KvPool& kv, const uint8_t* head, int slot, float* x) {
    float lanes[16];
    for (int i = 0; i < kv.head_dim; i++) {
        const int at = i * kBlockSlots + slot / S::kLanes * S::kLanes;
        S::store(lanes, kv.bits == 8 ? S::load_i8(reinterpret_cast<const int8_t*>(head) + at)
                                     : S::load_f16(reinterpret_cast<const uint16_t*>(head) + at));
        x[i] = lanes[slot % S::kLanes];
    }
    if (kv.bits == 16) return;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + kv.code_bytes());
    for (int g = 0; g < kv.groups(); g++) {
        S::store(lanes, S::load_f16(scales + g * kBlockSlots + slot / S::kLanes * S::kLanes));
        for (int i = g * kKvGroup; i < kv.head_dim && i < (g + 1) * kKvGroup; i++) x[i] *= lanes[slot % S::kLanes];
    }
}

inline void turn_table(const TurnKeysArgs& a, int delta, float* table) {
    for (int i = 0; i < a.half; i++) {
        const double angle = delta * a.freq[i];
        table[i] = static_cast<float>(std::cos(angle));
        table[a.half + i] = static_cast<float>(std::sin(angle));
    }
}

// A block in 4 bits of which a key turns gets new ranges.
template <class S>
void turn_block(const TurnKeysArgs& a, int i) {
    const Block4 b(*a.kv, a.blocks[i], a.layer, a.kv_head);
    float x[kMaxHeadDim * kBlockSlots], key[kMaxHeadDim + 16], table[kMaxHeadDim];
    open_keys<S>(b, x);
    bool turned = false;
    for (int s = 0; s < kBlockSlots; s++) {
        const int delta = a.delta[i * kBlockSlots + s];
        if (delta == 0) continue;
        turned = true;
        turn_table(a, delta, table);
        for (int c = 0; c < a.kv->head_dim; c++) key[c] = x[c * kBlockSlots + s];
        rotate_head<S>(key, table, a.half, a.kv->head_dim, 1.0f, key);
        for (int c = 0; c < a.kv->head_dim; c++) x[c * kBlockSlots + s] = key[c];
    }
    if (turned) pack_keys<S>(b, x);
}

template <class S>
void turn_keys(const TurnKeysArgs& a) {
    const int d = a.kv->head_dim;
    float x[kMaxHeadDim + 16] = {}, table[kMaxHeadDim];
    for (int i = 0, first = 0; first < a.n; i++, first += kBlockSlots) {
        const bool exact = a.exact.has(i);
        if (a.kv->bits == 4 && !exact) {
            turn_block<S>(a, i);
            continue;
        }
        const KvPool& kv = exact ? *a.exact.tail : *a.kv;
        uint8_t* head = kv.keys(exact ? a.exact.blocks[i] : a.blocks[i], a.layer, a.kv_head);
        bool turned = false;
        for (int s = 0; s < kBlockSlots && first + s < a.n; s++) {
            if (a.delta[first + s] == 0) continue;
            turned = true;
            turn_table(a, a.delta[first + s], table);
            load_key<S>(kv, head, s, x);
            rotate_head<S>(x, table, a.half, d, 1.0f, x);
            store_slot<S>(kv, x, head, s, true);
        }
        if (exact && turned && first + kBlockSlots <= a.n)
            pack_block_keys<S>(Block4(*a.kv, a.blocks[i], a.layer, a.kv_head), head);
    }
}

template <class S>
void rope_kv(const RopeArgs& a) {
    const int d = a.at.head_dim, dim = a.kv->padded_dim();
    const size_t ld = a.at.cols();
    float x[kMaxHeadDim + 16];
    for (int r = a.r0; r < a.r1; r++) {
        float* q = a.qkv + r * ld;
        const float* k = q + static_cast<size_t>(a.at.n_heads) * d;
        const float* v = k + static_cast<size_t>(a.at.n_kv) * d;
        const float* table = a.table + static_cast<size_t>(r) * 2 * a.half;
        float scale = a.at.scale;
        if (a.at.slope != 0.0)
            scale *= static_cast<float>(1.0 + a.at.slope * std::log1p(std::floor(a.positions[r] / a.at.original)));
        for (int h = 0; h < a.at.n_heads; h++) rotate_head<S>(q + h * d, table, a.half, d, scale, q + h * d);
        if (a.at.shared) continue;
        const int slot = a.length + r, i = slot / kBlockSlots, in_block = slot % kBlockSlots;
        const ExactBlocks::Place to =
            a.kv->bits == 4 ? a.exact.at(i) : ExactBlocks::Place{a.kv, a.blocks[i], a.at.layer};
        for (int c = d; c < dim; c++) x[c] = 0;
        for (int h = 0; h < a.at.n_kv; h++) {
            rotate_head<S>(k + h * d, table, a.half, d, 1.0f, x);
            store_slot<S>(*to.kv, x, to.keys(h), in_block, true);
            if (a.at.latent) continue;
            memcpy(x, v + h * d, d * sizeof(float));
            store_slot<S>(*to.kv, x, to.values(h), in_block, false);
        }
    }
}

template <class S>
void rotate(const RotateArgs& a) {
    for (int r = a.r0; r < a.r1; r++)
        for (int h = 0; h < a.heads; h++) {
            float* x = a.x + r * a.ld + static_cast<size_t>(h) * a.head_dim;
            rotate_head<S>(x, a.table + static_cast<size_t>(r) * 2 * a.half, a.half, a.head_dim, 1.0f, x);
        }
}

// Channels i … i+15 of a value.
template <class S>
inline V16<S> load_value(const KvPool& kv, const uint8_t* head, int slot, int i) {
    using V = V16<S>;
    V x;
    const int at = slot * kv.padded_dim() + i;
    for (int j = 0; j < V::N; j++)
        x.v[j] = kv.bits == 8 ? S::load_i8(reinterpret_cast<const int8_t*>(head) + at + j * S::kLanes)
                              : S::load_f16(reinterpret_cast<const uint16_t*>(head) + at + j * S::kLanes);
    if (kv.bits == 16) return x;
    float lanes[16];
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(head + kv.code_bytes()) + i / kKvGroup * kBlockSlots;
    S::store(lanes, S::load_f16(scales + slot / S::kLanes * S::kLanes));
    return x * V::set1(lanes[slot % S::kLanes]);
}

// The values of a block, channels i … i+15 of a slot at a time: as they lie there, or, in 4 bits, opened before.
template <class S>
class BlockValues {
  public:
    // Of the slots s … s + 15; `opened` has room for 16 values.
    BlockValues(const SpreadArgs& a, int s, float* opened) {
        const int i = s / kBlockSlots;
        kv_ = a.exact.has(i) ? a.exact.tail : a.kv;
        const int block = a.exact.has(i) ? a.exact.blocks[i] : a.blocks[i];
        head_ = kv_->values(block, a.layer, a.kv_head);
        if (kv_->bits != 4) return;
        open_values<S>(Block4(*kv_, block, a.layer, a.kv_head), opened);
        opened_ = opened;
    }
    V16<S> load(int slot, int i) const {
        return opened_ ? V16<S>::load(opened_ + slot * kv_->padded_dim() + i) : load_value<S>(*kv_, head_, slot, i);
    }

  private:
    const KvPool* kv_;
    const uint8_t* head_;
    const float* opened_ = nullptr;
};

template <class S>
void latent_spread(const SpreadArgs& a);

template <class S>
void value_spread(const SpreadArgs& a) {
    if (a.kv->latent) return latent_spread<S>(a);
    using V = V16<S>;
    const int dim = a.kv->padded_dim();
    float mean[kMaxHeadDim + 16] = {}, opened[kBlockSlots * kMaxHeadDim], total = 0.0f;
    for (int s = 0; s < a.n; s++) total += a.weights[s];
    const size_t step = a.kv->head_bytes() / (dim / 16);
    for (int s = 0; s < a.n; s += kBlockSlots) {
        const int *block = a.blocks + s / kBlockSlots, end = std::min(a.n - s, static_cast<int>(kBlockSlots));
        const BlockValues<S> values(a, s, opened);
        // Blocks lie far apart: the next one comes meanwhile.
        const uint8_t* next = a.kv->values(block[s + kBlockSlots < a.n], a.layer, a.kv_head);
        for (int i = 0; i < dim; i += 16) {
            for (size_t ahead = 0; ahead < step; ahead += 64) S::prefetch(next + ahead);
            next += step;
            V sum = V::load(mean + i);
            for (int j = 0; j < end; j++) {
                const V w = V::set1(total == 0.0f ? 1.0f / a.n : a.weights[s + j] / total);
                sum = V::fma(w, values.load(j, i), sum);
            }
            sum.store(mean + i);
        }
    }
    const V minus = V::set1(-1.0f);
    for (int s = 0; s < a.n; s += kBlockSlots) {
        const BlockValues<S> values(a, s, opened);
        for (int j = 0; j < kBlockSlots && s + j < a.n; j++) {
            V squares = V::set1(0.0f);
            for (int i = 0; i < dim; i += 16) {
                const V x = V::fma(V::load(mean + i), minus, values.load(j, i));
                squares = V::fma(x, x, squares);
            }
            a.out[s + j] = std::sqrt(squares.sum());
        }
    }
}

}  // namespace
}  // namespace tinychat
