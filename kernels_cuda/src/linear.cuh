// y[m, n] = Σ_k w[n, k] · x[m, k] + bias[n], for weights that are read once and few rows of x.
//   w      one form of layout.cuh; codes go to the tensor cores as exact halves (q − zero, or q), so the only
//          roundings are those of fp32 sums (and what NF4 and floats of 32 bits lose behind 21 bits); scales are
//          applied in fp32 to sums of 16, 32 or 64 inputs
//   x      halves [rows, ldx], zero from k to the next multiple of 64
//   y      float [rows, ldy]: written, or added to (ADD); then logits: · scale, and cap · tanh(y / cap) if cap
//   moves  N·K·BITS/8 bytes and what stands beside, once for up to 64 rows (WIDE) or 8, 16
//
// Row independence: warp i of a block's eight always takes stages i, i + 8, …; their sums are added in that order; an
// output meets the same roundings whatever tile, row or variant it is in. So any number of rows gives the same bits.
//
// A lane fetches with cp.async just what it alone will read: no barrier in the loop, and DEPTH stages a warp under way
// (256 threads, 4 stages of 512 bytes, 4 blocks: 64 kB in flight an SM). What stands beside codes is the same for four
// lanes, and each has its own copy of it.
#pragma once

#include "beside.cuh"

constexpr int WARPS = 8;
constexpr int SHARED = 48 << 10;  // what a kernel may have without asking
constexpr u32 ONES = 0x3c003c00;

template <int TILES>
struct Ring {
    static constexpr int SLOT = TILES * (STAGE_BYTES + WARP * BESIDE_BYTES);
    static constexpr int MOST = SHARED / WARPS / SLOT;
    static constexpr int WANTED = STAGE_BYTES < 512 ? 6 : 4;  // small stages need more of them under way
    static constexpr int DEPTH = MOST < WANTED ? MOST : WANTED;
    static constexpr int BYTES = WARPS * DEPTH * SLOT;
    static constexpr int ZEROS = TILES * WARP * SCALES * RECORD;  // where they begin behind the records
};

// A warp's next stage of TILES tiles, of which a second may not be there: then the first is read twice.
template <int TILES>
struct Source {
    const u8 *low, *high;  // codes of the lane
    Places<WARPS> beside;
    size_t tile;  // bytes from one tile's codes to the next one's

    DEVICE_MEMBER Source(const Weights& w, int of, int tiles, int stage)
        : beside(w, of, stage, of + 1 < tiles), tile(of + 1 < tiles ? static_cast<size_t>(w.stages) * STAGE_BYTES : 0) {
        const u8* codes = w.codes + (static_cast<size_t>(of) * w.stages + stage) * STAGE_BYTES;
        low = codes + lane_id() * LOW_COPY;
        high = codes + LOW * WARP + lane_id() * HIGH;
    }

    DEVICE_MEMBER void fetch(u8* slot, u64 policy) {
        u8* to = slot + TILES * STAGE_BYTES;
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            fetch_codes(slot + r * STAGE_BYTES, low + r * tile, high + r * tile, policy);
            fetch_beside(to + r * WARP * RUNS * 4 * WORDS, to + Ring<TILES>::ZEROS + r * WARP * SCALES * 4, beside, r);
        }
        low += WARPS * STAGE_BYTES;
        if constexpr (HIGH > 0) high += WARPS * STAGE_BYTES;
        beside.move();
    }
};

// acc += c scaled, and the inputs' sums times the offsets; c is spent.
DEVICE void apply(float (&acc)[4], float (&c)[4], const float (&sums)[4], const float* scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        acc[i] = fmaf(c[i], scales[i / 2], acc[i]);
        if constexpr (OFFSETS) acc[i] = fmaf(sums[i], scales[2 + i / 2], acc[i]);
        c[i] = 0;
    }
}

// One chunk of weights as the tensor cores take it: pairs of halves of outputs g and g + 8, and what they are off by.
struct Chunk {
    u32 a[PARTS][4], b[PARTS][4];
};

DEVICE void unpack_parts(Chunk& to, const Codes& codes, int chunk, int first, u32 zeros) {
    unpack<0>(codes, chunk, first, QUADS, zeros, to.a[0], to.b[0]);
    if constexpr (PARTS == 2) unpack<1>(codes, chunk, first, QUADS, zeros, to.a[1], to.b[1]);
}

// c += the products of QUADS · 16 inputs, from a quad of a lane's eight on, for 16 outputs and 8 rows.
DEVICE void multiply(float (&c)[4], int first, const u32 (&a)[4], const u32 (&b)[4], const uint4& x) {
    if (first == 0) mma(c, a[0], b[0], a[1], b[1], x.x, x.y);
    if (first + QUADS == 2) mma(c, a[2], b[2], a[3], b[3], x.z, x.w);
}

DEVICE void multiply_parts(float (&c)[4], int first, const Chunk& w, const uint4& x) {
    multiply(c, first, w.a[0], w.b[0], x);
    if constexpr (PARTS == 2) {
        float off[4] = {};
        multiply(off, first, w.a[1], w.b[1], x);
        for (int i = 0; i < 4; ++i) c[i] = fmaf(off[i], OFF_BY, c[i]);
    }
}

// And of the inputs themselves.
DEVICE void add_inputs(float (&sums)[4], int first, const uint4& x) {
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    multiply(sums, first, ones, ones, x);
}

// The lane's eight of a chunk's inputs, from the first of them on; those of the chunk's are `first_input` before it.
DEVICE int first_input() { return lane_id() % 4 * (HALVES ? 4 : 8); }

DEVICE uint4 read_inputs(const u16* from) {
    if (HALVES) {
        uint2 low = *reinterpret_cast<const uint2*>(from);
        uint2 high = *reinterpret_cast<const uint2*>(from + CHUNK / 2);
        return {low.x, low.y, high.x, high.y};
    }
    return *reinterpret_cast<const uint4*>(from);
}

// Which rows a product is of: all, one behind the other.
struct EveryRow {
    DEVICE_MEMBER int of_x(int i) const { return i; }
    DEVICE_MEMBER int of_y(int i) const { return i; }
};

// Or those of a list: rows of y, `share` of which have a row of x in common.
struct ListedRows {
    const int* list;
    int share;
    DEVICE_MEMBER int of_x(int i) const { return list[i] / share; }
    DEVICE_MEMBER int of_y(int i) const { return list[i]; }
};

struct Output {
    float* y;
    int outputs, ldy, add;
    float scale, cap;
};

DEVICE void store(const Output& to, const float* bias, float sum, int n, int row) {
    if (bias) sum += bias[n];
    sum *= to.scale;
    if (to.cap != 0) sum = to.cap * tanhf(sum / to.cap);
    float* out = to.y + static_cast<size_t>(row) * to.ldy + n;
    *out = to.add ? *out + sum : sum;
}

// TILES: of 16 outputs, from the block's y on. COLUMNS: of 8 rows, from `first` to `rows`.
template <int TILES, int COLUMNS, class Rows>
DEVICE void linear(const Weights& w, const Rows& of, const u16* x, const float* bias, const Output& to, int first,
                   int rows, int ldx) {
    using R = Ring<TILES>;
    constexpr int OUT = TILES * TILE;
    constexpr int SUMS = WARPS * 8 * OUT * 4;  // bytes
    __shared__ u8 __align__(16) shared[R::BYTES > SUMS ? R::BYTES : SUMS];
    let_next_start();
    int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
    int tile = blockIdx.y * TILES, tiles = divide_up(to.outputs, TILE);
    u64 policy = evict_first();
    Source<TILES> source(w, tile, tiles, warp);
    constexpr int RING = R::DEPTH * R::SLOT;  // of a warp
    for (int i = 0; i < R::DEPTH - 1; ++i) {
        if (warp + i * WARPS < w.stages) source.fetch(shared + warp * RING + i * R::SLOT, policy);
        copy_commit();
    }
    wait_for_kernels();  // the first stages of weights are on their way by then

    // The lane's row of each column, where its next inputs are. Rows behind the last are copies of it, and not stored.
    constexpr bool AHEAD = COLUMNS <= 2;  // inputs of the next stage are read while this one is multiplied
    u32 from[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        int row = first + 8 * j + g < rows ? first + 8 * j + g : rows - 1;
        from[j] = static_cast<u32>(of.of_x(row)) * ldx + warp * STAGE + first_input();
    }
    uint4 v[AHEAD ? CHUNKS : 1][COLUMNS];
    if (AHEAD && warp < w.stages)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) v[chunk][j] = read_inputs(x + from[j] + chunk * CHUNK);
    float acc[TILES][COLUMNS][4] = {};
    int at = warp * RING, free = at + RING - R::SLOT, end = at + RING;  // slots
    for (int stage = warp; stage < w.stages; stage += WARPS) {
        if (stage + (R::DEPTH - 1) * WARPS < w.stages) source.fetch(shared + free, policy);
        copy_commit();
        copy_wait<R::DEPTH - 1>();
        const u8* slot = shared + at;
        [[maybe_unused]] const u8* beside = slot + TILES * STAGE_BYTES;
        float c[TILES][COLUMNS][4] = {}, sums[COLUMNS][4] = {};
        u32 zeros[TILES] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            auto& inputs = v[AHEAD ? chunk : 0];
            if (!AHEAD)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) inputs[j] = read_inputs(x + from[j] + chunk * CHUNK);
#pragma unroll
            for (int quad = 0; quad < 2; quad += QUADS) {
                if constexpr (OFFSETS)
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) add_inputs(sums[j], quad, inputs[j]);
                bool last = GROUP > 0 || chunk == CHUNKS - 1 || SPLIT;
                int record = record_in(chunk, quad);
#pragma unroll
                for (int r = 0; r < TILES; ++r) {
                    if (KIND == Beside::ZERO && (HALVES || SPLIT || chunk + quad == 0))
                        zeros[r] = beside[R::ZEROS + ((r * SCALES + record) * WARP + lane) * 4 + g % 4];
                    Codes codes;
                    read_codes(slot + r * STAGE_BYTES, codes);
                    Chunk weights;
                    unpack_parts(weights, codes, chunk, quad, zeros[r]);
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) multiply_parts(c[r][j], quad, weights, inputs[j]);
                    if (!last) continue;
                    u32 words[WORDS ? WORDS : 1];
                    float scales[4];
                    read_fetched(beside + r * WARP * RUNS * 4 * WORDS, record, words);
                    scales_of(words, CODED ? warp : stage, scale_of(chunk, quad), scales);
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) apply(acc[r][j], c[r][j], sums[j], scales);
                }
                if (last)
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j)
                        for (int i = 0; i < 4; ++i) sums[j][i] = 0;
            }
            if (AHEAD && stage + WARPS < w.stages)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) inputs[j] = read_inputs(x + from[j] + WARPS * STAGE + chunk * CHUNK);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) from[j] += WARPS * STAGE;
        free = at;
        at = at + R::SLOT == end ? end - RING : at + R::SLOT;
    }

    // The warps' sums, added from the first to the last; 8 rows at a time.
    copy_wait<0>();
    auto* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        if (first + 8 * j >= rows) break;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < TILES; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[(warp * 8 + 2 * t + i % 2) * OUT + r * TILE + g + i / 2 * 8] = acc[r][j][i];
        __syncthreads();
        int n = tile * TILE + threadIdx.x % OUT, row = first + 8 * j + threadIdx.x / OUT;
        if (threadIdx.x >= 8 * OUT || row >= rows || n >= to.outputs) continue;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += sums[(i * 8 + threadIdx.x / OUT) * OUT + threadIdx.x % OUT];
        store(to, bias, sum, n, of.of_y(row));
    }
}
