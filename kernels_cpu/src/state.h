// What recurrent layers pass to their kernels. A state has fp32 numbers; a layer's lie side by side:
//   convolution  [width - 1][channels]: what it saw of the last tokens, the oldest first
//   delta rule   [value heads][key_dim][value_dim], cut by kStateColumns: for each head, for each of its blocks of so
//                many columns of values, [key_dim][columns]; then the convolution's
//   Mamba-2      [heads][state][head_dim], cut in the same way; then the convolution's
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace tinychat {

constexpr int kMostTaps = 16;
constexpr int kConvColumns = 256;  // channels of a convolution that are worked on together
constexpr int kStateColumns = 32;  // a head's state of so many columns stays in L1 while all rows pass

// States of sequences: slots of `floats` numbers.
struct StatePool {
    float* base = nullptr;
    int n_slots = 0;
    size_t floats = 0;
};

// Which state of a layer an op reads and writes.
struct StateLayer {
    int memory, layer;  // which memory of the program, and which of its layers
    size_t floats;      // of each layer
};

// Where the rows of a span find one layer's state, and where they leave it.
struct SpanState {
    const float* source;  // before the first row; null: zeros
    float* pool;          // the layer's part of slot 0
    size_t slot;          // from slot to slot
    const int32_t* kept;  // the slot that gets the state behind each row, or -1; of the span's first row

    // Where the state behind row i goes to; null: nowhere.
    float* behind(int i) const { return kept[i] < 0 ? nullptr : pool + static_cast<size_t>(kept[i]) * slot; }
};

// y = conv(x), silu(conv(x)), or out · conv(in · x): causal, each channel by itself, at most kConvColumns
// channels c0…c1-1 of the n rows of one span. Pointers are to the span's first row, the first channel.
struct ConvArgs {
    const float *x, *in, *out;  // in and out: gates, or both null
    size_t ld;                  // of the three
    const float* weight;        // [width][channels], the last for the row itself
    const float* bias;          // [channels], or null
    int channels, width;
    bool silu;
    float* y;
    size_t ldy;
    SpanState state;  // [width - 1][channels]
    int n, c0, c1;
};

struct DeltaLayer {
    int n_keys, n_values, key_dim, value_dim;
    bool tiled;  // value head i reads key head i mod n_keys; else i div (n_values / n_keys)

    int keys() const { return n_keys * key_dim; }
    int values() const { return n_values * value_dim; }
    int channels() const { return 2 * keys() + values(); }
    int key_head(int head) const { return tiled ? head % n_keys : head / (n_values / n_keys); }
    int blocks() const { return (value_dim + kStateColumns - 1) / kStateColumns; }
};

// Rows r0…r1-1: queries and keys to unit length in place, queries over sqrt(key_dim) as well; and for each value head
// what its state is multiplied by and what its change is multiplied by.
struct DeltaGateArgs {
    DeltaLayer at;
    float* qkv;                 // [rows, channels]
    const float *beta, *alpha;  // [rows, n_values]
    const float *decay, *dt;    // [n_values]
    float* gates;               // [rows, 2 · n_values]: exp(decay · softplus(alpha + dt)), then sigmoid(beta)
    int r0, r1;
};

// S ← g · S; S ← S + k (beta · (v − Sᵀk))ᵀ; y = Sᵀq, row after row, for one block of columns of one value head. It
// moves the block's state once for all rows, and once more for each row whose state is kept.
struct DeltaArgs {
    DeltaLayer at;
    const float *qkv, *gates;  // of the span's first row
    float* y;                  // [rows, values]
    SpanState state;           // [n_values][key_dim][value_dim], cut by columns
    int n, head, block;
    float* scratch;  // [key_dim][kStateColumns]
};

// How heads of a Mamba-2 layer lie: each has a state [state][head_dim]; those of a group share what is written into
// their states by (B) and read from them by (C).
struct MambaLayer {
    int n_heads, head_dim, state, groups;

    int values() const { return n_heads * head_dim; }
    int channels() const { return values() + 2 * groups * state; }
    int group_of(int head) const { return head / (n_heads / groups); }
    int blocks() const { return (head_dim + kStateColumns - 1) / kStateColumns; }
};

// Rows r0…r1-1: how long each head's step is, and how much of its state it leaves.
struct MambaGateArgs {
    MambaLayer at;
    const float* steps;  // [rows, ld], of which the first n_heads
    size_t ld;
    const float *decay, *dt;  // [n_heads]
    float least, most;        // that a step may be
    float* gates;             // [rows, 2 · n_heads]: exp(decay · step), then step = softplus(steps + dt), within limits
    int r0, r1;
};

// S ← g · S + B (step · x)ᵀ; y = Sᵀ C + skip · x, row after row, for one block of columns of one head. It moves the
// block's state once for all rows, and once more for each row whose state is kept.
struct MambaArgs {
    MambaLayer at;
    const float* xbc;    // [rows, channels]: x, then B and C of all groups; of the span's first row
    const float* gates;  // of the span's first row
    const float* skip;   // [n_heads]
    float* y;            // [rows, values]
    SpanState state;     // [n_heads][state][head_dim], cut by columns
    int n, head, block;
    float* scratch;  // [state][kStateColumns]
};

// x ← norm(x) · weight · silu(gate), or, `gated` before it is normed, norm(x · silu(gate)) · weight: root-mean-square
// norms of `width` columns each, in place. Without weights x ← x · silu(gate).
struct GatedNormArgs {
    float* x;           // [rows, cols]
    const float* gate;  // [rows, ld], of which the first cols
    size_t ld;
    const float* weight;  // null: nothing is normed
    size_t step;          // from the weights of one norm to those of the next; 0: they are the same
    int cols, width;
    float eps;
    bool gated;
    int r0, r1;
};

// x ← x · sigmoid(gate), in place; each gate is for `each` columns.
struct SigmoidArgs {
    float* x;           // [rows, gates · each]
    const float* gate;  // [rows, gates]
    int gates, each;
    int r0, r1;
};

}  // namespace tinychat
