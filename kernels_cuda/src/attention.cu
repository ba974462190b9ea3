// Causal attention over the paged cache, on tensor cores: o = softmax(cap(scale · q kᵀ)) v for each query head.
//   q      halves [rows, heads, HEAD], turned; row i is at slot length + i and sees the slots 0 … length + i,
//          or the last `window` of them
//   to     halves [rows, ld]: heads side by side, HEAD padding left out, zero from the last head to ld
//   moves  each key and value once for 16 queries (rows × query heads of its KV head), with halves 4 · head bytes a
//   slot
//
// Slots are taken in spans of 64, each from nothing; spans are merged in their order, one after the other. A few rows
// spread the spans over the GPU (attend_spans, merge_spans), many rows walk them (attend_rows): same spans, same order,
// same roundings, so a row's result depends neither on that nor on its company. Nothing goes through shared memory
// on its way to the tensor cores: the cache lies as they read it.
#include "cache.cuh"

constexpr int SPAN = 64;
constexpr int QUERIES = 16;  // of a warp
constexpr int COLUMNS = HEAD / 8;
constexpr int ROW_WARPS = HEAD <= 128 ? 4 : 2;  // of attend_rows: their totals share 48 kB
constexpr bool KEEP = HEAD <= 128;              // queries in registers

struct Scores {
    float scale, cap;  // cap 0: none
    int window;        // 0: all
};

// Sixteen queries of one KV head: query i of it is row i / group, head i % group of its heads. g = lane / 4 has queries
// g and g + 8.
struct Tile {
    const u16 *a, *b;       // the lane's two queries, or null
    int first[2], last[2];  // slots that they see
    int begin, end;         // slots that any of the tile sees
    uint4 kept_a[KEEP ? PARTS : 1], kept_b[KEEP ? PARTS : 1];
};

DEVICE uint4 load_query(const u16* q, int part) {
    if (!q) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(q + part * 32 + lane_id() % 4 * 8);
}

DEVICE int first_slot(int own, int window) { return window && own >= window ? own - window + 1 : 0; }

// Queries from `query` on, of `queries`.
DEVICE Tile tile_of(const u16* q, int query, int queries, int heads, int kv_heads, int head, int length, int window) {
    Tile tile;
    int group = heads / kv_heads;
    for (int i = 0; i < 2; ++i) {
        int index = query + lane_id() / 4 + 8 * i, row = index / group;
        bool there = index < queries;
        const u16* p = q + (static_cast<size_t>(row) * heads + head * group + index % group) * HEAD;
        (i ? tile.b : tile.a) = there ? p : nullptr;
        tile.last[i] = there ? length + row : -1;
        tile.first[i] = there ? first_slot(length + row, window) : 0;
    }
    int last = query + QUERIES < queries ? query + QUERIES - 1 : queries - 1;
    tile.begin = first_slot(length + query / group, window);
    tile.end = length + last / group + 1;
    if constexpr (KEEP)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            tile.kept_a[part] = load_query(tile.a, part);
            tile.kept_b[part] = load_query(tile.b, part);
        }
    return tile;
}

// The eight channels of a key that a lane multiplies.
DEVICE uint4 load_key_part(u8* unit, int slot, int part) {
    int at = slot * HEAD + part * 32 + lane_id() % 4 * 8;
    if constexpr (KV_BITS == 16) {
        return *reinterpret_cast<const uint4*>(halves(unit) + at);
    } else {
        uint2 codes = *reinterpret_cast<const uint2*>(unit + at);
        u32 scale = key_scales(unit)[slot * PARTS + part] * 0x10001;
        uint2 low = unpack(codes.x, scale, scale), high = unpack(codes.y, scale, scale);
        return {low.x, low.y, high.x, high.y};
    }
}

// Scores of the 16 slots from `begin` on. s[j][i] is query g (i < 2) or g + 8, slot begin + 4t + 2j + i % 2: the order
// in which probabilities are the first operand of the product with values. -∞ where a query does not see the slot.
DEVICE void score(float (&s)[2][4], const Tile& tile, u8* unit, int begin, const Scores& how) {
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        uint4 a = KEEP ? tile.kept_a[KEEP ? part : 0] : load_query(tile.a, part);
        uint4 b = KEEP ? tile.kept_b[KEEP ? part : 0] : load_query(tile.b, part);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            uint4 k = load_key_part(unit, g / 2 * 4 + g % 2 + 2 * j, part);
            mma(s[j], a.x, b.x, a.y, b.y, k.x, k.y);
            mma(s[j], a.z, b.z, a.w, b.w, k.z, k.w);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int slot = begin + 4 * t + 2 * j + i % 2;
            float x = s[j][i] * how.scale;
            if (how.cap != 0) x = how.cap * tanhf(x / how.cap);
            s[j][i] = slot < tile.first[i / 2] || slot > tile.last[i / 2] ? -INFINITY : x;
        }
}

// What a span (or several) came to, for the lane's two queries: the largest score, the sum of exponentials relative to
// it, and the sum of values weighted by them: o[c] has channels 8c + 2t and the next, of query g, then of g + 8.
struct State {
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, o[COLUMNS][4] = {};
};

DEVICE void attend_span(State& state, const Tile& tile, const Cache& cache, int head, int span, const Scores& how) {
    int g = lane_id() / 4;
    for (int begin = span * SPAN; begin < (span + 1) * SPAN; begin += SLOTS) {
        if (begin + SLOTS <= tile.begin || begin >= tile.end) continue;  // nobody sees it; there may be no such block
        u8* unit = cache.unit(begin, head);
        float s[2][4];
        score(s, tile, unit, begin, how);
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float m = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
            m = fmaxf(m, shuffle_xor(m, 1));
            m = fmaxf(m, shuffle_xor(m, 2));
            m = fmaxf(m, state.m[r]);
            float base = m == -INFINITY ? 0 : m;
            factor[r] = expf(state.m[r] - base);
            state.m[r] = m;
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) s[j][2 * r + i] = expf(s[j][2 * r + i] - base);
            state.l[r] = state.l[r] * factor[r] + ((s[0][2 * r] + s[0][2 * r + 1]) + (s[1][2 * r] + s[1][2 * r + 1]));
        }
        u32 p[4];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) p[2 * j + r] = to_halves(s[j][2 * r], s[j][2 * r + 1]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.o[c][i] *= factor[i / 2];
            uint2 v = load_value_part(unit, 8 * c + g);
            mma(state.o[c], p[0], p[1], p[2], p[3], v.x, v.y);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        state.l[r] += shuffle_xor(state.l[r], 1);
        state.l[r] += shuffle_xor(state.l[r], 2);
    }
}

// A total and the next span: what both are multiplied by.
struct Factors {
    float total, span;
};

DEVICE Factors merge(float& total_m, float& total_l, float m, float l) {
    if (m == -INFINITY) return {1, 0};
    float most = fmaxf(total_m, m);
    Factors f{expf(total_m - most), expf(m - most)};
    total_m = most;
    total_l = total_l * f.total + l * f.span;
    return f;
}

// Spans, from nothing. stats: float2 (m, l) [rows, heads, spans], parts: float [rows, heads, spans, HEAD].
// grid (⌈spans / 4⌉, kv_heads, ⌈rows · group / 16⌉), 128 threads: a warp a span.
extern "C" __global__ void __launch_bounds__(128)
    attend_spans(const Step* step, const u16* q, u8* pool, const int* blocks, float2* stats, float* parts, int layer,
                 int layers, int row, int rows, int heads, int kv_heads, int spans, int window, float scale,
                 float cap) {
    start();
    int head = blockIdx.y, group = heads / kv_heads, query = blockIdx.z * QUERIES, span = blockIdx.x * 4 + warp_id();
    q += static_cast<size_t>(row) * heads * HEAD;
    Tile tile = tile_of(q, query, rows * group, heads, kv_heads, head, step->length + row, window);
    if (span * SPAN >= tile.end || (span + 1) * SPAN <= tile.begin) return;
    State state;
    attend_span(state, tile, {pool, blocks, layer, layers, kv_heads}, head, span, {scale, cap, window});
    int t = lane_id() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int index = query + lane_id() / 4 + 8 * r;
        if (index >= rows * group) continue;
        size_t at = (static_cast<size_t>(index / group) * heads + head * group + index % group) * spans + span;
        if (t == 0) stats[at] = {state.m[r], state.l[r]};
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            *reinterpret_cast<float2*>(parts + at * HEAD + 8 * c + 2 * t) = {state.o[c][2 * r], state.o[c][2 * r + 1]};
    }
}
EXPORT(attend_spans)
// resources attend_spans: registers 255, spills 4, stack 8, shared 0
// resources attend_spans/192: registers 255, spills 8, stack 8, shared 0
// resources attend_spans/224: registers 255, spills 64, stack 64, shared 0
// resources attend_spans/256: registers 255, spills 64, stack 64, shared 0

// The spans of a row, merged. totals: float2 (m, l) [rows, heads]. grid (rows, heads), HEAD threads.
extern "C" __global__ void __launch_bounds__(HEAD)
    merge_spans(const Step* step, const float2* stats, const float* parts, float2* totals, u16* to, int row, int heads,
                int spans, int window, int size, int ld) {
    start();
    constexpr int AHEAD = 8;  // spans loaded at once: merging is a chain, loading need not be
    int head = blockIdx.y, own = step->length + row + blockIdx.x, i = threadIdx.x;
    int first = first_slot(own, window) / SPAN, last = own / SPAN;
    size_t at = (static_cast<size_t>(blockIdx.x) * heads + head) * spans;
    float m = -INFINITY, l = 0, o = 0;
    for (int begin = first; begin <= last; begin += AHEAD) {
        float2 stat[AHEAD];
        float part[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            bool there = begin + j <= last;
            stat[j] = {-INFINITY, 0};
            if (there) stat[j] = stats[at + begin + j];
            part[j] = there ? parts[(at + begin + j) * HEAD + i] : 0;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            Factors f = merge(m, l, stat[j].x, stat[j].y);
            o = o * f.total + part[j] * f.span;
        }
    }
    size_t out = row + blockIdx.x;
    if (i == 0) totals[out * heads + head] = {m, l};
    to += out * ld;
    if (i < size) to[head * size + i] = to_half(o / l);
    if (head == heads - 1)
        for (int j = heads * size + i; j < ld; j += HEAD) to[j] = 0;
}
EXPORT(merge_spans)
// resources merge_spans: registers 96, spills 0, shared 0

// Many rows: a warp walks the spans of its 16 queries. grid (⌈rows · group / 16 ROW_WARPS⌉, kv_heads).
extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP)
    attend_rows(const Step* step, const u16* q, u8* pool, const int* blocks, float2* totals, u16* to, int layer,
                int layers, int rows, int heads, int kv_heads, int window, float scale, float cap, int size, int ld) {
    start();
    __shared__ float shared[ROW_WARPS][COLUMNS][4][WARP];
    int head = blockIdx.y, group = heads / kv_heads, query = (blockIdx.x * ROW_WARPS + warp_id()) * QUERIES;
    int lane = lane_id(), t = lane % 4;
    if (query >= rows * group) return;
    auto& total = shared[warp_id()];
    for (int c = 0; c < COLUMNS; ++c)
        for (int i = 0; i < 4; ++i) total[c][i][lane] = 0;
    Tile tile = tile_of(q, query, rows * group, heads, kv_heads, head, step->length, window);
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
    for (int span = tile.begin / SPAN; span * SPAN < tile.end; ++span) {
        State state;
        attend_span(state, tile, {pool, blocks, layer, layers, kv_heads}, head, span, {scale, cap, window});
        Factors f[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) f[r] = merge(m[r], l[r], state.m[r], state.l[r]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                total[c][i][lane] = total[c][i][lane] * f[i / 2].total + state.o[c][i] * f[i / 2].span;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int index = query + lane / 4 + 8 * r, row = index / group, of = head * group + index % group;
        if (index >= rows * group) continue;
        if (t == 0) totals[static_cast<size_t>(row) * heads + of] = {m[r], l[r]};
        u16* out = to + static_cast<size_t>(row) * ld;
        for (int c = 0; c < COLUMNS; ++c)
            for (int i = 0; i < 2; ++i) {
                int channel = 8 * c + 2 * t + i;
                if (channel < size) out[of * size + channel] = to_half(total[c][2 * r + i][lane] / l[r]);
            }
        if (of == heads - 1)
            for (int j = heads * size + t; j < ld; j += 4) out[j] = 0;
    }
}
EXPORT(attend_rows)
// resources attend_rows: registers 255, spills 16, stack 16, shared 32768
// resources attend_rows/192: registers 255, spills 128, stack 96, shared 32768
// resources attend_rows/224: registers 255, spills 1024, stack 512, shared 32768
// resources attend_rows/256: registers 255, spills 1024, stack 512, shared 32768

// The probability that each slot got from the last `watched` rows, summed over the query heads of its KV head:
// scores float [watched, layers, kv_heads, slots]; or [1, …], to which that of each row is added, in their order. For
// H2O eviction.
// grid (⌈slots / 16⌉, kv_heads), one warp.
extern "C" __global__ void __launch_bounds__(WARP)
    score_slots(const Step* step, const u16* q, u8* pool, const int* blocks, const float2* totals, float* scores,
                int layer, int layers, int rows, int watched, int apart, int heads, int kv_heads, int slots, int window,
                float scale, float cap) {
    start();
    __shared__ float shared[QUERIES][SLOTS];
    int head = blockIdx.y, group = heads / kv_heads, begin = blockIdx.x * SLOTS, lane = lane_id();
    Cache cache{pool, blocks, layer, layers, kv_heads};
    bool there = begin < step->length + rows;
    bool mine = lane < SLOTS && begin + lane < slots;
    auto place = [&](int row) {
        return scores + ((static_cast<size_t>(row) * layers + layer) * kv_heads + head) * slots + begin + lane;
    };
    float sum = 0, total = mine && !apart ? *place(0) : 0;
    for (int query = (rows - watched) * group; query < rows * group; query += QUERIES) {
        Tile tile = tile_of(q, query, rows * group, heads, kv_heads, head, step->length, window);
        float s[2][4];
        if (there) score(s, tile, cache.unit(begin, head), begin, {scale, cap, window});
        for (int r = 0; r < 2; ++r) {
            int at = lane / 4 + 8 * r, index = query + at;
            float2 whole = {0, 1};
            if (index < rows * group)
                whole = totals[static_cast<size_t>(index / group) * heads + head * group + index % group];
            for (int j = 0; j < 2; ++j)
                for (int i = 0; i < 2; ++i)
                    shared[at][lane % 4 * 4 + 2 * j + i] = there ? expf(s[j][2 * r + i] - whole.x) / whole.y : 0;
        }
        __syncwarp();
        for (int i = 0; i < QUERIES && query + i < rows * group; ++i) {
            if (mine) sum += shared[i][lane];
            if ((query + i) % group < group - 1) continue;
            if (mine && apart) *place((query + i) / group - (rows - watched)) = sum;
            total += sum;
            sum = 0;
        }
        __syncwarp();
    }
    if (mine && !apart) *place(0) = total;
}
EXPORT(score_slots)
// resources score_slots: registers 128, spills 0, shared 1024
