// Keys and values in 4 bits: a complete block of 16 slots.
//   keys    by channel over the slots, code · scale + offset: scales and offsets have 8 bits, times an fp16 of the head
//           each, the nearest to the range that there are.
//   values  by slot over groups of 32 channels, (code + zero) · scale: zeros have 8 bits, scales 8 bits of their own, a
//           quarter of an fp16 without sign and without its last seven bits. So a slot that moves takes its value
//           along.
//   bytes   of 16 slots of one head: 18 · padded_dim + 32 · groups + 4
#pragma once

#include <algorithm>

#include "rows_impl.h"

namespace tinychat {
namespace {

constexpr int kLargestCode = 15;
constexpr uint8_t kLargestScale = 0xF7, kNotANumber = 0xFF;  // codes of scales

// Scales of 16 values as numbers.
template <class S>
inline V16<S> open_scales(const uint8_t* codes) {
    uint16_t half[16];
    for (int j = 0; j < 16; j++) half[j] = static_cast<uint16_t>(codes[j] << 7);
    V16<S> x;
    for (int j = 0; j < V16<S>::N; j++) x.v[j] = S::load_f16(half + j * S::kLanes);
    return x * V16<S>::set1(0.25f);
}

template <class S>
inline V16<S> open_zeros(const uint8_t* codes) {
    V16<S> x;
    for (int j = 0; j < V16<S>::N; j++) x.v[j] = S::load_i8(reinterpret_cast<const int8_t*>(codes) + j * S::kLanes);
    return x;
}

// (code + zero) · scale = code · scale + offset
template <class S>
inline void open_grids(const uint8_t* scales, const uint8_t* zeros, int n, float* scale, float* offset) {
    for (int i = 0; i < n; i += 16) {
        const V16<S> s = open_scales<S>(scales + i);
        s.store(scale + i);
        (s * open_zeros<S>(zeros + i)).store(offset + i);
    }
}

// Smallest and largest of 16 numbers, or of several times 16; NaN stays visible.
template <class S>
struct Range {
    V16<S> low, high, peak = V16<S>::set1(0.0f);
    explicit Range(V16<S> x) : low(x), high(x) { peak = V16<S>::max_abs(peak, x); }
    void add(V16<S> x) {
        low = V16<S>::map([](auto a, auto b) { return S::min(a, b); }, x, low);
        high = V16<S>::max(x, high);
        peak = V16<S>::max_abs(peak, x);
    }
    void reduce(float* to_low, float* to_high) const {
        const bool number = !std::isnan(peak.largest_bits());
        *to_low = number ? -(low * V16<S>::set1(-1.0f)).largest() : NAN;
        *to_high = high.largest();
    }
};

template <class S>
inline float from_half(uint16_t half) {
    const uint16_t halves[16] = {half};
    float x[16];
    S::store(x, S::load_f16(halves));
    return x[0];
}

template <class S>
inline uint16_t nearest_half(float x) {
    const float lanes[16] = {x};
    uint16_t halves[16];
    S::store_f16(halves, S::load(lanes));
    return halves[0];
}

// Grids of 16 values that spread over these ranges.
template <class S>
inline void choose_grids(const float* low, const float* high, uint8_t* scales, uint8_t* zeros) {
    using V = V16<S>;
    const V lo = V::load(low), hi = V::load(high), middle = (lo + hi) * V::set1(0.5f);
    // Zeros have 8 bits: far from 0 the steps are wider.
    const V step = V::max((hi + lo * V::set1(-1.0f)) * V::set1(1.0f / kLargestCode),
                          V::max_abs(V::set1(0.0f), middle) * V::set1(1.0f / 111.0f));
    uint16_t half[16];
    const V scaled = step * V::set1(4.0f);
    for (int j = 0; j < V::N; j++) S::store_f16(half + j * S::kLanes, scaled.v[j]);
    for (int j = 0; j < 16; j++) {
        const int code = (half[j] + 64) >> 7;
        scales[j] = std::isnan(low[j]) ? kNotANumber : code < 1 ? 1 : code > kLargestScale ? kLargestScale : code;
    }
    const V at = V::map([](auto a, auto b) { return S::sub(S::div(a, b), S::set1(kLargestCode / 2.0f)); }, middle,
                        open_scales<S>(scales));
    for (int j = 0; j < V::N; j++) S::store_i8(reinterpret_cast<int8_t*>(zeros) + j * S::kLanes, S::round(at.v[j]));
}

// Where 16 numbers lie on a grid of values, in steps.
template <class S>
inline V16<S> on_grid(V16<S> x, V16<S> scale, V16<S> zero) {
    return V16<S>::map([](auto a, auto s, auto z) { return S::sub(S::div(a, s), z); }, x, scale, zero);
}

constexpr float kTiny = 1e-30f;  // in place of a scale that is 0

// The same on a grid of keys.
template <class S>
inline V16<S> on_key_grid(V16<S> x, float scale, float offset) {
    const float s = scale > kTiny || std::isnan(scale) ? scale : kTiny;
    return V16<S>::map([=](auto a) { return S::div(S::sub(a, S::set1(offset)), S::set1(s)); }, x);
}

// Puts the codes of 16 lanes into their place of a line.
template <class S>
inline void put_codes(V16<S> at, uint32_t* line, int place) {
    using V = V16<S>;
    at = V::map([](auto a, auto b) { return S::min(a, b); }, V::max(at, V::set1(0.0f)), V::set1(kLargestCode));
    int32_t codes[16];
    for (int j = 0; j < V::N; j++) S::storei(codes + j * S::kLanes, S::round(at.v[j]));
    for (int j = 0; j < 16; j++)
        line[j] = (line[j] & ~(15u << 4 * place)) | static_cast<uint32_t>(codes[j]) << 4 * place;
}

// A head's block in 4 bits, its parts by name.
struct Block4 {
    const KvPool* kv;
    uint8_t *keys, *values, *grids;
    Block4(const KvPool& pool, int block, int layer, int head)
        : kv(&pool),
          keys(pool.keys(block, layer, head)),
          values(pool.values(block, layer, head)),
          grids(pool.grids(block, layer, head)) {}
    int dim() const { return kv->padded_dim(); }
    uint8_t* key_scales() const { return grids; }
    int8_t* key_offsets() const { return reinterpret_cast<int8_t*>(grids + dim()); }
    // What key scales and offsets are multiples of.
    uint16_t* units() const { return reinterpret_cast<uint16_t*>(value_zeros(kv->groups())); }
    uint8_t* value_scales(int group) const { return grids + 2 * dim() + group * kBlockSlots; }
    uint8_t* value_zeros(int group) const { return value_scales(group + kv->groups()); }
    // Of channel 8 g … 8 g + 7, a lane for each slot.
    uint32_t* key_line(int g) const { return reinterpret_cast<uint32_t*>(keys + g * 64); }
    // Of slots 8 h … 8 h + 7, a lane for each of the channels 16 c … 16 c + 15.
    uint32_t* value_line(int c, int h) const { return reinterpret_cast<uint32_t*>(values + (c * 2 + h) * 64); }
};

// Scales and offsets of keys as numbers, [padded_dim] each.
template <class S>
inline void open_key_grids(const Block4& b, float* scale, float* offset) {
    using V = V16<S>;
    const V unit = V::set1(from_half<S>(b.units()[0])), offset_unit = V::set1(from_half<S>(b.units()[1]));
    for (int i = 0; i < b.dim(); i += 16) {
        float code[16];
        for (int j = 0; j < 16; j++) code[j] = static_cast<float>(b.key_scales()[i + j]);
        (V::load(code) * unit).store(scale + i);
        V offsets;
        for (int j = 0; j < V::N; j++) offsets.v[j] = S::load_i8(b.key_offsets() + i + j * S::kLanes);
        (offsets * offset_unit).store(offset + i);
    }
}

// The grid of one channel over a range, in the units that are there. Returns false, with the nearest one, where these
// are too small.
template <class S>
inline bool choose_key_grid(const Block4& b, int channel, float low, float high) {
    const float unit = from_half<S>(b.units()[0]), offset_unit = from_half<S>(b.units()[1]);
    const float down = std::nearbyint(low / std::max(offset_unit, kTiny));
    const float code = down < -128.0f ? -128.0f : down > 127.0f ? 127.0f : down;
    const float step = std::max((high - code * offset_unit) * (1.0f / kLargestCode), 0.0f);
    const float near = std::max(std::nearbyint(step / std::max(unit, kTiny)), step > 0.0f ? 1.0f : 0.0f);
    b.key_offsets()[channel] = static_cast<int8_t>(code >= -128.0f ? code : 0.0f);
    b.key_scales()[channel] = static_cast<uint8_t>(near <= 255.0f ? near : 255.0f);
    return down >= -128.0f && near <= 255.0f;
}

// x: [padded_dim][16 slots]
template <class S>
inline void pack_keys(const Block4& b, const float* x) {
    float low[kMaxHeadDim], high[kMaxHeadDim], largest = 0.0f, step = 0.0f;
    bool number = true;
    for (int i = 0; i < b.dim(); i++) {
        Range<S>(V16<S>::load(x + i * kBlockSlots)).reduce(low + i, high + i);
        number = number && !std::isnan(low[i]);
        largest = std::max(largest, std::fabs(low[i]));
    }
    b.units()[1] = nearest_half<S>(largest * (1.0f / 127.0f));
    b.units()[0] = nearest_half<S>(65504.0f);  // first the offsets, then how wide steps are behind them
    const float offset_unit = from_half<S>(b.units()[1]);
    for (int i = 0; i < b.dim(); i++) {
        choose_key_grid<S>(b, i, low[i], high[i]);
        step = std::max(step, (high[i] - b.key_offsets()[i] * offset_unit) * (1.0f / kLargestCode));
    }
    b.units()[0] = nearest_half<S>(number ? step * (1.0f / 255.0f) : NAN);
    for (int i = 0; i < b.dim(); i++) choose_key_grid<S>(b, i, low[i], high[i]);
    float scale[kMaxHeadDim], offset[kMaxHeadDim];
    open_key_grids<S>(b, scale, offset);
    for (int i = 0; i < b.dim(); i++)
        put_codes<S>(on_key_grid<S>(V16<S>::load(x + i * kBlockSlots), scale[i], offset[i]), b.key_line(i / 8), i % 8);
}

// Channels i … i + 15 of a value; those behind the last one are like the first, so that no range changes by them.
template <class S>
inline V16<S> value_channels(const float* v, int i, int head_dim) {
    if (i + 16 <= head_dim) return V16<S>::load(v + i);
    float t[16];
    for (int j = 0; j < 16; j++) t[j] = v[i + j < head_dim ? i + j : i];
    return V16<S>::load(t);
}

// The values of the slots that `slots` has bits for. v: [16 slots][padded_dim]
template <class S>
inline void pack_values(const Block4& b, const float* v, uint32_t slots) {
    const int d = b.kv->head_dim, dim = b.dim();
    for (int g = 0; g < b.kv->groups(); g++) {
        const int first = g * kKv4Group, end = std::min(d, first + kKv4Group);
        float low[16] = {}, high[16] = {};
        for (int s = 0; s < kBlockSlots; s++) {
            if (!(slots >> s & 1)) continue;
            Range<S> range(value_channels<S>(v + s * dim, first, d));
            for (int i = first + 16; i < end; i += 16) range.add(value_channels<S>(v + s * dim, i, d));
            range.reduce(low + s, high + s);
        }
        uint8_t scales[16], zeros[16];
        choose_grids<S>(low, high, scales, zeros);
        float scale[16], zero[16];
        open_scales<S>(scales).store(scale);
        open_zeros<S>(zeros).store(zero);
        for (int s = 0; s < kBlockSlots; s++) {
            if (!(slots >> s & 1)) continue;
            b.value_scales(g)[s] = scales[s], b.value_zeros(g)[s] = zeros[s];
            for (int i = first; i < end; i += 16)
                put_codes<S>(
                    on_grid<S>(value_channels<S>(v + s * dim, i, d), V16<S>::set1(scale[s]), V16<S>::set1(zero[s])),
                    b.value_line(i / 16, s / 8), s % 8);
        }
    }
}

// Keys as numbers, [padded_dim][16 slots].
template <class S>
inline void open_keys(const Block4& b, float* x) {
    float scale[kMaxHeadDim], offset[kMaxHeadDim];
    open_key_grids<S>(b, scale, offset);
    for (int i = 0; i < b.dim(); i++)
        for (int j = 0; j < 16; j += S::kLanes) {
            const typename S::I line = S::line(reinterpret_cast<const uint8_t*>(b.key_line(i / 8) + j));
            const typename S::F code = S::nibble(S::shift(line, i % 8));
            S::store(x + i * kBlockSlots + j, S::fma(code, S::set1(scale[i]), S::set1(offset[i])));
        }
}

// The first n of 16 numbers, and zeros.
template <class S>
inline V16<S> without_padding(V16<S> x, int n) {
    float lanes[16];
    x.store(lanes);
    return V16<S>::load_n(lanes, n);
}

// Channels i … i + 15 of the value of a slot; behind the last channel zeros.
template <class S>
inline V16<S> open_value(const Block4& b, int slot, int i) {
    const int g = i / kKv4Group;
    uint8_t scale[16], zero[16];
    memset(scale, b.value_scales(g)[slot], 16), memset(zero, b.value_zeros(g)[slot], 16);
    float codes[16];
    const uint32_t* line = b.value_line(i / 16, slot / 8);
    for (int j = 0; j < 16; j++) codes[j] = static_cast<float>(line[j] >> 4 * (slot % 8) & 15);
    const V16<S> x = (V16<S>::load(codes) + open_zeros<S>(zero)) * open_scales<S>(scale);
    return i + 16 <= b.kv->head_dim ? x : without_padding(x, b.kv->head_dim - i);
}

// Values as numbers, [16 slots][padded_dim].
template <class S>
inline void open_values(const Block4& b, float* v) {
    const int dim = b.dim();
    for (int c = 0; c < dim; c += 16) {
        float scale[16], offset[16];
        open_grids<S>(b.value_scales(c / kKv4Group), b.value_zeros(c / kKv4Group), 16, scale, offset);
        for (int s = 0; s < kBlockSlots; s++) {
            const uint32_t* line = b.value_line(c / 16, s / 8);
            for (int j = 0; j < 16; j += S::kLanes) {
                const typename S::F code =
                    S::nibble(S::shift(S::line(reinterpret_cast<const uint8_t*>(line + j)), s % 8));
                S::store(v + s * dim + c + j, S::fma(code, S::set1(scale[s]), S::set1(offset[s])));
            }
            for (int j = b.kv->head_dim; j < c + 16; j++) v[s * dim + j] = 0.0f;
        }
    }
}

// A value as it is stored, over another one.
inline void copy_value(const Block4& from, int a, const Block4& to, int b) {
    for (int g = 0; g < from.kv->groups(); g++) {
        to.value_scales(g)[b] = from.value_scales(g)[a];
        to.value_zeros(g)[b] = from.value_zeros(g)[a];
    }
    for (int c = 0; c < from.dim() / 16; c++) {
        const uint32_t* x = from.value_line(c, a / 8);
        uint32_t* y = to.value_line(c, b / 8);
        const int left = 4 * (a % 8), right = 4 * (b % 8);
        for (int j = 0; j < 16; j++) y[j] = (y[j] & ~(15u << right)) | (x[j] >> left & 15) << right;
    }
}

// Keys that come into a block, x: [padded_dim][16 slots] with theirs and any others', in the slots that `slots` has
// bits for. They take the grid of their channel if they fit, so that the others stay what they are however often that
// happens; else the channel gets another one, and where the units are too small for it, every channel does.
template <class S>
inline void replace_keys(const Block4& b, const float* x, uint32_t slots) {
    using V = V16<S>;
    float whole[kMaxHeadDim * kBlockSlots], scale[kMaxHeadDim], offset[kMaxHeadDim];
    open_keys<S>(b, whole);
    open_key_grids<S>(b, scale, offset);
    bool enough = true;
    for (int i = 0; i < b.dim(); i++) {
        float* k = whole + i * kBlockSlots;
        for (int s = 0; s < kBlockSlots; s++)
            if (slots >> s & 1) k[s] = x[i * kBlockSlots + s];
        float at[16], low, high;
        on_key_grid<S>(V::load(k), scale[i], offset[i]).store(at);
        bool fits = true;
        for (int s = 0; s < kBlockSlots; s++)
            if (slots >> s & 1) fits = fits && at[s] >= -0.5f && at[s] <= kLargestCode + 0.5f;
        if (fits) continue;
        Range<S>(V::load(k)).reduce(&low, &high);
        enough = choose_key_grid<S>(b, i, low, high) && enough;
    }
    if (!enough) return pack_keys<S>(b, whole);
    open_key_grids<S>(b, scale, offset);
    for (int i = 0; i < b.dim(); i++)
        put_codes<S>(on_key_grid<S>(V::load(whole + i * kBlockSlots), scale[i], offset[i]), b.key_line(i / 8), i % 8);
}

// Halves to numbers, n of them (a multiple of 16).
template <class S>
inline void open_halves(const uint8_t* from, size_t n, float* to) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    for (size_t i = 0; i < n; i += S::kLanes) S::store(to + i, S::load_f16(half + i));
}

// A head's block, given in 16 bits.
template <class S>
inline void pack_block_keys(const Block4& to, const uint8_t* keys) {
    float x[kMaxHeadDim * kBlockSlots];
    open_halves<S>(keys, static_cast<size_t>(to.dim()) * kBlockSlots, x);
    pack_keys<S>(to, x);
}

template <class S>
inline void pack_block(const Block4& to, const uint8_t* keys, const uint8_t* values) {
    float x[kMaxHeadDim * kBlockSlots];
    pack_block_keys<S>(to, keys);
    open_halves<S>(values, static_cast<size_t>(to.dim()) * kBlockSlots, x);
    pack_values<S>(to, x, 0xFFFF);
}

template <class S>
void pack_kv(const PackKvArgs& a) {
    const ExactBlocks::Place exact = a.exact.at(a.i);
    for (int h = 0; h < a.kv->n_kv; h++)
        pack_block<S>(Block4(*a.kv, a.blocks[a.i], a.layer, h), exact.keys(h), exact.values(h));
}

template <class S>
void open_block(const OpenArgs& a) {
    const Block4 b(*a.kv, a.block, a.layer, a.kv_head);
    uint16_t* keys = reinterpret_cast<uint16_t*>(a.tail->keys(a.to, a.layer, a.kv_head));
    uint16_t* values = reinterpret_cast<uint16_t*>(a.tail->values(a.to, a.layer, a.kv_head));
    float x[kMaxHeadDim * kBlockSlots];
    const int n = b.dim() * kBlockSlots;
    open_keys<S>(b, x);
    for (int i = 0; i < n; i += S::kLanes) S::store_f16(keys + i, S::load(x + i));
    for (int s = 0; s < kBlockSlots; s++)
        for (int i = 0; i < b.dim(); i += 16) open_value<S>(b, s, i).store(x + s * b.dim() + i);
    for (int i = 0; i < n; i += S::kLanes) S::store_f16(values + i, S::load(x + i));
}

// The key and value of a slot as numbers: into slot d of x [padded_dim][16 slots] and of v [16 slots][padded_dim].
template <class S>
inline void open_slot(const MoveArgs& a, int slot, int d, float* x, float* v) {
    const int i = slot / kBlockSlots, s = slot % kBlockSlots;
    const Block4 b(*a.kv, a.blocks[i], a.layer, a.kv_head);
    const int dim = b.dim();
    if (a.exact.has(i)) {
        const uint16_t* keys = a.exact.keys(i, a.layer, a.kv_head);
        for (int c = 0; c < dim; c++) x[c * kBlockSlots + d] = from_half<S>(keys[c * kBlockSlots + s]);
        const uint16_t* value = a.exact.values(i, a.layer, a.kv_head) + s * dim;
        return open_halves<S>(reinterpret_cast<const uint8_t*>(value), dim, v + d * dim);
    }
    float scale[kMaxHeadDim], offset[kMaxHeadDim];
    open_key_grids<S>(b, scale, offset);
    for (int c = 0; c < dim; c++) {
        const float code = static_cast<float>(b.key_line(c / 8)[s] >> 4 * (c % 8) & 15);
        x[c * kBlockSlots + d] = code * scale[c] + offset[c];  // exact products: as a fused multiply-add
    }
    for (int c = 0; c < dim; c += 16) open_value<S>(b, s, c).store(v + d * dim + c);
}

// Moves within one layer and KV head.
template <class S>
void move_slots(const MoveArgs& a) {
    const int dim = a.kv->padded_dim(), whole = (a.slots - a.n) / kBlockSlots;
    float x[kMaxHeadDim * kBlockSlots], v[kBlockSlots * kMaxHeadDim];
    for (int m = 0; m < a.n;) {
        if (a.src[m] < 0) {
            m++;
            continue;
        }
        const int i = a.dst[m] / kBlockSlots;  // the moves into one block, together
        const Block4 to(*a.kv, a.blocks[i], a.layer, a.kv_head);
        const bool exact = a.exact.has(i);
        uint32_t moved = 0, fresh = 0;
        for (; m < a.n && a.src[m] >= 0 && a.dst[m] / kBlockSlots == i; m++) {
            const int from = a.src[m] / kBlockSlots, s = a.src[m] % kBlockSlots, d = a.dst[m] % kBlockSlots;
            open_slot<S>(a, a.src[m], d, x, v);
            moved |= 1u << d;
            if (a.exact.has(from))
                fresh |= 1u << d;
            else if (!exact)
                copy_value(Block4(*a.kv, a.blocks[from], a.layer, a.kv_head), s, to, d);
        }
        if (!exact) {
            replace_keys<S>(to, x, moved);
            pack_values<S>(to, v, fresh);
            continue;
        }
        uint16_t *keys = a.exact.keys(i, a.layer, a.kv_head), *values = a.exact.values(i, a.layer, a.kv_head);
        for (int d = 0; d < kBlockSlots; d++) {
            if (!(moved >> d & 1)) continue;
            for (int c = 0; c < dim; c++) keys[c * kBlockSlots + d] = nearest_half<S>(x[c * kBlockSlots + d]);
            for (int c = d * dim; c < (d + 1) * dim; c += S::kLanes) S::store_f16(values + c, S::load(v + c));
        }
        if (i < whole) pack_block<S>(to, reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values));
    }
}

}  // namespace
}  // namespace tinychat
