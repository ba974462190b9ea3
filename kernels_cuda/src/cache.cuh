// The KV cache, for one head size and precision a compilation: HEAD (a multiple of 32; heads are padded with zeros)
// and KV_BITS (16: halves; 8: int8 with a half as scale for each token and 32 channels).
//
// A pool block holds 16 slots of every layer and KV head: [layers][kv_heads] units of
//   keys    [slot][HEAD]
//   values  [HEAD][slot]      so that both are read as the mma's second operand, without a detour
//   8 bits: key scales [slot][HEAD / 32], value scales [HEAD / 32][slot]
#pragma once

#include "device.cuh"
#include "step.cuh"

#ifndef HEAD
#define HEAD 64
#define KV_BITS 16
#endif

constexpr int PARTS = HEAD / 32;  // of 32 channels
constexpr int CODE = KV_BITS / 8;
constexpr int KEYS = SLOTS * HEAD * CODE;  // bytes
constexpr int SCALES = KV_BITS == 8 ? SLOTS * PARTS * 2 : 0;
constexpr int UNIT = 2 * (KEYS + SCALES);

// One layer of the pool, behind a sequence's block table, which begins at tables[table].
struct Cache {
    u8* pool;
    const int* tables;
    int table, layer, layers, kv_heads;

    DEVICE_MEMBER u8* unit(int slot, int head) const {
        size_t block = static_cast<size_t>(tables[table + slot / SLOTS]);
        return pool + ((block * layers + layer) * kv_heads + head) * UNIT;
    }
};

// What attention of one layer in one step is told: `Call` of kernels_cuda/attention.py, field by field.
struct Attention {
    u16* q;                // halves [rows, heads, HEAD], turned
    u8* pool;              // of the layer's memory
    const int* tables;     // of the step
    const Place* places;   // [rows]
    const Piece* pieces;   // of every sequence's queries
    const Watch* watches;  // sequences whose attention is scored
    float2* totals;        // (m, l) of every row's softmax, [rows, heads]
    const float* sinks;    // [heads], or null: one more score of each head, which takes its share and gives nothing
    int rows;
    int layer, layers;  // of the memory
    int heads, kv_heads;
    int size, ld;      // channels of a head; halves from one row of the result to the next
    int window;        // slots that a row sees, 0: all
    float scale, cap;  // of scores; cap 0: none

    DEVICE_MEMBER Cache cache(int table) const { return {pool, tables, table, layer, layers, kv_heads}; }
};

DEVICE u16* halves(u8* p) { return reinterpret_cast<u16*>(p); }

// Where the parts of a unit begin.
DEVICE u8* values_of(u8* unit) { return unit + KEYS; }
DEVICE u16* key_scales(u8* unit) { return halves(unit + 2 * KEYS); }
DEVICE u16* value_scales(u8* unit) { return halves(unit + 2 * KEYS + SCALES); }

// A lane's channel as int8: the scale is the largest of the warp's 32 channels over 127, as a half.
struct Code {
    signed char q;
    u16 scale;
};

DEVICE Code quantize(float x) {
    u16 scale = to_half(warp_max(fabsf(x)) * (1.0f / 127));
    float s = to_float(scale), inverse = s == 0 ? 0 : 1 / s;
    return {static_cast<signed char>(fminf(fmaxf(rintf(x * inverse), -128.0f), 127.0f)), scale};
}

// A lane's channel at to[at], and the scale of all of them. Every lane of the warp takes part.
DEVICE void store(u8* to, int at, u16* scale, float x) {
    if constexpr (KV_BITS == 16) {
        halves(to)[at] = to_half(x);
    } else {
        Code c = quantize(to_float(to_half(x)));
        to[at] = static_cast<u8>(c.q);
        if (lane_id() == 0) *scale = c.scale;
    }
}

// Channel 32 part + lane of the key (or value) in a slot.
DEVICE void store_key(u8* unit, int slot, int part, float x) {
    store(unit, slot * HEAD + part * 32 + lane_id(), key_scales(unit) + slot * PARTS + part, x);
}

DEVICE void store_value(u8* unit, int slot, int part, float x) {
    store(values_of(unit), (part * 32 + lane_id()) * SLOTS + slot, value_scales(unit) + part * SLOTS + slot, x);
}

DEVICE float load_key(u8* unit, int slot, int channel) {
    if constexpr (KV_BITS == 16) return to_float(halves(unit)[slot * HEAD + channel]);
    float q = static_cast<float>(static_cast<signed char>(unit[slot * HEAD + channel]));
    return q * to_float(key_scales(unit)[slot * PARTS + channel / 32]);
}

// Four int8 codes to two pairs of halves, times their scales.
DEVICE uint2 unpack(u32 codes, u32 scales_low, u32 scales_high) {
    codes ^= 0x80808080;
    u32 low = subtract_halves(pick_bytes(codes, 0x64646464, 0x4140), 0x64806480);
    u32 high = subtract_halves(pick_bytes(codes, 0x64646464, 0x4342), 0x64806480);
    return {multiply_halves(low, scales_low), multiply_halves(high, scales_high)};
}

// One channel of the four values that a lane multiplies, slots 4t … 4t + 3, as they lie.
struct RawValue {
    u32 words[CODE];
};

DEVICE RawValue read_value(u8* unit, int channel) {
    const u8* from = values_of(unit) + (channel * SLOTS + lane_id() % 4 * 4) * CODE;
    RawValue raw;
    if constexpr (KV_BITS == 16) {
        uint2 v = *reinterpret_cast<const uint2*>(from);
        raw.words[0] = v.x, raw.words[CODE - 1] = v.y;
    } else {
        raw.words[0] = *reinterpret_cast<const u32*>(from);
    }
    return raw;
}

// And as pairs of halves.
DEVICE uint2 value_part(const RawValue& raw, u8* unit, int channel) {
    if constexpr (KV_BITS == 16) {
        return {raw.words[0], raw.words[CODE - 1]};
    } else {
        uint2 scales = *reinterpret_cast<const uint2*>(value_scales(unit) + channel / 32 * SLOTS + lane_id() % 4 * 4);
        return unpack(raw.words[0], scales.x, scales.y);
    }
}

DEVICE uint2 load_value_part(u8* unit, int channel) { return value_part(read_value(unit, channel), unit, channel); }
