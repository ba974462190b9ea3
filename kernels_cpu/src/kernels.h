// The table of kernels that each instruction set fills. Every kernel works on a range that one thread claimed, writes
// nothing outside it, and rounds each output the same way whatever the range, the row count and the thread count.
#pragma once

#include "cpu_info.h"
#include "layout.h"
#include "state.h"

namespace tinychat {

constexpr int kPanelRows = 64;  // prefill: rows whose activations stay in L2 while a chunk of tiles passes

// y[m, n] (+)= Σ_k w[n, k] · x[m, k] + bias[n] for m in 0…rows-1 and the tiles t0…t1-1. y points at (row 0, column 0).
struct LinearArgs {
    const LinearWeights* w;
    const Activations* x;
    int rows;
    float* y;
    size_t ldy;
    const float* add;  // residual [rows, ldadd] or null; may be y itself
    size_t ldadd;
    int t0, t1;
};

struct NormArgs {
    const float* x;       // [rows, k]
    const int32_t* rows;  // out row r takes input row rows[r]; or null: row r
    const float* weight;
    float eps;
    Activations out;   // .f and .q each optional
    const float* add;  // residual [rows, k] that the norm is added to, or null; may be out.f
    int r0, r1;
};

// Root-mean-square norm of queries and keys, in place: each head by itself, or all of a row's heads as one vector.
struct HeadNormArgs {
    float* qkv;  // [rows, ld], queries first, then keys
    size_t ld;
    int q_cols, k_cols;                // multiples of the widths
    int q_width, k_width;              // values that one norm runs over
    const float *q_weight, *k_weight;  // [q_width], [k_width]
    float eps;
    int r0, r1;
};

struct QuantizeArgs {
    const float* x;       // [rows, k]
    const int32_t* rows;  // out row r takes input row rows[r]; or null: row r
    const int32_t* perm;  // out column j takes input perm[j]; or null
    Activations out;
    int r0, r1;
    size_t ld = 0;  // of x, where that is not k
};

// What becomes of a gate g and what it lets through, u: silu(g) · u; gelu(g) · u by GELU's tanh formula; max(g, 0) · u;
// or, clamped, g' · σ(alpha · g') · (u' + 1) with g' = min(g, limit) and u' in ±limit.
enum class GateKind { kSilu, kGelu, kRelu, kClamped };
struct GateFunction {
    GateKind kind = GateKind::kSilu;
    float limit = 0.0f, alpha = 1.0f;
};

// Columns c0…c1-1 (multiples of the weight group except the last) of rows r0…r1-1 of f(gate, up).
struct GateArgs {
    const float *gate, *up;  // row 0, column c0
    size_t ld;
    Activations out;
    GateFunction f;
    int r0, r1, c0, c1;
    size_t ld_up = 0;  // of up, where that lies in rows of its own; else 0
};

struct EmbedArgs {
    const LinearWeights* w;
    const int32_t* ids;
    float* out;   // [rows, k]
    float scale;  // that the rows are multiplied by
    int r0, r1;
    const float* add = nullptr;  // [rows, k], added to that, or null
    float factor = 1.0f;         // that the sum is multiplied by
};

// magnitude · cos and sin of position · frequency for each row: table [rows][2][half].
struct RopeTableArgs {
    const double* freq;
    int half;
    double magnitude;
    const long long* positions;  // [rows]
    float* table;
    int r0, r1;
};

// One layer's attention: its heads, where its keys and values lie, and how its scores become probabilities.
struct AttentionLayer {
    int n_heads, n_kv, head_dim;
    int memory, layer;             // which KV memory of the program, and which of its layers
    int tail;                      // the memory that has what rows read exactly, if it is one of 4 bits; else -1
    float scale;                   // queries are multiplied by it
    int window;                    // a row attends to the last so many slots; 0: to all
    float cap;                     // scores become cap · tanh(score / cap); 0: they stay
    const float* sinks = nullptr;  // one more score of each head that weighs nothing but counts in the sum; or null
    bool shared = false;           // its keys and values are another layer's, which wrote them: it has queries alone
    int exact = 0;                 // of the buffers of exact blocks of 4-bit memories: 0, that of all layers in turn
    double slope = 0.0;            // queries at position p are multiplied by 1 + slope · log(1 + ⌊p / original⌋) too
    double original = 1.0;
    int latent = 0;   // so many last channels of a key are its value too, and no values are stored; 0: they are apart
    int skipped = 0;  // first slots that no row attends to

    // In 4 bits: whether the first block, which all tokens look at, is read exactly.
    bool first_exact() const { return tail >= 0 && !window; }
    // States that a row leaves of what it reads exactly: of its stretch, and of the first block.
    int exact_states() const { return (tail >= 0) + first_exact(); }
    int per_kv() const { return n_heads / n_kv; }
    int cols() const { return (n_heads + (shared ? 0 : latent ? n_kv : 2 * n_kv)) * head_dim; }
    int value_dim() const { return latent ? latent : head_dim; }
    // First slot that a row attends to, where `visible` are there with its own.
    int first_slot(int visible) const {
        const int first = window && visible > window ? visible - window : 0;
        return first > skipped ? first : skipped;
    }
};

// Rotates q in place (and scales it for the softmax), writes rotated k and v to the cache, unless they are another
// layer's. Rows of one span.
struct RopeArgs {
    AttentionLayer at;
    float* qkv;  // [rows, (heads + 2 kv_heads) · head_dim]
    const float* table;
    int half;  // rotated pairs; the head's other dimensions pass through
    const KvPool* kv;
    const int32_t* blocks;
    int length;  // slots before row 0
    int r0, r1;
    ExactBlocks exact;           // where they go to in a memory of 4 bits
    const long long* positions;  // of the rows
};

// Rotates the heads of rows r0…r1-1 in place.
struct RotateArgs {
    float* x;  // [rows, ld], heads first
    size_t ld;
    int heads, head_dim;
    const float* table;
    int half;
    int r0, r1;
};

// Stores the complete block i of a table in 4 bits, all KV heads of a layer.
struct PackKvArgs {
    const KvPool* kv;
    const int32_t* blocks;
    int layer, i;
    ExactBlocks exact;
};

// How the rows of a step spread their attention over the slots, for eviction: while attention runs, each scored row
// leaves its exponentials behind, relative to the largest score of their part.
struct ScoreScratch {
    float* weights = nullptr;  // [scored rows][heads][ld]: slots of all parts, then what is read exactly
    float* peaks = nullptr;    // [scored rows][heads][states]
    float* totals = nullptr;   // [scored rows][heads][2]: largest score, sum of exponentials
    size_t ld = 0;
    int from = 0;  // first scored row
};

// Causal attention of rows r0…r1-1 of one span for one KV head over the parts p0…p1-1 of the cache.
// With partial == null the merged result goes to out; else each (row, head, part) leaves max, sum and the weighted
// values there for attention_merge: partial [rows][heads][n_states][padded_dim + 16] (the first 16 floats hold max and
// sum). Blocks wholly behind the window of the span's first row are never read.
struct AttentionArgs {
    AttentionLayer at;
    const float* q;  // rotated and scaled: the queries of [rows, (heads + 2 kv_heads) · head_dim]
    const KvPool* kv;
    const int32_t* blocks;
    int length;          // row r attends to slots 0 … length + r, or to the last of these
    int part0, n_parts;  // what any row of the span attends to
    int n_states;        // that a row and head leave: one for each part, and in 4 bits exact_states() behind them
    float* partial;
    float* out;          // [rows, heads · value_dim]
    ScoreScratch score;  // of scored rows; without weights: there are none
    int kv_head, r0, r1, p0, p1;
    float* scratch;
    ExactBlocks exact;  // in 4 bits: where the blocks are that these rows read exactly
    bool own;           // in 4 bits: whether rows attend to these here, behind the parts
};

// Adds to out the attention probability that every slot gets in one KV head from each scored row, summed over the
// row's query heads, in their order.
struct ScoreArgs {
    AttentionLayer at;
    ScoreScratch score;
    int kv_head, n_parts, n_states;
    int rows;           // scored rows
    int length;         // row i of them attends to slots 0 … length + i
    float* out;         // row 0, this layer and KV head
    size_t row_stride;  // 0: all rows are added to the same slots, in their order
};

// Blocks of a table that rows read exactly in a memory of 4 bits: blocks of its tail.
struct ExactForms {
    const KvPool* tail = nullptr;
    const int32_t* blocks = nullptr;  // for each block of the table, -1: none

    bool has(int i) const { return tail && blocks[i] >= 0; }
    uint16_t* keys(int i, int layer, int head) const {
        return reinterpret_cast<uint16_t*>(tail->keys(blocks[i], layer, head));
    }
    uint16_t* values(int i, int layer, int head) const {
        return reinterpret_cast<uint16_t*>(tail->values(blocks[i], layer, head));
    }
};

// Opens a block of a memory in 4 bits into one of its tail, one layer and KV head.
struct OpenArgs {
    const KvPool *kv, *tail;
    int block, to, layer, kv_head;
};

// Moves slots src over slots dst in one layer and KV head of a memory of 4 bits, n of each, nothing where src is
// negative. Of `slots` in use the last n are given up. What comes into a block that rows read exactly is exact there,
// and the block, if it is complete, is stored in 4 bits anew.
struct MoveArgs {
    const KvPool* kv;
    ExactForms exact;
    const int32_t* blocks;
    int layer, kv_head, slots, n;
    const int32_t *src, *dst;
};

// Turns keys that are in the cache already by `delta` positions: slots 0…n-1 of one layer and KV head.
struct TurnKeysArgs {
    const KvPool* kv;
    ExactForms exact;
    const int32_t* blocks;
    const double* freq;
    int half, layer, kv_head, n;
    const int32_t* delta;  // of slot 0
};

// How far values lie from their weighted mean (Euclidean): slots 0…n-1 of one layer and KV head.
struct SpreadArgs {
    const KvPool* kv;
    ExactForms exact;
    const int32_t* blocks;
    int layer, kv_head, n;
    const float* weights;  // of any sum; where it is 0 they count alike
    float* out;
};

// y = cap · tanh(scale · y / cap), or scale · y where cap is 0.
struct LogitArgs {
    float* y;
    size_t ld;
    int rows, cols;
    float scale, cap;
};

// Largest of v[0 … n) and where it is first.
struct ArgmaxResult {
    float value;
    int32_t index;
};

struct KernelTable {
    const char* name;
    void (*linear)(const LinearArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*quantize)(const QuantizeArgs&);
    void (*norm_heads)(const HeadNormArgs&);
    void (*gate_mul)(const GateArgs&);
    void (*embed)(const EmbedArgs&);
    void (*rope_table)(const RopeTableArgs&);
    void (*rope_kv)(const RopeArgs&);
    void (*rotate)(const RotateArgs&);
    void (*pack_kv)(const PackKvArgs&);
    void (*attention)(const AttentionArgs&);
    void (*attention_merge)(const AttentionArgs&);
    void (*attention_score)(const ScoreArgs&);
    void (*move_slots)(const MoveArgs&);
    void (*open_block)(const OpenArgs&);
    void (*turn_keys)(const TurnKeysArgs&);
    void (*value_spread)(const SpreadArgs&);
    ArgmaxResult (*argmax)(const float* v, int n);
    void (*finish_logits)(const LogitArgs&);
    void (*short_conv)(const ConvArgs&);
    void (*delta_gates)(const DeltaGateArgs&);
    void (*delta_rule)(const DeltaArgs&);
    void (*mamba_gates)(const MambaGateArgs&);
    void (*mamba)(const MambaArgs&);
    void (*gated_norm)(const GatedNormArgs&);
    void (*sigmoid_mul)(const SigmoidArgs&);
};

constexpr int kAttentionRows = 8;  // rows of one prefill attention item; few rows split over the context: up to twice
constexpr int kMaxPairs = 12;      // of rows and heads that pass over keys and values together
// Floats of scratch that `attention` needs: queries and running state of the item's pairs, scores of a batch.
inline size_t attention_scratch(const AttentionLayer& at) {
    const size_t dim = round_up(at.head_dim, 16), pairs = static_cast<size_t>(2 * kAttentionRows) * at.per_kv();
    return pairs * (2 * dim + 16) + kMaxPairs * (kPartSlots + dim) + (at.tail < 0 ? 0 : kMaxPairs * kPartSlots) + 64;
}

const KernelTable& kernels_scalar();
#if defined(__x86_64__)
const KernelTable& kernels_avx2();
const KernelTable& kernels_avxvnni();
const KernelTable& kernels_avx512();
const KernelTable& kernels_amx();
const KernelTable& kernels_amx_emulated();
#elif defined(__aarch64__)
const KernelTable& kernels_neon();
const KernelTable& kernels_i8mm();
#endif

const KernelTable& kernels_for(IsaKind isa);

}  // namespace tinychat
