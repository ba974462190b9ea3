// How weights, activations and the KV cache lie in memory. The same on every ISA, so one pack serves all of them and
// every ISA can be compared with the scalar one on the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "forms.h"

namespace tinychat {

constexpr int kActGroup = 32;      // inputs that share one activation scale
constexpr int kBlockSlots = 16;    // slots of a KV block
constexpr int kStretchSlots = 64;  // a row reads its own stretch of so many slots of a memory in 4 bits exactly
constexpr int kPartSlots = 256;    // slots of one attention tile: softmax is local to it, tiles merge in slot order

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// A linear layer's weights: tiles of 16 output rows (the last one padded with zero rows), each tile
//   quantized: what stands beside codes (forms.h), padding to 64 bytes, then the code lines of 64 bytes
//   dense: for each input k, 16 elements (one for each row)
struct LinearWeights {
    WeightKind kind = WeightKind::kF32;
    Meta meta = Meta::kNone;
    int n = 0, k = 0, group = 0;
    const uint8_t* data = nullptr;
    const float* bias = nullptr;  // n values, or null

    bool dense() const { return is_dense(kind); }
    bool quantized() const { return !dense() && !has_float_codes(kind); }  // reads activations in integers
    int tiles() const { return (n + kTile - 1) / kTile; }
    int groups() const { return k / group; }
    bool stores_offsets() const { return has_offsets(meta) || meta == Meta::kZero4; }
    size_t tile_meta_bytes() const { return dense() ? 0 : round_up(meta_bytes(meta, k, group), 64); }
    size_t tile_code_bytes() const {
        return dense() ? static_cast<size_t>(k) * kTile * element_bytes(kind)
                       : static_cast<size_t>(k / 32) * code_bits(kind) * 64;
    }
    size_t tile_bytes() const { return tile_meta_bytes() + tile_code_bytes(); }
    size_t bytes() const { return tile_bytes() * tiles(); }
    // The outputs from that tile on.
    LinearWeights from_tile(int t) const {
        LinearWeights w = *this;
        w.data += t * tile_bytes(), w.n -= t * kTile;
        if (bias) w.bias += t * kTile;
        return w;
    }
};

// Activations of a linear: fp32 rows, or integers with one scale for each 32 inputs.
//   8 bits   int8 [rows / 8][k / 32][8 rows][32 inputs]: a block of 8 rows is contiguous and the rows of a group stand
//   a
//            constant distance apart, so the kernels address them without a register each
//   16 bits  int16, the same, each 8 inputs in the order 0 2 4 6 1 3 5 7: how nibbles pair up in 16-bit lanes
// scale and nsum are [rows / 8][k / 32][8 rows], gsum is [rows / 8][k / group][8 rows].
constexpr int kRowBlock = 8;

struct Activations {
    float* f = nullptr;  // [rows, k]
    void* q = nullptr;
    float* scale = nullptr;
    int32_t* nsum = nullptr;  // minus the sum of 32 integers: the bias of 8-bit weights comes off with it
    float* gsum = nullptr;    // sum of a weight group's (quantized) inputs: zeros and offsets multiply it
    int bits = 8;
    int k = 0;
    int group = 32;  // inputs to a gsum: the group of the weights that read this

    // Index of (row, activation group) in scale and nsum; times 32: in q.
    size_t at(int row, int g) const {
        return (static_cast<size_t>(row / kRowBlock) * (k / kActGroup) + g) * kRowBlock + row % kRowBlock;
    }
    size_t group_at(int row, int g) const {
        return (static_cast<size_t>(row / kRowBlock) * (k / group) + g) * kRowBlock + row % kRowBlock;
    }
    // The rows from `row` on, which begins a block.
    Activations from_row(int row) const {
        Activations a = *this;
        if (f) a.f += static_cast<size_t>(row) * k;
        if (q) {
            a.q = static_cast<int8_t*>(q) + at(row, 0) * kActGroup * (bits / 8);
            a.scale += at(row, 0), a.nsum += at(row, 0), a.gsum += group_at(row, 0);
        }
        return a;
    }
};

// The paged KV pool. A block holds 16 slots of every layer: for each layer and KV head
//   keys    [head_dim padded to 16][16 slots]: slots in the lanes, so a score needs no horizontal sum
//   values  [16 slots][head_dim padded to 16]
// or keys alone, where the last `latent` channels of a slot's key are its value too,
// in fp16, or in int8 with an fp16 scale for each slot and 32 channels behind each head's codes: [groups][16 slots].
//
// In 4 bits, for complete blocks: lines of 64 bytes, of which a 32-bit lane has 8 codes, the first one lowest
//   keys    [head_dim / 8]: a lane is a slot, its codes are channels
//   values  [head_dim / 16][2]: a lane is a channel, its codes are slots
// and behind the codes of all layers, for each layer and head: scales and offsets of the keys' channels
// [padded_dim] each, scales and zeros of the values, [groups][16 slots] each, and two fp16 that the scales and the
// offsets of the keys are multiples of. What a code means: kv4_impl.h.
constexpr int kKvGroup = 32;
constexpr int kKv4Group = 32;

struct KvPool {
    uint8_t* base = nullptr;
    int n_blocks = 0, n_layers = 0, n_kv = 0, head_dim = 0, bits = 16;
    int latent = 0;

    int sides() const { return latent ? 1 : 2; }
    int padded_values() const { return static_cast<int>(round_up(latent ? latent : head_dim, 16)); }
    int padded_dim() const { return static_cast<int>(round_up(head_dim, 16)); }
    int groups() const {
        const int group = bits == 4 ? kKv4Group : kKvGroup;
        return (head_dim + group - 1) / group;
    }
    size_t code_bytes() const { return static_cast<size_t>(kBlockSlots) * padded_dim() * bits / 8; }
    // Of keys or values.
    size_t head_bytes() const {
        return bits != 8 ? code_bytes() : round_up(code_bytes() + groups() * kBlockSlots * sizeof(uint16_t), 64);
    }
    size_t grid_bytes() const { return bits == 4 ? 2 * (padded_dim() + groups() * kBlockSlots) + 4 : 0; }
    size_t layer_bytes() const { return sides() * n_kv * head_bytes(); }
    // Without the padding a block is often a power of two of bytes: a head's keys of all blocks would then share a few
    // cache sets and push each other out before they are read.
    size_t block_bytes() const {
        const size_t bytes = round_up(n_layers * (layer_bytes() + n_kv * grid_bytes()), 64);
        return bytes + (bits != 4 ? 33 * 64 : bytes / 64 % 2 ? 0 : 64);
    }
    uint8_t* keys(int block, int layer, int head) const {
        return base + block * block_bytes() + layer * layer_bytes() + sides() * head * head_bytes();
    }
    uint8_t* values(int block, int layer, int head) const {
        return keys(block, layer, head) + (latent ? 0 : head_bytes());
    }
    // In 4 bits: what a head's codes mean.
    uint8_t* grids(int block, int layer, int head) const {
        return keys(block, n_layers, 0) + (layer * n_kv + head) * grid_bytes();
    }
};

// Where blocks that rows of a span read exactly have their keys and values in 16 bits: in the pool of the tail, or, if
// nobody needs them behind the step that writes them, in what one layer uses after the other.
struct ExactBlocks {
    const KvPool *tail, *scratch;
    const int32_t* blocks;  // of the tail, for each block of the table; -1: none
    int layer, first;       // of the tail's layers; of the scratch blocks
    int started;            // number of the block in the table that the first of these is

    struct Place {
        const KvPool* kv;
        int block, layer;
        uint8_t* keys(int head) const { return kv->keys(block, layer, head); }
        uint8_t* values(int head) const { return kv->values(block, layer, head); }
    };
    // Of the table's block i.
    Place at(int i) const {
        const int block = blocks[i];
        return block >= 0 ? Place{tail, block, layer} : Place{scratch, first + i - started, 0};
    }
};

}  // namespace tinychat
