// How weights lie in memory (kernels_cuda/layout.py writes it), for one form of weight a compilation:
//   BITS  4, 8: integer codes;  16: halves;  32: floats, as a half and the half that it is off by, times 2048
//   META  what turns the codes of a group into weights; 16 and 32 bits have none
//
// w [n, k] in tiles of 16 outputs, each in stages of 64 inputs (4 bits) or 32. A stage is what the 32 lanes of a warp
// read, 16 bytes a lane and vector, each lane what it holds of the mma's 16×16 operand: with g = lane / 4, t = lane % 4
// it has outputs g and g + 8, and of every 32 inputs the eight from 8t on. The product does not care in which order
// inputs are summed, so activations are read the same way: 16 contiguous bytes a lane.
//   4 bits    {g, inputs 0…31}, {g+8, 0…31}, {g, 32…63}, {g+8, 32…63}: 8 codes each; nibble i is input 2i, i+4: 2i+1
//   8 bits    {g}, {g+8}: 8 bytes each, code + 128
//   16 bits   two vectors: g, g+8
//   32 bits   four: g, g+8, and what they are off by
// Groups of inputs: for each tile and group, eight records (of g), in this order:
//   SYMMETRIC  half scale[2]                    w = (q − 8) · scale, or q · scale for 8 bits
//   ZERO       half scale[2]; zeros: byte g is  w = (q − zero) · scale
//              zero of g | zero of g+8 << 4
//   OFFSET     half scale[2], offset[2]         w = q · scale + offset
//   FLOAT      float scale[2], offset[2]        likewise
// What is missing at the end (outputs to a multiple of 16, inputs to whole stages) is zero codes, scales and offsets.
#pragma once

#include "device.cuh"

enum { SYMMETRIC, ZERO, OFFSET, FLOAT, NONE };

#ifndef BITS
#define BITS 4
#define META SYMMETRIC
#endif

constexpr int TILE = 16;                                      // outputs
constexpr int CHUNK = 32;                                     // inputs that a lane has eight of
constexpr int CHUNKS = BITS == 4 ? 2 : 1;                     // in a stage
constexpr int STAGE = CHUNK * CHUNKS;                         // inputs
constexpr int VECTORS = BITS == 32 ? 4 : BITS == 16 ? 2 : 1;  // of 16 bytes, a lane and stage
constexpr int STAGE_BYTES = VECTORS * WARP * 16;
constexpr int RECORD = META == NONE ? 0 : META == FLOAT ? 16 : META == OFFSET ? 8 : 4;
constexpr int RECORDS = 8;             // of a tile and group
constexpr float OFF_BY = 1.0f / 2048;  // unit of the second half of 32 bits
constexpr u32 HALF_1024 = 0x64006400;  // a half 1024 + n has n in its lowest bits, for n up to 1023
constexpr u32 HALF_1032 = 0x64086408;  // and less 8
constexpr u32 HALF_1152 = 0x64806480;  // and less 128

// The scale and offset (or zero) of one output of a group.
struct Group {
    float scale, aux;
};

DEVICE Group group_of(const u8* meta, const u8* zeros, size_t tile_group, int row) {
    const u8* record = meta + (tile_group * RECORDS + row % 8) * RECORD;
    int half = row / 8;
    if constexpr (META == FLOAT) {
        auto* f = reinterpret_cast<const float*>(record);
        return {f[half], f[half + 2]};
    } else if constexpr (META == OFFSET) {
        auto* h = reinterpret_cast<const u16*>(record);
        return {to_float(h[half]), to_float(h[half + 2])};
    } else if constexpr (META == ZERO) {
        float scale = to_float(reinterpret_cast<const u16*>(record)[half]);
        return {scale, -scale * static_cast<float>(zeros[tile_group * RECORDS + row % 8] >> 4 * half & 15)};
    } else if constexpr (META == SYMMETRIC) {
        float scale = to_float(reinterpret_cast<const u16*>(record)[half]);
        return {scale, BITS == 4 ? -8 * scale : 0};
    } else {
        return {1, 0};
    }
}

// One weight, for those who need few: output n, input k; group: inputs that share a scale.
DEVICE float weight_at(const u8* codes, const u8* meta, const u8* zeros, int n, int k, int stages, int group,
                       int groups) {
    int tile = n / TILE, row = n % TILE, stage = k / STAGE, t = k % CHUNK / 8, i = k % 8;
    const u8* lane = codes + (static_cast<size_t>(tile) * stages + stage) * STAGE_BYTES + (row % 8 * 4 + t) * 16;
    float q;
    if constexpr (BITS == 4) {
        u32 word = reinterpret_cast<const u32*>(lane)[k % STAGE / CHUNK * 2 + row / 8];
        q = static_cast<float>(word >> 4 * (i / 2 + i % 2 * 4) & 15);
    } else if constexpr (BITS == 8) {
        q = static_cast<float>(static_cast<int>(lane[row / 8 * 8 + i]) - 128);
    } else {
        const u8* vector = lane + row / 8 * WARP * 16;
        q = to_float(reinterpret_cast<const u16*>(vector)[i]);
        if constexpr (BITS == 32) q += to_float(reinterpret_cast<const u16*>(vector + 2 * WARP * 16)[i]) * OFF_BY;
        return q;
    }
    Group g = group_of(meta, zeros, static_cast<size_t>(tile) * groups + k / group, row);
    return fmaf(q, g.scale, g.aux);
}
