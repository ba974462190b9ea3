// Everything between two linears: norms, quantization of activations, SwiGLU, embedding rows, argmax.
// Sums run over 16 virtual lanes in a fixed order, whatever the width of the ISA's registers.
#pragma once

#include <cmath>
#include <cstring>

#include "beside_impl.h"
#include "codes_impl.h"
#include "kernels.h"

namespace tinychat {
namespace {

constexpr int kMaxHeadDim = 1024;

// 16 floats on any ISA.
template <class S>
struct V16 {
    static constexpr int N = 16 / S::kLanes;
    typename S::F v[N];

    static V16 set1(float x) {
        V16 r;
        for (int i = 0; i < N; i++) r.v[i] = S::set1(x);
        return r;
    }
    static V16 load(const float* p) {
        V16 r;
        for (int i = 0; i < N; i++) r.v[i] = S::load(p + i * S::kLanes);
        return r;
    }
    // The first n ≤ 16 values, zeros behind them; reads nothing past n.
    static V16 load_n(const float* p, int n) {
        if (n >= 16) return load(p);
        float t[16] = {};
        memcpy(t, p, n * sizeof(float));
        return load(t);
    }
    void store(float* p) const {
        for (int i = 0; i < N; i++) S::store(p + i * S::kLanes, v[i]);
    }
    void store_n(float* p, int n) const {
        if (n >= 16) return store(p);
        float t[16];
        store(t);
        memcpy(p, t, n * sizeof(float));
    }
    // Lane i takes f(a[i], b[i], …).
    template <class Fn, class... A>
    static V16 map(Fn f, const A&... a) {
        V16 r;
        for (int i = 0; i < N; i++) r.v[i] = f(a.v[i]...);
        return r;
    }
    friend V16 operator+(V16 a, V16 b) {
        return map([](auto x, auto y) { return S::add(x, y); }, a, b);
    }
    friend V16 operator*(V16 a, V16 b) {
        return map([](auto x, auto y) { return S::mul(x, y); }, a, b);
    }
    friend V16 operator/(V16 a, V16 b) {
        return map([](auto x, auto y) { return S::div(x, y); }, a, b);
    }
    static V16 fma(V16 a, V16 b, V16 c) {
        return map([](auto x, auto y, auto z) { return S::fma(x, y, z); }, a, b, c);
    }
    static V16 max(V16 a, V16 b) {
        return map([](auto x, auto y) { return S::max(x, y); }, a, b);
    }
    static V16 max_abs(V16 a, V16 b) {
        return map([](auto x, auto y) { return S::max_abs(x, y); }, a, b);
    }

    // Lanes i and i + 8, then 4, 2, 1: the same tree on every ISA.
    float sum() const {
        V16 t = *this;
        for (int w = N / 2; w > 0; w /= 2)
            for (int i = 0; i < w; i++) t.v[i] = S::add(t.v[i], t.v[i + w]);
        return S::sum(t.v[0]);
    }
    float largest() const {
        typename S::F m = v[0];
        for (int i = 1; i < N; i++) m = S::max(m, v[i]);
        return S::maxf(m);
    }
    // The largest bit pattern: of absolute values, the largest number, or NaN if there is one.
    float largest_bits() const {
        int32_t m = S::maxi(S::bits(v[0]));
        for (int i = 1; i < N; i++) {
            const int32_t other = S::maxi(S::bits(v[i]));
            m = other > m ? other : m;
        }
        float f;
        memcpy(&f, &m, 4);
        return f;
    }
};

// e^c for c in -87…88, within 2 ulp.
template <class S>
inline typename S::F exp_bounded(typename S::F c) {
    using F = typename S::F;
    typename S::I n = S::round(S::mul(c, S::set1(1.44269504f)));
    F nf = S::to_float(n);
    F r = S::fma(nf, S::set1(-0.693359375f), c);
    r = S::fma(nf, S::set1(2.12194440e-4f), r);
    // Cephes' expf polynomial, by pairs (Estrin): half as long a chain.
    const F r2 = S::mul(r, r);
    const F a = S::fma(S::set1(1.9875691500e-4f), r, S::set1(1.3981999507e-3f));
    const F b = S::fma(S::set1(8.3334519073e-3f), r, S::set1(4.1665795894e-2f));
    const F d = S::fma(S::set1(1.6666665459e-1f), r, S::set1(5.0000001201e-1f));
    const F p = S::fma(r2, S::fma(S::fma(a, r2, b), r2, d), S::add(r, S::set1(1.0f)));
    return S::mul(p, S::pow2(n));
}

// e^x; 0 below -87 (so that a masked score of -infinity weighs nothing), infinity above 88.
template <class S>
inline typename S::F exp_lanes(typename S::F x) {
    typename S::F y = exp_bounded<S>(S::min(S::max(x, S::set1(-87.0f)), S::set1(88.0f)));
    y = S::select_lt(x, S::set1(-87.0f), S::zero(), y);
    y = S::select_lt(S::set1(88.0f), x, S::set1(INFINITY), y);
    // NaN is below nothing and above nothing, and stays.
    return S::select_lt(x, S::set1(INFINITY), y, S::select_lt(S::set1(88.0f), x, y, x));
}

// The same for x ≤ 0, as in a softmax; 0 below -87.7, where pow2 of -127 is. NaN stays (max gives its second operand if
// one is NaN).
template <class S>
inline typename S::F exp_below(typename S::F x) {
    return exp_bounded<S>(S::max(S::set1(-88.0f), x));
}

template <class S>
inline V16<S> exp16(V16<S> x) {
    return V16<S>::map([](auto v) { return exp_lanes<S>(v); }, x);
}

constexpr int kSpan = 8 * kActGroup;  // columns that are worked on together: their chains of latency overlap

// Quantizes a row span by span, from a column where a weight group begins. NaN and infinity make the scale NaN or
// infinite, so they stay visible in every output of the row; a group that is zero (or denormal) gets scale 0.
template <class S>
class RowQuantizer {
  public:
    RowQuantizer(const Activations& out, int row, int column = 0)
        : out_(out), at_(out.at(row, column / kActGroup)), gsum_(out.gsum + out.group_at(row, column / out.group)) {}

    // The next n ≤ kSpan columns, whole activation groups.
    void add(const float* x, int n) {
        using V = V16<S>;
        const int groups = n / kActGroup;
        const float top = out_.bits == 8 ? 127.0f : 32767.0f;
        float peak[kSpan / kActGroup];
        int32_t sum[kSpan / kActGroup][2];  // of each half
        for (int g = 0; g < groups; g++) {
            const V a = V::load(x + g * kActGroup), b = V::load(x + g * kActGroup + 16);
            peak[g] = V::max_abs(V::max_abs(V::set1(0.0f), a), b).largest_bits();
        }
        for (int g = 0; g < groups; g++) {
            const typename S::F inv = S::set1(peak[g] > 1e-30f ? top / peak[g] : 0.0f);
            if (out_.bits == 8)
                bytes(x + g * kActGroup, inv, at_ + g * kRowBlock, sum[g]);
            else
                words(x + g * kActGroup, inv, at_ + g * kRowBlock, sum[g]);
        }
        for (int g = 0; g < groups; g++, at_ += kRowBlock) {
            const float scale = peak[g] < 1e-30f ? 0.0f : peak[g] * (1.0f / top);
            out_.scale[at_] = scale;
            const uint32_t whole = static_cast<uint32_t>(sum[g][0]) + static_cast<uint32_t>(sum[g][1]);
            out_.nsum[at_] = static_cast<int32_t>(0u - whole);
            if (out_.group < kActGroup) {
                for (int half = 0; half < 2; half++, gsum_ += kRowBlock)
                    *gsum_ = scale * static_cast<float>(sum[g][half]);
                continue;
            }
            sum_ += scale * static_cast<float>(static_cast<int32_t>(whole));
            if ((done_ += kActGroup) < out_.group) continue;
            *gsum_ = sum_;
            gsum_ += kRowBlock, sum_ = 0.0f, done_ = 0;
        }
    }

  private:
    // Integers of 32 columns to their place, and their sums: of each half, or of all first and then 0.
    void bytes(const float* x, typename S::F inv, size_t at, int32_t (&sum)[2]) {
        int8_t* out = static_cast<int8_t*>(out_.q) + at * kActGroup;
        integers(x, inv, sum, [&](int i, typename S::I q) { S::store_i8(out + i, q); });
    }
    void words(const float* x, typename S::F inv, size_t at, int32_t (&sum)[2]) {
        int16_t* out = static_cast<int16_t*>(out_.q) + at * kActGroup;
        int16_t plain[kActGroup];
        integers(x, inv, sum, [&](int i, typename S::I q) { S::store_i16(plain + i, q); });
        for (int i = 0; i < kActGroup; i += 8)
            for (int j = 0; j < 4; j++) {
                out[i + j] = plain[i + 2 * j];
                out[i + 4 + j] = plain[i + 2 * j + 1];
            }
    }
    template <class Store>
    void integers(const float* x, typename S::F inv, int32_t (&sum)[2], Store store) {
        typename S::I sums[2] = {S::set1i(0), S::set1i(0)};
        for (int i = 0; i < kActGroup; i += S::kLanes) {
            const typename S::I q = S::round(S::mul(S::load(x + i), inv));
            sums[i / 16] = S::addi(sums[i / 16], q);
            store(i, q);
        }
        const bool halves = out_.group < kActGroup;
        sum[0] = S::sumi(halves ? sums[0] : S::addi(sums[0], sums[1]));
        sum[1] = halves ? S::sumi(sums[1]) : 0;
    }

    const Activations& out_;
    size_t at_;
    float* gsum_;
    float sum_ = 0.0f;
    int done_ = 0;
};

// 1 / sqrt(mean(x²) + eps) of k values.
template <class S>
inline float inverse_rms(const float* x, int k, float eps) {
    using V = V16<S>;
    V s[4] = {V::set1(0), V::set1(0), V::set1(0), V::set1(0)};
    for (int i = 0; i < k; i += 64)
        for (int j = 0; j < 4 && i + 16 * j < k; j++) {
            V v = V::load_n(x + i + 16 * j, k - i - 16 * j);
            s[j] = V::fma(v, v, s[j]);
        }
    const float mean = ((s[0] + s[1]) + (s[2] + s[3])).sum() / static_cast<float>(k);
    return 1.0f / std::sqrt(mean + eps);
}

template <class S>
void rms_norm(const NormArgs& a) {
    using V = V16<S>;
    const int k = a.out.k;
    for (int r = a.r0; r < a.r1; r++) {
        const float* x = a.x + static_cast<size_t>(a.rows ? a.rows[r] : r) * k;
        const V inv = V::set1(inverse_rms<S>(x, k, a.eps));
        float y[kSpan];
        RowQuantizer<S> quantizer(a.out, r);
        for (int i = 0; i < k; i += kSpan) {
            const int span = k - i < kSpan ? k - i : kSpan;
            for (int j = 0; j < span; j += 16) {
                const int n = span - j;
                V v = V::load_n(x + i + j, n) * inv * V::load_n(a.weight + i + j, n);
                if (a.add) v = V::load_n(a.add + static_cast<size_t>(r) * k + i + j, n) + v;
                if (a.out.f) v.store_n(a.out.f + static_cast<size_t>(r) * k + i + j, n);
                v.store(y + j);
            }
            if (a.out.q) quantizer.add(y, span);
        }
    }
}

template <class S>
inline void norm_spans(float* x, int cols, int width, const float* weight, float eps) {
    using V = V16<S>;
    for (float* end = x + cols; x < end; x += width) {
        const V inv = V::set1(inverse_rms<S>(x, width, eps));
        for (int i = 0; i < width; i += 16) {
            const int n = width - i;
            (V::load_n(x + i, n) * inv * V::load_n(weight + i, n)).store_n(x + i, n);
        }
    }
}

template <class S>
void norm_heads(const HeadNormArgs& a) {
    for (int r = a.r0; r < a.r1; r++) {
        float* q = a.qkv + static_cast<size_t>(r) * a.ld;
        norm_spans<S>(q, a.q_cols, a.q_width, a.q_weight, a.eps);
        norm_spans<S>(q + a.q_cols, a.k_cols, a.k_width, a.k_weight, a.eps);
    }
}

template <class S>
void quantize(const QuantizeArgs& a) {
    const int k = a.out.k;
    float permuted[kSpan];
    for (int r = a.r0; r < a.r1; r++) {
        const float* x = a.x + static_cast<size_t>(a.rows ? a.rows[r] : r) * (a.ld ? a.ld : k);
        RowQuantizer<S> quantizer(a.out, r);
        for (int i = 0; i < k; i += kSpan) {
            const int n = k - i < kSpan ? k - i : kSpan;
            const float* y = x + i;
            if (a.perm) {
                for (int j = 0; j < n; j++) permuted[j] = x[a.perm[i + j]];
                y = permuted;
            }
            if (a.out.f) memcpy(a.out.f + static_cast<size_t>(r) * k + i, y, n * sizeof(float));
            if (a.out.q) quantizer.add(y, n);
        }
    }
}

// f(gate, up) of 16 columns.
template <class S, GateKind kind>
inline V16<S> gated(const GateFunction& f, V16<S> g, V16<S> up) {
    using V = V16<S>;
    if constexpr (kind == GateKind::kClamped) {
        const typename S::F limit = S::set1(f.limit), below = S::set1(-f.limit);
        g = V::map([=](auto x) { return S::select_lt(limit, x, limit, x); }, g);  // NaN stays
        up = V::map([=](auto x) { return S::select_lt(x, below, below, S::select_lt(limit, x, limit, x)); }, up);
        const V e = exp16<S>(g * V::set1(-f.alpha));
        return g / (e + V::set1(1.0f)) * (up + V::set1(1.0f));
    }
    // GELU's tanh formula is x · sigmoid(2 √(2/π) (x + 0.044715 x³))
    if constexpr (kind == GateKind::kRelu) return V::max(g, V::set1(0.0f)) * up;
    const V z = kind == GateKind::kGelu ? g * V::fma(g * g, V::set1(0.0713548163f), V::set1(1.5957691216f)) : g;
    const V e = exp16<S>(z * V::set1(-1.0f));
    return g / (e + V::set1(1.0f)) * up;
}

template <class S, GateKind kind>
void gate_rows(const GateArgs& a) {
    using V = V16<S>;
    const int k = a.out.k;
    float y[kSpan];
    for (int r = a.r0; r < a.r1; r++) {
        const float *gate = a.gate + r * a.ld, *up = a.up + r * (a.ld_up ? a.ld_up : a.ld);
        RowQuantizer<S> quantizer(a.out, r, a.c0);
        for (int i = a.c0; i < a.c1; i += kSpan, gate += kSpan, up += kSpan) {
            const int span = a.c1 - i < kSpan ? a.c1 - i : kSpan;
            for (int j = 0; j < span; j += 16) {
                const int n = span - j;
                const V v = gated<S, kind>(a.f, V::load_n(gate + j, n), V::load_n(up + j, n));
                if (a.out.f) v.store_n(a.out.f + static_cast<size_t>(r) * k + i + j, n);
                v.store(y + j);
            }
            if (a.out.q) quantizer.add(y, span);
        }
    }
}

template <class S>
void gate_mul(const GateArgs& a) {
    if (a.f.kind == GateKind::kClamped)
        gate_rows<S, GateKind::kClamped>(a);
    else if (a.f.kind == GateKind::kGelu)
        gate_rows<S, GateKind::kGelu>(a);
    else if (a.f.kind == GateKind::kRelu)
        gate_rows<S, GateKind::kRelu>(a);
    else
        gate_rows<S, GateKind::kSilu>(a);
}

// A row of the embedding: one lane of its tile. The tile's other rows come along in the same cache lines; cheaper than
// keeping a second copy of a tied embedding.
template <class S>
inline void embed_row(const LinearWeights& w, int id, float* out) {
    const int lane = id % kTile;
    const uint8_t* tile = w.data + static_cast<size_t>(id / kTile) * w.tile_bytes();
    const uint8_t* codes = tile + w.tile_meta_bytes();
    float one[16];
    if (w.kind == WeightKind::kF32) {
        for (int k = 0; k < w.k; k++) memcpy(out + k, codes + (static_cast<size_t>(k) * kTile + lane) * 4, 4);
        return;
    }
    if (w.kind == WeightKind::kF16 || w.kind == WeightKind::kBF16) {
        for (int k = 0; k < w.k; k += 16) {
            uint16_t h[16] = {};
            const int n = w.k - k < 16 ? w.k - k : 16;
            for (int i = 0; i < n; i++) memcpy(h + i, codes + (static_cast<size_t>(k + i) * kTile + lane) * 2, 2);
            for (int i = 0; i < 16; i += S::kLanes)
                S::store(one + i, w.kind == WeightKind::kF16 ? S::load_f16(h + i) : S::load_bf16(h + i));
            memcpy(out + k, one, n * sizeof(float));
        }
        return;
    }
    const int run = w.group < kSuper ? kSuper / w.group : 1;
    const bool stored = w.stores_offsets();
    Beside beside;
    for (int g0 = 0; g0 < w.groups(); g0 += run) {
        const int groups = w.groups() - g0 < run ? w.groups() - g0 : run;
        open_beside<S>(w, tile, g0, groups, beside);
        for (int g = 0; g < groups; g++) {
            const float scale = beside.scale[g * kTile + lane];
            const float offset = stored ? beside.offset[g * kTile + lane] : beside.zero * scale;
            for (int k = (g0 + g) * w.group, end = k + w.group; k < end; k++) {
                out[k] = std::fmaf(value_at(w.kind, codes, lane, k), scale, offset);
            }
        }
    }
}

template <class S>
void embed(const EmbedArgs& a) {
    for (int r = a.r0; r < a.r1; r++) {
        float* out = a.out + static_cast<size_t>(r) * a.w->k;
        embed_row<S>(*a.w, a.ids[r] < a.w->n ? a.ids[r] : 0, out);
        if (a.scale != 1.0f)
            for (int k = 0; k < a.w->k; k++) out[k] *= a.scale;
        const float* add = a.add + static_cast<size_t>(r) * a.w->k;
        for (int k = 0; a.add && k < a.w->k; k++) out[k] = (add[k] + out[k]) * a.factor;
    }
}

// cap · tanh(x / cap), where tanh(z) = 1 - 2 / (e^2z + 1).
template <class S>
inline V16<S> soft_cap(V16<S> x, float cap) {
    using V = V16<S>;
    const V e = exp16<S>(x * V::set1(2.0f / cap));
    return V::fma(V::set1(-2.0f * cap) / (e + V::set1(1.0f)), V::set1(1.0f), V::set1(cap));
}

template <class S>
void finish_logits(const LogitArgs& a) {
    using V = V16<S>;
    const V scale = V::set1(a.scale);
    for (int r = 0; r < a.rows; r++)
        for (int i = 0; i < a.cols; i += 16) {
            float* y = a.y + r * a.ld + i;
            const V v = V::load_n(y, a.cols - i) * scale;
            (a.cap == 0.0f ? v : soft_cap<S>(v, a.cap)).store_n(y, a.cols - i);
        }
}

// The first index of the largest value; -1 where there is a NaN or an infinity above all, and where nothing is finite.
template <class S>
ArgmaxResult argmax(const float* v, int n) {
    using V = V16<S>;
    V best = V::set1(-INFINITY), high = V::set1(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const V x = V::load(v + i);
        best = V::max(x, best);  // NaN in x gives best
        high = V::max_abs(high, x);
    }
    float top = best.largest(), size = high.largest_bits();
    bool nan = size != size;
    for (; i < n; i++) {
        top = v[i] > top ? v[i] : top;
        nan |= v[i] != v[i];
    }
    if (nan || top == INFINITY) return {INFINITY, -1};
    if (top == -INFINITY) return {top, -1};
    for (i = 0; i < n; i++)
        if (v[i] == top) return {top, i};
    return {-INFINITY, -1};
}

}  // namespace
}  // namespace tinychat
