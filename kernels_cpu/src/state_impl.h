// Recurrent layers: rows pass through a state one after the other, and every row takes the same roundings however the
// rows are cut into steps.
#pragma once

#include "rows_impl.h"
#include "state.h"

namespace tinychat {
namespace {

template <class S>
inline V16<S> sigmoid(V16<S> x) {
    using V = V16<S>;
    return V::set1(1.0f) / (exp16<S>(x * V::set1(-1.0f)) + V::set1(1.0f));
}

template <class S>
inline V16<S> silu(V16<S> x) {
    using V = V16<S>;
    return x / (exp16<S>(x * V::set1(-1.0f)) + V::set1(1.0f));
}

template <class S>
void short_conv(const ConvArgs& a) {
    using V = V16<S>;
    const int taps = a.width - 1, cols = a.c1 - a.c0;
    // What was seen last, in turn: row after row the oldest makes way. Rows outside, so that memory is read along.
    float seen[(kMostTaps - 1) * kConvColumns];
    for (int j = 0; j < taps; j++) {
        const float* from = a.state.source + static_cast<size_t>(j) * a.channels + a.c0;
        if (a.state.source)
            memcpy(seen + j * kConvColumns, from, cols * sizeof(float));
        else
            memset(seen + j * kConvColumns, 0, cols * sizeof(float));
    }
    int oldest = 0;
    for (int r = 0; r < a.n; r++) {
        const size_t at = r * a.ld + a.c0;
        for (int c = 0; c < cols; c += 16) {
            const int n = cols - c;
            const float* weight = a.weight + a.c0 + c;
            V x = V::load_n(a.x + at + c, n);
            if (a.in) x = x * V::load_n(a.in + at + c, n);
            V y = a.bias ? V::load_n(a.bias + a.c0 + c, n) : V::set1(0.0f);
            for (int j = 0, ring = oldest; j < taps; j++, weight += a.channels) {
                y = V::fma(V::load_n(weight, n), V::load_n(seen + ring * kConvColumns + c, n), y);
                ring = ring + 1 < taps ? ring + 1 : 0;
            }
            y = V::fma(V::load_n(weight, n), x, y);
            x.store_n(seen + oldest * kConvColumns + c, n);
            if (a.silu) y = silu<S>(y);
            if (a.out) y = y * V::load_n(a.out + at + c, n);
            y.store_n(a.y + r * a.ldy + a.c0 + c, n);
        }
        oldest = oldest + 1 < taps ? oldest + 1 : 0;
        float* kept = a.state.behind(r);
        for (int j = 0, ring = oldest; kept && j < taps; j++, ring = ring + 1 < taps ? ring + 1 : 0)
            memcpy(kept + static_cast<size_t>(j) * a.channels + a.c0, seen + ring * kConvColumns, cols * sizeof(float));
    }
}

// x of n values divided by its length, times scale.
template <class S>
inline void to_unit(float* x, int n, float scale) {
    using V = V16<S>;
    V squares = V::set1(0.0f);
    for (int i = 0; i < n; i += 16) {
        const V v = V::load_n(x + i, n - i);
        squares = V::fma(v, v, squares);
    }
    const V by = V::set1(scale / std::sqrt(squares.sum() + 1e-6f));
    for (int i = 0; i < n; i += 16) (V::load_n(x + i, n - i) * by).store_n(x + i, n - i);
}

template <class S>
void delta_gates(const DeltaGateArgs& a) {
    const int heads = a.at.n_values, dim = a.at.key_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int r = a.r0; r < a.r1; r++) {
        float* q = a.qkv + static_cast<size_t>(r) * a.at.channels();
        for (int h = 0; h < a.at.n_keys; h++) {
            to_unit<S>(q + h * dim, dim, scale);
            to_unit<S>(q + a.at.keys() + h * dim, dim, 1.0f);
        }
        const float *beta = a.beta + static_cast<size_t>(r) * heads, *alpha = a.alpha + static_cast<size_t>(r) * heads;
        float* gates = a.gates + static_cast<size_t>(r) * 2 * heads;
        for (int h = 0; h < heads; h++) {
            const float x = alpha[h] + a.dt[h];
            const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
            gates[h] = std::exp(a.decay[h] * softplus);
            gates[heads + h] = 1.0f / (1.0f + std::exp(-beta[h]));
        }
    }
}

// S ← g · S + in dᵀ; y = Sᵀ out, over columns of a state [dim][kStateColumns], NV vectors wide. in and out: [dim]. Sums
// run in four chains, so that they do not wait for each other.
template <class S, int NV>
inline void move_state(float* state, int dim, const float* in, const V16<S>* d, float g, const float* out, V16<S>* y) {
    using V = V16<S>;
    constexpr int kChains = 4;
    V sum[kChains][NV];
    for (int c = 0; c < kChains; c++)
        for (int j = 0; j < NV; j++) sum[c][j] = V::set1(0.0f);
    const V decay = V::set1(g);
    const auto step = [&](int at, V* to) {
        for (int j = 0; j < NV; j++) {
            float* p = state + at * kStateColumns + 16 * j;
            const V s = V::fma(V::set1(in[at]), d[j], V::load(p) * decay);
            s.store(p);
            to[j] = V::fma(s, V::set1(out[at]), to[j]);
        }
    };
    int i = 0;
    for (; i + kChains <= dim; i += kChains)
        for (int c = 0; c < kChains; c++) step(i + c, sum[c]);
    for (; i < dim; i++) step(i, sum[0]);
    for (int j = 0; j < NV; j++) y[j] = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
}

// One row over columns of a delta rule's state, NV vectors wide.
template <class S, int NV>
inline void delta_row(float* state, int dim, const float* q, const float* k, const V16<S>* v, float g, float beta,
                      V16<S>* y) {
    using V = V16<S>;
    constexpr int kChains = 4;
    V sum[kChains][NV];
    for (int c = 0; c < kChains; c++)
        for (int j = 0; j < NV; j++) sum[c][j] = V::set1(0.0f);
    int i = 0;
    for (; i + kChains <= dim; i += kChains)
        for (int c = 0; c < kChains; c++)
            for (int j = 0; j < NV; j++)
                sum[c][j] = V::fma(V::load(state + (i + c) * kStateColumns + 16 * j), V::set1(k[i + c]), sum[c][j]);
    for (; i < dim; i++)
        for (int j = 0; j < NV; j++)
            sum[0][j] = V::fma(V::load(state + i * kStateColumns + 16 * j), V::set1(k[i]), sum[0][j]);
    V change[NV];
    for (int j = 0; j < NV; j++) {
        const V there = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
        change[j] = V::fma(there, V::set1(-g), v[j]) * V::set1(beta);
    }
    move_state<S, NV>(state, dim, k, change, g, q, y);
}

// A block of columns of one head's state [dim][head columns]: where it lies among all heads', and how wide it is.
struct StateBlock {
    StateBlock(int dim, int head_columns, int head, int block)
        : dim(dim), cols(std::min(kStateColumns, head_columns - block * kStateColumns)) {
        // Of this head's state the blocks before this one are whole.
        at = static_cast<size_t>(dim) * (static_cast<size_t>(head) * head_columns + block * kStateColumns);
    }
    // From the state before the first row to scratch [dim][kStateColumns].
    void load(const SpanState& state, float* scratch) const {
        const bool whole = cols == kStateColumns;
        if (!whole || !state.source) memset(scratch, 0, sizeof(float) * dim * kStateColumns);
        if (state.source && whole) memcpy(scratch, state.source + at, bytes() * dim);
        for (int i = 0; state.source && !whole && i < dim; i++)
            memcpy(scratch + i * kStateColumns, state.source + at + static_cast<size_t>(i) * cols, bytes());
    }
    // From scratch to where the state behind row r goes, if that is kept.
    void keep(const SpanState& state, int r, const float* scratch) const {
        float* to = state.behind(r);
        if (to && cols == kStateColumns) memcpy(to + at, scratch, bytes() * dim);
        for (int i = 0; to && cols != kStateColumns && i < dim; i++)
            memcpy(to + at + static_cast<size_t>(i) * cols, scratch + i * kStateColumns, bytes());
    }
    size_t bytes() const { return cols * sizeof(float); }

    int dim, cols;
    size_t at;
};

template <class S>
void delta_rule(const DeltaArgs& a) {
    using V = V16<S>;
    const int dim = a.at.key_dim, c0 = a.block * kStateColumns;
    const StateBlock block(dim, a.at.value_dim, a.head, a.block);
    const int cols = block.cols;
    block.load(a.state, a.scratch);
    for (int r = 0; r < a.n; r++) {
        const float* q = a.qkv + static_cast<size_t>(r) * a.at.channels() + a.at.key_head(a.head) * dim;
        const float *k = q + a.at.keys(), *gates = a.gates + static_cast<size_t>(r) * 2 * a.at.n_values;
        const float* v =
            a.qkv + static_cast<size_t>(r) * a.at.channels() + 2 * a.at.keys() + a.head * a.at.value_dim + c0;
        float* y = a.y + static_cast<size_t>(r) * a.at.values() + a.head * a.at.value_dim + c0;
        const float g = gates[a.head], beta = gates[a.at.n_values + a.head];
        V in[2] = {V::load_n(v, cols), cols > 16 ? V::load_n(v + 16, cols - 16) : V::set1(0.0f)}, out[2];
        if constexpr (S::kLanes == 16) {  // registers for both vectors
            delta_row<S, 2>(a.scratch, dim, q, k, in, g, beta, out);
        } else {
            delta_row<S, 1>(a.scratch, dim, q, k, in, g, beta, out);
            delta_row<S, 1>(a.scratch + 16, dim, q, k, in + 1, g, beta, out + 1);
        }
        out[0].store_n(y, cols);
        if (cols > 16) out[1].store_n(y + 16, cols - 16);
        block.keep(a.state, r, a.scratch);
    }
}

template <class S>
void mamba_gates(const MambaGateArgs& a) {
    const int heads = a.at.n_heads;
    for (int r = a.r0; r < a.r1; r++) {
        const float* steps = a.steps + static_cast<size_t>(r) * a.ld;
        float* gates = a.gates + static_cast<size_t>(r) * 2 * heads;
        for (int h = 0; h < heads; h++) {
            const float x = steps[h] + a.dt[h];
            const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
            const float step = std::min(std::max(softplus, a.least), a.most);
            gates[h] = std::exp(a.decay[h] * step);
            gates[heads + h] = step;
        }
    }
}

template <class S>
void mamba(const MambaArgs& a) {
    using V = V16<S>;
    const int dim = a.at.state, c0 = a.head * a.at.head_dim + a.block * kStateColumns;
    const StateBlock block(dim, a.at.head_dim, a.head, a.block);
    const int cols = block.cols;
    const V skip = V::set1(a.skip[a.head]), none = V::set1(0.0f);
    block.load(a.state, a.scratch);
    for (int r = 0; r < a.n; r++) {
        const float *row = a.xbc + static_cast<size_t>(r) * a.at.channels(), *x = row + c0;
        const float *b = row + a.at.values() + a.at.group_of(a.head) * dim, *c = b + a.at.groups * dim;
        const float* gates = a.gates + static_cast<size_t>(r) * 2 * a.at.n_heads;
        const V step = V::set1(gates[a.at.n_heads + a.head]);
        const V in[2] = {V::load_n(x, cols), cols > 16 ? V::load_n(x + 16, cols - 16) : none};
        const V change[2] = {in[0] * step, in[1] * step};
        V out[2];
        if constexpr (S::kLanes == 16) {  // registers for both vectors
            move_state<S, 2>(a.scratch, dim, b, change, gates[a.head], c, out);
        } else {
            move_state<S, 1>(a.scratch, dim, b, change, gates[a.head], c, out);
            move_state<S, 1>(a.scratch + 16, dim, b, change + 1, gates[a.head], c, out + 1);
        }
        float* y = a.y + static_cast<size_t>(r) * a.at.values() + c0;
        V::fma(in[0], skip, out[0]).store_n(y, cols);
        if (cols > 16) V::fma(in[1], skip, out[1]).store_n(y + 16, cols - 16);
        block.keep(a.state, r, a.scratch);
    }
}

template <class S>
void gated_norm(const GatedNormArgs& a) {
    using V = V16<S>;
    for (int r = a.r0; r < a.r1; r++) {
        float* x = a.x + static_cast<size_t>(r) * a.cols;
        const float* gate = a.gate + static_cast<size_t>(r) * a.ld;
        for (int i = 0; a.gated && i < a.cols; i += 16) {
            const int n = a.cols - i;
            (V::load_n(x + i, n) * silu<S>(V::load_n(gate + i, n))).store_n(x + i, n);
        }
        const float* weight = a.weight;
        for (int c = 0; weight && c < a.cols; c += a.width, weight += a.step) {
            const V inv = V::set1(inverse_rms<S>(x + c, a.width, a.eps));
            for (int i = 0; i < a.width; i += 16) {
                const int n = a.width - i;
                V y = V::load_n(x + c + i, n) * inv * V::load_n(weight + i, n);
                if (!a.gated) y = y * silu<S>(V::load_n(gate + c + i, n));
                y.store_n(x + c + i, n);
            }
        }
    }
}

template <class S>
void sigmoid_mul(const SigmoidArgs& a) {
    using V = V16<S>;
    for (int r = a.r0; r < a.r1; r++) {
        float* x = a.x + static_cast<size_t>(r) * a.gates * a.each;
        const float* gate = a.gate + static_cast<size_t>(r) * a.gates;
        if (a.each == 1) {
            for (int i = 0; i < a.gates; i += 16) {
                const int n = a.gates - i;
                (V::load_n(x + i, n) * sigmoid<S>(V::load_n(gate + i, n))).store_n(x + i, n);
            }
            continue;
        }
        for (int h = 0; h < a.gates; h++, x += a.each) {
            const V by = sigmoid<S>(V::set1(gate[h]));
            for (int i = 0; i < a.each; i += 16) (V::load_n(x + i, a.each - i) * by).store_n(x + i, a.each - i);
        }
    }
}

}  // namespace
}  // namespace tinychat
