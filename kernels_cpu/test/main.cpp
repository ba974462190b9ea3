// Every instruction set of this machine against the scalar one, bit for bit, on buffers of exactly the right size; and
// programs run by several threads. Made to be run under the sanitizers and under qemu:
//   kernels_test kernels | threads | isas
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "amx_tiles.h"
#include "pack.h"
#include "program.h"

using namespace tinychat;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
    if (ok) return;
    std::printf("FAILED %s\n", what.c_str());
    failures++;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Exactly n values at a 64-byte boundary: one more byte is somebody else's.
template <class T>
class Aligned {
  public:
    explicit Aligned(size_t n) : n_(n) {
        if (posix_memalign(&p_, 64, n * sizeof(T) ? n * sizeof(T) : 1)) std::abort();
        std::memset(p_, 0, n * sizeof(T));
    }
    ~Aligned() { std::free(p_); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    T* data() { return static_cast<T*>(p_); }
    std::vector<T> copy() const { return {static_cast<T*>(p_), static_cast<T*>(p_) + n_}; }

  private:
    void* p_ = nullptr;
    size_t n_;
};

std::mt19937 rng(1);

float normal() { return std::normal_distribution<float>()(rng); }
int uniform(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); }
uint16_t random_half() { return static_cast<uint16_t>(0x2000 + uniform(0, 0x3ff)); }  // about 0.008

struct Weights {
    LinearWeights w;
    std::unique_ptr<Aligned<uint8_t>> packed;
    std::vector<float> bias;

    Weights(WeightKind kind, Meta meta, int n, int k, int group) {
        w.kind = kind, w.meta = meta, w.n = n, w.k = k, w.group = group;
        const CanonicalBytes size(w);
        std::vector<uint8_t> codes(size.codes);
        const int width = element_bytes(kind);
        for (size_t i = 0; i < codes.size() / width; i++) {
            if (!w.dense())
                codes[i] = static_cast<uint8_t>(kind == WeightKind::kW8 ? uniform(-128, 127)
                                                                        : uniform(0, (1 << code_bits(kind)) - 1));
            if (width == 2) {
                const uint16_t h =
                    kind == WeightKind::kF16 ? random_half() : static_cast<uint16_t>(0x3c00 + uniform(0, 255));
                std::memcpy(&codes[2 * i], &h, 2);
            }
            if (width == 4) {
                const float f = normal();
                std::memcpy(&codes[4 * i], &f, 4);
            }
        }
        // Scales and offsets are bytes below 64, halves or floats; so are the numbers that bytes are multiplied by.
        const auto beside = [&](size_t bytes, int element) {
            std::vector<uint8_t> a(bytes);
            for (size_t i = 0; i < bytes; i += element) {
                const uint16_t h = random_half();
                const float f = normal();
                if (element == 1) a[i] = static_cast<uint8_t>(uniform(0, meta == Meta::kSigned6 ? 31 : 63));
                if (element == 1 && meta == Meta::kE8m0) a[i] = static_cast<uint8_t>(uniform(0, 140));
                if (element == 1 && meta == Meta::kE4m3) a[i] = static_cast<uint8_t>(uniform(0, 254) & ~1);
                if (element == 1 && (meta == Meta::kZero4 || meta == Meta::kInt4Pair)) a[i] &= 15;
                if (element == 2) std::memcpy(&a[i], &h, 2);
                if (element == 4) std::memcpy(&a[i], &f, 4);
            }
            return a;
        };
        const int scale = !w.dense() ? static_cast<int>(size.scales / (static_cast<size_t>(n) * w.groups())) : 1;
        const auto scales = beside(size.scales, scale), times = beside(size.times, meta == Meta::kE4m3 ? 4 : 2);
        const auto offsets = beside(size.offsets, meta == Meta::kZero4 ? 1 : scale),
                   offset_times = beside(size.offset_times, 2);
        packed = std::make_unique<Aligned<uint8_t>>(w.bytes());
        pack_linear(w, {codes.data(), scales.data(), offsets.data(), times.data(), offset_times.data()}, packed->data(),
                    2);
        w.data = packed->data();
        for (int i = 0; i < n; i++) bias.push_back(normal());
        w.bias = bias.data();
    }
};

struct Input {
    Activations a;
    Aligned<float> f, scale, gsum;
    Aligned<int32_t> nsum;
    Aligned<uint8_t> q;

    Input(int rows, int k, int bits, int group)
        : f(static_cast<size_t>(rows) * k),
          scale(round_up(rows, 8) * k / 32),
          gsum(group ? round_up(rows, 8) * k / group : 1),
          nsum(round_up(rows, 8) * k / 32),
          q(round_up(rows, 8) * k * (bits / 8)) {
        a.k = k, a.bits = bits ? bits : 8, a.group = group ? group : 32;
        a.f = f.data(), a.scale = scale.data(), a.gsum = gsum.data(), a.nsum = nsum.data();
        a.q = bits ? q.data() : nullptr;
    }
};

// What the manual says of tiles, in numbers worked out by hand.
void test_tiles() {
    TileConfig c;
    c.set(0, 2, 8), c.set(1, 2, 8), c.set(2, 2, 8), c.set(3, 16, 64);
    PlainTiles::configure(c);
    uint8_t memory[2][64], out[16][64];
    std::memset(memory, 7, sizeof memory), std::memset(out, 1, sizeof out);
    PlainTiles::load<3>(out, 64);
    PlainTiles::store<3>(memory, 0);  // sixteen rows over each other
    expect(memory[0][63] == 1 && memory[1][0] == 7, "a tile is stored at its stride");
    const int8_t a[2][8] = {{1, 2, 3, 4, -1, -2, -3, -4}, {-128, -128, -128, -128, 0, 0, 0, 1}};
    const int8_t b[2][8] = {{1, 1, 1, 1, -128, -128, -128, -128}, {2, 2, 2, 2, 5, 6, 7, 8}};
    int32_t sums[2][2] = {{100, 0}, {0, 2147483647}};
    PlainTiles::load<0>(sums, 8), PlainTiles::load<1>(a, 8), PlainTiles::load<2>(b, 8);
    PlainTiles::dot<0, 1, 2>();
    PlainTiles::store<0>(sums, 8);
    // 2147483647 + 4 · 128² + 8 wraps
    expect(sums[0][0] == 100 + 10 - 20 && sums[0][1] == -1280 - 70 && sums[1][0] == -512 + 2 &&
               sums[1][1] == -2147483647 - 1 + 65536 + 7,
           "products of tiles");
    PlainTiles::zero<0>();
    PlainTiles::store<0>(sums, 8);
    expect(!sums[0][0] && !sums[1][1], "a zeroed tile");
    PlainTiles::load<1>(a, 8);
    PlainTiles::configure(c);  // forgets what tiles held
    PlainTiles::store<1>(sums, 8);
    expect(!sums[0][0] && !sums[1][1], "a configured tile");
    PlainTiles::release();
}

std::vector<float> random_rows(int rows, int k) {
    std::vector<float> x(static_cast<size_t>(rows) * k);
    for (auto& v : x) v = normal() * (uniform(0, 40) == 0 ? 30.0f : 1.0f);
    return x;
}

std::vector<float> run_linear(const KernelTable& t, const Weights& w, const std::vector<float>& x, int rows, int bits) {
    Input in(rows, w.w.k, w.w.quantized() ? bits : 0, w.w.group);
    t.quantize({x.data(), nullptr, nullptr, in.a, 0, rows});
    Aligned<float> y(static_cast<size_t>(rows) * w.w.n);
    const int cut = uniform(0, w.w.tiles());
    t.linear({&w.w, &in.a, rows, y.data(), static_cast<size_t>(w.w.n), nullptr, 0, 0, cut});
    t.linear({&w.w, &in.a, rows, y.data(), static_cast<size_t>(w.w.n), nullptr, 0, cut, w.w.tiles()});
    return y.copy();
}

void test_form(const KernelTable& t, const KernelTable& scalar, WeightKind kind, Meta meta, int n, int k, int group) {
    for (int bits : {8, 16}) {
        Weights w(kind, meta, n, k, group);
        const std::string what = std::string(t.name) + " kind " + std::to_string(int(kind)) + " meta " +
                                 std::to_string(int(meta)) + " k " + std::to_string(k) + " group " +
                                 std::to_string(group) + " bits " + std::to_string(bits);
        const int few = uniform(2, 7);
        for (int rows : {1, few, 8, 9, uniform(17, 33)}) {
            const auto x = random_rows(rows, k);
            expect(same(run_linear(t, w, x, rows, bits), run_linear(scalar, w, x, rows, bits)),
                   what + " linear of rows " + std::to_string(rows));
        }
        std::vector<int32_t> ids = {0, n - 1, n / 2};
        Aligned<float> a(3 * static_cast<size_t>(k)), b(3 * static_cast<size_t>(k));
        t.embed({&w.w, ids.data(), a.data(), 1.7f, 0, 3});
        scalar.embed({&w.w, ids.data(), b.data(), 1.7f, 0, 3});
        expect(same(a.copy(), b.copy()), what + " embed");
    }
}

// Codes and what stands beside them share no code, so each is tried with a few of the others.
void test_linear(const KernelTable& t, const KernelTable& scalar) {
    const int shapes[][3] = {{16, 64, 32}, {17, 128, 64}, {40, 256, 128}, {1, 96, 96}, {35, 576, 576}, {18, 288, 16}};
    const int supers[][3] = {{17, 512, 32}, {18, 256, 16}, {3, 512, 64}, {16, 256, 256}};
    for (WeightKind kind : {WeightKind::kF32, WeightKind::kF16, WeightKind::kBF16})
        for (const auto& s : shapes) test_form(t, scalar, kind, Meta::kNone, s[0], s[1] - 3, 0);
    int turn = 0;
    for (int kind = 0; kind < kPackedKinds; kind++)
        for (int meta = 0; meta < kMetas; meta++) {
            const WeightKind c = static_cast<WeightKind>(kind);
            const Meta m = static_cast<Meta>(meta);
            const bool table = c == WeightKind::kIq4Nl || c == WeightKind::kE2m1 || has_float_codes(c);
            if (is_dense(c) || m == Meta::kNone || (table && (has_offsets(m) || m == Meta::kZero4))) continue;
            if ((kind + meta) % 3) continue;
            for (int i = 0; i < 2; i++, turn++) {  // all shapes have their turn
                const auto& s = has_supers(m) ? supers[turn % 4] : shapes[turn % 6];
                if (s[2] < kActGroup && (has_signed_bytes(c) || has_float_codes(c))) continue;
                test_form(t, scalar, c, m, s[0], s[1], s[2]);
            }
        }
}

void test_rows(const KernelTable& t, const KernelTable& scalar) {
    for (int k : {1, 16, 31, 96, 320}) {
        const int rows = 9, bits = k % 32 ? 0 : 8, group = k % 32 ? 0 : 32;
        const auto x = random_rows(rows, 2 * k), weight = random_rows(1, k);
        Input a(rows, k, bits, group), b(rows, k, bits, group), c(rows, k, bits * 2, group),
            d(rows, k, bits * 2, group);
        for (const float* add : {static_cast<const float*>(nullptr), x.data() + k}) {
            t.rms_norm({x.data(), nullptr, weight.data(), 1e-5f, a.a, add, 0, rows});
            scalar.rms_norm({x.data(), nullptr, weight.data(), 1e-5f, b.a, add, 0, rows});
            expect(same(a.f.copy(), b.f.copy()), std::string(t.name) + " rms_norm added");
        }
        const std::string what = std::string(t.name) + " k " + std::to_string(k);
        expect(same(a.f.copy(), b.f.copy()) && same(a.q.copy(), b.q.copy()) && same(a.gsum.copy(), b.gsum.copy()) &&
                   same(a.scale.copy(), b.scale.copy()) && same(a.nsum.copy(), b.nsum.copy()),
               what + " rms_norm");
        for (GateKind gate : {GateKind::kSilu, GateKind::kGelu, GateKind::kClamped}) {
            const GateFunction f{gate, 0.5f, 1.702f};
            t.gate_mul({x.data(), x.data() + k, static_cast<size_t>(2 * k), c.a, f, 0, rows, 0, k});
            scalar.gate_mul({x.data(), x.data() + k, static_cast<size_t>(2 * k), d.a, f, 0, rows, 0, k});
            expect(same(c.f.copy(), d.f.copy()) && same(c.q.copy(), d.q.copy()),
                   what + " gate " + std::to_string(static_cast<int>(gate)));
        }
        for (int each : {1, k}) {
            auto gated = x, expected = x;
            t.sigmoid_mul({gated.data(), x.data() + k * rows, k / each, each, 0, rows});
            scalar.sigmoid_mul({expected.data(), x.data() + k * rows, k / each, each, 0, rows});
            expect(same(gated, expected), what + " sigmoid_mul");
        }
        auto heads = x, expected = x;
        t.norm_heads(
            {heads.data(), static_cast<size_t>(2 * k), k, k, k, k, weight.data(), weight.data(), 1e-5f, 0, rows});
        scalar.norm_heads(
            {expected.data(), static_cast<size_t>(2 * k), k, k, k, k, weight.data(), weight.data(), 1e-5f, 0, rows});
        expect(same(heads, expected), what + " norm_heads");
        const ArgmaxResult p = t.argmax(x.data(), k), q = scalar.argmax(x.data(), k);
        expect(p.index == q.index && p.value == q.value, what + " argmax");
    }
}

// Attention of the last `rows` rows, and behind it what they attended to.
std::vector<float> run_attention(const KernelTable& t, int heads, int kv, int dim, int length, int rows, bool split,
                                 int bits, std::vector<float> qkv) {
    const int n_blocks = (length + rows + kBlockSlots - 1) / kBlockSlots, layers = 2;
    KvPool pool;
    pool.n_blocks = n_blocks, pool.n_layers = layers, pool.n_kv = kv, pool.head_dim = dim;
    pool.bits = bits;
    Aligned<uint8_t> memory(pool.block_bytes() * n_blocks);
    std::memset(memory.data(), 0xff, pool.block_bytes() * n_blocks);  // NaN wherever nothing was written
    pool.base = memory.data();
    std::vector<int32_t> blocks;
    for (int i = 0; i < n_blocks; i++) blocks.push_back(n_blocks - 1 - i);
    const int half = dim / 2, total = length + rows;
    std::vector<double> freq;
    for (int i = 0; i < half; i++) freq.push_back(std::pow(10000.0, -2.0 * i / dim));
    Aligned<float> table(static_cast<size_t>(total) * 2 * half);
    std::vector<long long> positions;
    for (int i = 0; i < total; i++) positions.push_back(i);
    t.rope_table({freq.data(), half, 1.2, positions.data(), table.data(), 0, total});
    AttentionLayer at{heads, kv, dim, 0, 1, -1, 0.3f, bits == 8 ? length / 2 : 0, length == 5 ? 4.0f : 0.0f};
    std::vector<float> sinks;
    for (int h = 0; h < heads; h++) sinks.push_back(0.5f * h - 1.0f);
    if (length == 250) at.sinks = sinks.data(), at.slope = 0.1, at.original = 64;
    // The last `rows` rows are the step's; the ones before only fill the cache.
    t.rope_kv({at, qkv.data(), table.data(), half, &pool, blocks.data(), 0, 0, total, {}, positions.data()});
    const int parts = (total + kPartSlots - 1) / kPartSlots;
    Aligned<float> out(static_cast<size_t>(rows) * heads * dim), scratch(attention_scratch(at));
    Aligned<float> partial(split ? static_cast<size_t>(rows) * heads * parts * (pool.padded_dim() + 16) : 1);
    AttentionArgs a{};
    a.at = at, a.q = qkv.data() + static_cast<size_t>(length) * at.cols(), a.kv = &pool, a.blocks = blocks.data();
    a.length = length, a.n_parts = parts, a.n_states = parts, a.out = out.data(), a.scratch = scratch.data();
    a.partial = split ? partial.data() : nullptr;
    const size_t pairs = static_cast<size_t>(rows) * heads;
    Aligned<float> weights(pairs * parts * kPartSlots), peaks(pairs * parts), totals(pairs * 2);
    const ScoreScratch score{weights.data(), peaks.data(), totals.data(), static_cast<size_t>(parts) * kPartSlots, 0};
    a.score = score;
    for (int h = 0; h < kv; h++) {
        a.kv_head = h;
        if (split) {
            a.r0 = 0, a.r1 = rows;
            for (a.p0 = 0; a.p0 < parts; a.p0++) a.p1 = a.p0 + 1, t.attention(a);
        } else {
            a.p0 = 0, a.p1 = parts;
            for (a.r0 = 0; a.r0 < rows; a.r0 += kAttentionRows)
                a.r1 = std::min(rows, a.r0 + kAttentionRows), t.attention(a);
        }
    }
    a.r0 = 0, a.r1 = rows;
    for (a.kv_head = 0; split && a.kv_head < kv; a.kv_head++) t.attention_merge(a);
    Aligned<float> scores(static_cast<size_t>(kv) * (rows + 1) * total);
    for (int h = 0; h < kv; h++)
        for (bool sum : {false, true})
            t.attention_score({at, score, h, parts, parts, rows, length,
                               scores.data() + (static_cast<size_t>(h) * (rows + 1) + (sum ? rows : 0)) * total,
                               sum ? 0 : static_cast<size_t>(total)});
    std::vector<int32_t> delta(total);
    for (int i = 0; i < total; i++) delta[i] = 3 * i - total;
    t.turn_keys({&pool, {}, blocks.data(), freq.data(), half, 1, 0, total, delta.data()});
    Aligned<float> weights_of(total), spread(total);
    for (int i = 0; i < total; i++) weights_of.data()[i] = i % 3 * 0.5f;
    t.value_spread({&pool, {}, blocks.data(), 1, 0, total, weights_of.data(), spread.data()});
    std::vector<float> result = out.copy();
    for (float s : spread.copy()) result.push_back(s);
    for (float s : scores.copy()) result.push_back(s);
    const uint8_t* turned = pool.keys(blocks[0], 1, 0);
    for (int i = 0; i < dim * kBlockSlots; i++)
        if (i % kBlockSlots < total) result.push_back(turned[i]);
    return result;
}

void test_attention(const KernelTable& t, const KernelTable& scalar) {
    const int shapes[][3] = {{9, 3, 64}, {2, 2, 128}, {8, 1, 24}, {3, 1, 10}};
    for (const auto& s : shapes)
        for (int length : {0, 5, 250, 600}) {
            const int rows = uniform(1, 13);
            const auto qkv = random_rows(length + rows, (s[0] + 2 * s[1]) * s[2]);
            for (int bits : {16, 8}) {
                const auto expected = run_attention(scalar, s[0], s[1], s[2], length, rows, false, bits, qkv);
                const std::string what = std::string(t.name) + " attention dim " + std::to_string(s[2]) + " length " +
                                         std::to_string(length) + " bits " + std::to_string(bits);
                for (float v : expected) expect(std::isfinite(v), what + " finite");
                expect(same(run_attention(t, s[0], s[1], s[2], length, rows, false, bits, qkv), expected), what);
                expect(same(run_attention(t, s[0], s[1], s[2], length, rows, true, bits, qkv), expected),
                       what + " split");
            }
        }
}

// Programs on more threads than there are cores, called from several threads; many come and go.
void test_threads() {
    Weights big(WeightKind::kW4, Meta::kZero4, 700, 96, 32), head(WeightKind::kW8, Meta::kSym, 900, 96, 32);
    const auto x = random_rows(8, 96);
    std::vector<int32_t> expected;
    for (int threads : {1, 2, 4}) {
        for (int round = 0; round < 6; round++) {
            Program p(supported_isas().front(), threads, 8);
            float* in = p.floats(96);
            std::memcpy(in, x.data(), x.size() * sizeof(float));
            Activations* q = p.activations(96, false, 8, 32);
            p.quantize(in, nullptr, q, false);
            float* y = p.floats(700);
            p.linear({{&big.w, q, 0}}, y, 700, nullptr);
            p.lm_head(&head.w, q);
            auto call = [&] {
                for (int i = 0; i < 40; i++) {
                    std::vector<int32_t> ids(8), zero(8), best(8);
                    StepState s;
                    s.add(zero.data(), 8, 0, 0), s.greedy = best.data();
                    p.run(s);
                    if (expected.empty()) expected = best;
                    expect(best == expected, "greedy ids on " + std::to_string(threads) + " threads");
                }
            };
            if (expected.empty()) call();
            std::vector<std::thread> callers;
            for (int c = 0; c < 3; c++) callers.emplace_back(call);
            for (auto& c : callers) c.join();
        }
    }
}

// Spans of different sequences, some of them scored, in one step or in a step each: outputs of two attention layers,
// the second of which has a window and a memory of its own, and scores.
std::vector<float> run_spans(const std::vector<float>& qkv, const std::vector<std::pair<int, int>>& spans, int threads,
                             bool together) {
    const AttentionLayer layers[] = {{6, 2, 24, 0, 0, -1, 0.2f, 0, 0.0f}, {6, 2, 24, 1, 0, -1, 0.2f, 40, 3.0f}};
    const int cols = layers[0].cols(), heads = 6 * 24, blocks_each = 70;
    const int n_blocks = blocks_each * static_cast<int>(spans.size());
    int rows = 0;
    for (auto [length, n] : spans) rows += n;
    Program p(supported_isas().front(), threads, rows);
    float* table = p.rope_table({1.0, 0.1, 0.01}, 1.0);
    float *in = p.floats(cols), *out[2];
    std::vector<std::unique_ptr<Aligned<uint8_t>>> memory;
    for (const AttentionLayer& at : layers) {
        out[at.memory] = p.floats(heads);
        KvPool pool;
        pool.n_blocks = n_blocks, pool.n_layers = 1, pool.n_kv = 2, pool.head_dim = 24;
        memory.push_back(std::make_unique<Aligned<uint8_t>>(pool.block_bytes() * n_blocks));
        pool.base = memory.back()->data();
        p.set_kv(at.memory, pool);
    }
    float* copy = p.floats(cols);  // rope_kv turns the queries in place
    p.rope_kv(layers[0], in, table, 3), p.attention(layers[0], in, out[0]);
    p.rope_kv(layers[1], copy, table, 3), p.attention(layers[1], copy, out[1]);
    std::vector<int32_t> zero(rows), blocks(n_blocks);
    for (int i = 0; i < n_blocks; i++) blocks[i] = i * 11 % n_blocks;  // the spans' blocks lie among each other's
    std::vector<int32_t> behind = blocks;
    std::vector<std::vector<float>> scores;
    for (auto [length, n] : spans) scores.emplace_back(2 * (length + n));
    std::vector<float> result(static_cast<size_t>(rows) * heads * 2);
    StepState step(2);
    int first = 0;
    auto run = [&] {
        for (float* to : {in, copy})
            std::memcpy(to, qkv.data() + static_cast<size_t>(first) * cols, sizeof(float) * step.rows * cols);
        p.run(step);
        for (int o = 0; o < 2; o++)
            std::memcpy(result.data() + (static_cast<size_t>(o) * rows + first) * heads, out[o],
                        sizeof(float) * step.rows * heads);
        first += step.rows;
        step.clear(2);
    };
    for (size_t i = 0; i < spans.size(); i++) {
        const auto [length, n] = spans[i];
        for (int b = 0; b < (length + 1 - 40) / kBlockSlots; b++) behind[i * blocks_each + b] = -1;  // never read
        step.add(zero.data(), n, length, n);
        SpanSlots* slots = &step.slots_of(step.spans.size() - 1, 0);
        slots[0].blocks = blocks.data() + i * blocks_each, slots[0].length = length;
        slots[1].blocks = behind.data() + i * blocks_each, slots[1].length = length;
        if (i % 2) {
            slots->scores = scores[i].data(), slots->score_slots = length + n, slots->sum_scores = true;
            slots->scored_rows = std::min(n, 2);
        }
        if (!together) run();
    }
    if (together) run();
    for (const auto& s : scores) result.insert(result.end(), s.begin(), s.end());
    return result;
}

void test_spans() {
    const std::vector<std::pair<int, int>> spans = {{0, 1}, {700, 1}, {5, 40}, {300, 3}, {900, 1}, {520, 20}, {31, 1}};
    int rows = 0;
    for (auto [length, n] : spans) rows += n;
    const auto qkv = random_rows(rows, (6 + 4) * 24);
    const auto apart = run_spans(qkv, spans, 1, false);
    for (float v : apart) expect(std::isfinite(v), "spans finite");
    for (int threads : {1, 3}) {
        expect(same(run_spans(qkv, spans, threads, true), apart), "spans together");
        expect(same(run_spans(qkv, spans, threads, false), apart), "spans apart");
    }
}

// Experts' outputs for rows with random scores; what is read and in which order differs from expert to expert.
std::vector<float> run_experts(std::vector<std::unique_ptr<Weights>>& w, const std::vector<float>& x,
                               const std::vector<float>& scores, const std::vector<int32_t>& perm, int rows,
                               int threads) {
    const int experts = static_cast<int>(w.size()) / 3, k = 96, f = 64;
    Program p(supported_isas().front(), threads, rows);
    float *in = p.floats(k), *s = p.floats(experts), *y = p.floats(k);
    Routing* r = p.routing(experts, 3);
    const int slots = static_cast<int>(r->row_of.size());
    Activations *plain = p.activations(k, false, 16, 32, slots), *turned = p.activations(k, false, 16, 32, slots);
    Activations* mid = p.activations(f, true, 16, 32, slots);
    float *gate_up = p.floats(2 * f, slots), *down = p.floats(k, slots);
    std::vector<std::vector<ExpertInput>> inputs;
    std::vector<std::vector<LinearPart>> first, second;
    for (int e = 0; e < experts; e++) {
        Activations* own = e % 2 ? turned : plain;
        inputs.push_back({{own, e % 2 ? perm.data() : nullptr}});
        first.push_back({{&w[3 * e]->w, own, 0}, {&w[3 * e + 1]->w, own, f}});
        second.push_back({{&w[3 * e + 2]->w, mid, 0}});
    }
    p.route(s, r, {true});
    p.expert_input(r, in, true, inputs);
    p.expert_linear(r, first, gate_up, 2 * f);
    p.gate_mul(gate_up, mid, {}, r);
    p.expert_linear(r, second, down, k);
    p.expert_sum(r, down, y, k, true);
    std::vector<int32_t> zero(rows);
    for (int round = 0; round < 3; round++) {
        std::memcpy(in, x.data(), rows * k * sizeof(float));
        std::memcpy(s, scores.data(), rows * experts * sizeof(float));
        std::memset(y, 0, rows * k * sizeof(float));
        StepState step;
        step.add(zero.data(), rows, 0, rows);
        p.run(step);
    }
    return {y, y + rows * k};
}

void test_experts() {
    const int experts = 9, rows = 37;
    std::vector<std::unique_ptr<Weights>> w;
    const WeightKind kinds[] = {WeightKind::kW8, WeightKind::kW4, WeightKind::kW5};
    for (int e = 0; e < experts; e++)
        for (auto [n, k] : {std::pair(64, 96), std::pair(64, 96), std::pair(96, 64)})
            w.push_back(std::make_unique<Weights>(kinds[e % 3], Meta::kSym, n, k, 32));
    const auto x = random_rows(rows, 96), scores = random_rows(rows, experts);
    std::vector<int32_t> perm(96);
    for (int i = 0; i < 96; i++) perm[i] = i * 5 % 96;
    const auto whole = run_experts(w, x, scores, perm, rows, 1);
    for (float v : whole) expect(std::isfinite(v), "experts finite");
    for (int threads : {2, 4})
        expect(same(run_experts(w, x, scores, perm, rows, threads), whole), "experts on threads");
    const auto one = run_experts(w, x, scores, perm, 1, 2);
    expect(same(one, std::vector<float>(whole.begin(), whole.begin() + 96)), "experts of one row");
}

}  // namespace

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "kernels";
    if (what == "threads") {
        test_threads();
        test_experts();
        test_spans();
    } else if (what == "isas") {
        for (IsaKind isa : supported_isas()) std::printf("%s\n", isa_name(isa));
    } else {
        const KernelTable& scalar = kernels_for(IsaKind::kScalar);
        test_experts();
        test_spans();
        test_tiles();
        std::vector<IsaKind> isas = supported_isas();
        for (IsaKind isa : isas)
            if (isa == IsaKind::kAvx512Vnni) {
                isas.push_back(IsaKind::kAmxEmulated);
                break;
            }
        for (IsaKind isa : isas) {
            const KernelTable& t = kernels_for(isa);
            std::printf("%s\n", t.name);
            test_linear(t, scalar);
            test_rows(t, scalar);
            test_attention(t, scalar);
        }
    }
    std::printf("%s\n", failures ? "failed" : "passed");
    return failures ? 1 : 0;
}
