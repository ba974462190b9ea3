// Causal attention over the paged cache, on tensor cores: o = softmax(cap(scale · q kᵀ)) v for each query head. A row
// is at the slot of its place and sees its sequence's slots up to there, or the last `window` of them.
//   to     halves [rows, ld]: heads side by side, HEAD padding left out, zero from the last head to ld
//   moves  each key and value once for 16 queries of a sequence (rows × query heads of its KV head), with halves 4 ·
//   head bytes a slot
//
// Slots are taken in stretches of 64, each from nothing; stretches are merged in their order, one after the other. A
// few rows spread the stretches over the GPU (attend_stretches, merge_stretches), many rows walk them (attend_rows):
// same stretches, same order, same roundings, so a row's result depends neither on that nor on its company. Nothing
// goes through shared memory on its way to the tensor cores: the cache lies as they read it.
#include "cache.cuh"

constexpr int STRETCH = 64;
constexpr int QUERIES = 16;  // of a warp
constexpr int COLUMNS = HEAD / 8;
constexpr int ROW_WARPS = HEAD <= 128 ? 4 : 2;  // of attend_rows: their totals share 48 kB
constexpr bool KEEP = HEAD <= 128;              // queries in registers

// Sixteen queries of a sequence and a KV head, or what is left of them. g = lane / 4 has queries g and g + 8.
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

DEVICE Tile tile_of(const Attention& a, const Sequence& of, int query, int head) {
    Tile tile;
    int group = a.heads / a.kv_heads, queries = of.rows * group;
    for (int i = 0; i < 2; ++i) {
        int index = query + lane_id() / 4 + 8 * i, row = index / group;
        bool there = index < queries;
        const u16* p = a.q + (static_cast<size_t>(of.row + row) * a.heads + head * group + index % group) * HEAD;
        (i ? tile.b : tile.a) = there ? p : nullptr;
        tile.last[i] = there ? of.length + row : -1;
        tile.first[i] = there ? first_slot(of.length + row, a.window) : 0;
    }
    int last = query + QUERIES < queries ? query + QUERIES - 1 : queries - 1;
    tile.begin = first_slot(of.length + query / group, a.window);
    tile.end = of.length + last / group + 1;
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
DEVICE void score(float (&s)[2][4], const Tile& tile, u8* unit, int begin, const Attention& a) {
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        uint4 p = KEEP ? tile.kept_a[KEEP ? part : 0] : load_query(tile.a, part);
        uint4 q = KEEP ? tile.kept_b[KEEP ? part : 0] : load_query(tile.b, part);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            uint4 k = load_key_part(unit, g / 2 * 4 + g % 2 + 2 * j, part);
            mma(s[j], p.x, q.x, p.y, q.y, k.x, k.y);
            mma(s[j], p.z, q.z, p.w, q.w, k.z, k.w);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int slot = begin + 4 * t + 2 * j + i % 2;
            float x = s[j][i] * a.scale;
            if (a.cap != 0) x = a.cap * tanhf(x / a.cap);
            s[j][i] = slot < tile.first[i / 2] || slot > tile.last[i / 2] ? -INFINITY : x;
        }
}

// What a stretch (or several) came to, for the lane's two queries: the largest score, the sum of exponentials relative
// to it, and the sum of values weighted by them: o[c] has channels 8c + 2t and the next, of query g, then of g + 8.
struct State {
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, o[COLUMNS][4] = {};
};

// AHEAD: values are on their way while scores become probabilities: for few rows, where no other warp has something to
// do meanwhile, and registers suffice.
template <bool AHEAD>
DEVICE void attend_stretch(State& state, const Attention& a, const Tile& tile, const Cache& cache, int head,
                           int stretch) {
    int g = lane_id() / 4;
    for (int begin = stretch * STRETCH; begin < (stretch + 1) * STRETCH; begin += SLOTS) {
        if (begin + SLOTS <= tile.begin || begin >= tile.end) continue;  // nobody sees it; there may be no such block
        u8* unit = cache.unit(begin, head);
        RawValue values[AHEAD ? COLUMNS : 1];
        if constexpr (AHEAD)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) values[c] = read_value(unit, 8 * c + g);
        float s[2][4];
        score(s, tile, unit, begin, a);
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
            uint2 v = AHEAD ? value_part(values[AHEAD ? c : 0], unit, 8 * c + g) : load_value_part(unit, 8 * c + g);
            mma(state.o[c], p[0], p[1], p[2], p[3], v.x, v.y);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        state.l[r] += shuffle_xor(state.l[r], 1);
        state.l[r] += shuffle_xor(state.l[r], 2);
    }
}

// A total and the next stretch: what both are multiplied by.
struct Factors {
    float total, stretch;
};

DEVICE Factors merge(float& total_m, float& total_l, float m, float l) {
    if (m == -INFINITY) return {1, 0};
    float most = fmaxf(total_m, m);
    Factors f{expf(total_m - most), expf(m - most)};
    total_m = most;
    total_l = total_l * f.total + l * f.stretch;
    return f;
}

// A head's sink behind everything that a row sees: what its total is multiplied by.
DEVICE float add_sink(const Attention& a, int head, float& m, float& l) {
    return a.sinks ? merge(m, l, a.sinks[head], 1).total : 1;
}

// Stretches, from nothing, for rows row … row + rows - 1 of the step. The first of a row's is the one with the first
// slot that it sees: stats: float2 (m, l) [rows, heads, stretches], parts: float [rows, heads, stretches, HEAD].
// grid (⌈stretches / 4⌉, kv_heads, pieces), 128 threads: a warp a stretch.
extern "C" __global__ void __launch_bounds__(128)
    attend_stretches(const Attention a, float2* stats, float* parts, int row, int rows, int stretches) {
    start();
    Piece piece = a.pieces[blockIdx.z];
    int head = blockIdx.y, group = a.heads / a.kv_heads, queries = piece.of.rows * group;
    int last = piece.query + QUERIES < queries ? piece.query + QUERIES - 1 : queries - 1;
    if (piece.of.rows == 0 || piece.of.row + last / group < row || piece.of.row + piece.query / group >= row + rows)
        return;
    Tile tile = tile_of(a, piece.of, piece.query, head);
    int stretch = tile.begin / STRETCH + blockIdx.x * 4 + warp_id();
    if (stretch * STRETCH >= tile.end) return;
    State state;
    attend_stretch<HEAD <= 128>(state, a, tile, a.cache(piece.of.table), head, stretch);
    int t = lane_id() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int index = piece.query + lane_id() / 4 + 8 * r, own = piece.of.row + index / group - row;
        int which = stretch - first_slot(piece.of.length + index / group, a.window) / STRETCH;
        if (index >= queries || own < 0 || own >= rows || which < 0) continue;
        size_t at = (static_cast<size_t>(own) * a.heads + head * group + index % group) * stretches + which;
        if (t == 0) stats[at] = {state.m[r], state.l[r]};
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            *reinterpret_cast<float2*>(parts + at * HEAD + 8 * c + 2 * t) = {state.o[c][2 * r], state.o[c][2 * r + 1]};
    }
}
EXPORT(attend_stretches)
// resources attend_stretches: registers 255, spills 8, stack 8, shared 0
// resources attend_stretches/192: registers 255, spills 8, stack 8, shared 0
// resources attend_stretches/224: registers 255, spills 64, stack 64, shared 0
// resources attend_stretches/256: registers 255, spills 64, stack 64, shared 0

// The stretches of a row, merged; rows from `row` on. grid (rows, heads), HEAD threads.
extern "C" __global__ void __launch_bounds__(HEAD)
    merge_stretches(const Attention a, const float2* stats, const float* parts, u16* to, int row, int stretches) {
    start();
    constexpr int AHEAD = 8;  // stretches loaded at once: merging is a chain, loading need not be
    size_t out = row + blockIdx.x;
    int head = blockIdx.y, own = a.places[out].slot, i = threadIdx.x, size = a.size;
    int count = own / STRETCH - first_slot(own, a.window) / STRETCH + 1;
    size_t at = (static_cast<size_t>(blockIdx.x) * a.heads + head) * stretches;
    float m = -INFINITY, l = 0, o = 0;
    for (int begin = 0; begin < count; begin += AHEAD) {
        float2 stat[AHEAD];
        float part[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            bool there = begin + j < count;
            stat[j] = {-INFINITY, 0};
            if (there) stat[j] = stats[at + begin + j];
            part[j] = there ? parts[(at + begin + j) * HEAD + i] : 0;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            Factors f = merge(m, l, stat[j].x, stat[j].y);
            o = o * f.total + part[j] * f.stretch;
        }
    }
    o *= add_sink(a, head, m, l);
    if (i == 0) a.totals[out * a.heads + head] = {m, l};
    to += out * a.ld;
    if (i < size) to[head * size + i] = to_half(o / l);
    if (head == a.heads - 1)
        for (int j = a.heads * size + i; j < a.ld; j += HEAD) to[j] = 0;
}
EXPORT(merge_stretches)
// resources merge_stretches: registers 96, spills 0, shared 0

// Many rows: a warp walks the stretches of a piece, of pieces piece … piece + pieces - 1.
// grid (⌈pieces / ROW_WARPS⌉, kv_heads).
extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP)
    attend_rows(const Attention a, u16* to, int piece, int pieces) {
    start();
    __shared__ float shared[ROW_WARPS][COLUMNS][4][WARP];
    int head = blockIdx.y, group = a.heads / a.kv_heads, which = blockIdx.x * ROW_WARPS + warp_id();
    int lane = lane_id(), t = lane % 4;
    if (which >= pieces) return;
    Piece own = a.pieces[piece + which];
    if (own.of.rows == 0) return;
    auto& total = shared[warp_id()];
    for (int c = 0; c < COLUMNS; ++c)
        for (int i = 0; i < 4; ++i) total[c][i][lane] = 0;
    Tile tile = tile_of(a, own.of, own.query, head);
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
    for (int stretch = tile.begin / STRETCH; stretch * STRETCH < tile.end; ++stretch) {
        State state;
        attend_stretch<false>(state, a, tile, a.cache(own.of.table), head, stretch);
        Factors f[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) f[r] = merge(m[r], l[r], state.m[r], state.l[r]);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                total[c][i][lane] = total[c][i][lane] * f[i / 2].total + state.o[c][i] * f[i / 2].stretch;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int index = own.query + lane / 4 + 8 * r, row = own.of.row + index / group, of = head * group + index % group;
        if (index >= own.of.rows * group) continue;
        float factor = add_sink(a, of, m[r], l[r]);
        if (t == 0) a.totals[static_cast<size_t>(row) * a.heads + of] = {m[r], l[r]};
        u16* out = to + static_cast<size_t>(row) * a.ld;
        for (int c = 0; c < COLUMNS; ++c)
            for (int i = 0; i < 2; ++i) {
                int channel = 8 * c + 2 * t + i;
                if (channel < a.size) out[of * a.size + channel] = to_half(total[c][2 * r + i][lane] * factor / l[r]);
            }
        if (of == a.heads - 1)
            for (int j = a.heads * a.size + t; j < a.ld; j += 4) out[j] = 0;
    }
}
EXPORT(attend_rows)
// resources attend_rows: registers 255, spills 16, stack 16, shared 32768
// resources attend_rows/96: registers 255, spills 24, stack 24, shared 32768
// resources attend_rows/192: registers 255, spills 144, stack 96, shared 32768
// resources attend_rows/224: registers 255, spills 1024, stack 512, shared 32768
// resources attend_rows/256: registers 255, spills 1024, stack 512, shared 32768

// The probability that each slot got from the last rows of each watched sequence, summed over the query heads of its KV
// head: scores float [planes, layers, kv_heads, slots], a plane for each row, or one for all, to which each is added,
// in their order. For H2O eviction. grid (⌈slots / 16⌉, kv_heads, watches), one warp.
extern "C" __global__ void __launch_bounds__(WARP) score_slots(const Attention a, float* scores, int slots) {
    start();
    __shared__ float shared[QUERIES][SLOTS];
    Watch watch = a.watches[blockIdx.z];
    const Sequence& of = watch.of;
    int head = blockIdx.y, group = a.heads / a.kv_heads, begin = blockIdx.x * SLOTS, lane = lane_id();
    int first = of.rows - watch.watched;
    bool there = begin < of.length + of.rows && begin + SLOTS > first_slot(of.length + first, a.window);
    bool mine = lane < SLOTS && begin + lane < slots;
    size_t plane = static_cast<size_t>(a.layers) * a.kv_heads * slots;
    scores += watch.plane * plane + (static_cast<size_t>(a.layer) * a.kv_heads + head) * slots + begin + lane;
    u8* unit = there ? a.cache(of.table).unit(begin, head) : nullptr;
    float sum = 0, total = mine && !watch.apart ? *scores : 0;
    for (int query = first * group; query < of.rows * group; query += QUERIES) {
        Tile tile = tile_of(a, of, query, head);
        float s[2][4];
        if (there) score(s, tile, unit, begin, a);
        for (int r = 0; r < 2; ++r) {
            int at = lane / 4 + 8 * r, index = query + at;
            float2 whole = {0, 1};
            if (index < of.rows * group)
                whole = a.totals[static_cast<size_t>(of.row + index / group) * a.heads + head * group + index % group];
            for (int j = 0; j < 2; ++j)
                for (int i = 0; i < 2; ++i)
                    shared[at][lane % 4 * 4 + 2 * j + i] = there ? expf(s[j][2 * r + i] - whole.x) / whole.y : 0;
        }
        __syncwarp();
        for (int i = 0; i < QUERIES && query + i < of.rows * group; ++i) {
            if (mine) sum += shared[i][lane];
            if ((query + i) % group < group - 1) continue;
            if (mine && watch.apart) scores[((query + i) / group - first) * plane] = sum;
            total += sum;
            sum = 0;
        }
        __syncwarp();
    }
    if (mine && !watch.apart) *scores = total;
}
EXPORT(score_slots)
// resources score_slots: registers 128, spills 0, shared 1024
// resources score_slots/224: registers 136, spills 0, shared 1024
