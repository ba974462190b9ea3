// y[m, n] = Σ_k w[n, k] · x[m, k] + bias[n], for weights that are read once and few rows of x.
//   w      one form of layout.cuh; codes go to the tensor cores as exact halves (q − zero, or q), so the only
//          roundings are those of fp32 sums; scales are applied in fp32 to sums of 32 or 64 inputs
//   x      halves [rows, ldx], zero from k to the next multiple of 64
//   y      float [rows, ldy]: written, or added to (ADD); then logits: · scale, and cap · tanh(y / cap) if cap
//   moves  N·K·BITS/8 bytes and the groups' records, once for up to 64 rows (WIDE) or 8, 16
//
// Row independence: warp i of a block's eight always takes stages i, i + 8, …; their sums are added in that order; an
// output meets the same roundings whatever tile, row or variant it is in. So any number of rows gives the same bits.
//
// A lane fetches with cp.async just what it alone will read: no barrier in the loop, and DEPTH stages a warp under way
// (256 threads, 4 stages of 512 bytes, 4 blocks: 64 kB in flight an SM).
#pragma once

#include "layout.cuh"

constexpr int WARPS = 8;
constexpr int SHARED = 48 << 10;  // what a kernel may have without asking
constexpr int META_BYTES = RECORD + (META == ZERO ? 4 : 0);
constexpr u32 ONES = 0x3c003c00;

// Groups of 32, and others that do not begin at whole stages, have their scales applied after each chunk.
template <int TILES>
struct Ring {
    static constexpr int SLOT = TILES * (STAGE_BYTES + CHUNKS * WARP * META_BYTES);
    static constexpr int MOST = SHARED / WARPS / SLOT;
    static constexpr int DEPTH = MOST < 4 ? MOST : 4;
    static constexpr int BYTES = WARPS * DEPTH * SLOT;
};

struct Weights {
    const u8 *codes, *meta, *zeros;
    int stages, group, groups;
    bool split;  // a stage's chunks are in groups of their own
};

DEVICE bool splits(int group, int groups) { return CHUNKS > 1 && groups > 1 && group % STAGE != 0; }

// Where the records of a tile's group begin that a chunk of a stage is in.
DEVICE size_t record_of(const Weights& w, int tile, int stage, int chunk) {
    int group = (stage * STAGE + chunk * CHUNK) / w.group;
    if (group >= w.groups) group = w.groups - 1;  // zeros behind the last input
    return (static_cast<size_t>(tile) * w.groups + group) * RECORDS;
}

// A stage of TILES tiles into a slot of the ring.
template <int TILES>
DEVICE void fetch(u8* slot, const Weights& w, int tile, int stage, int tiles, u64 policy) {
    int lane = lane_id();
    [[maybe_unused]] u8* meta = slot + TILES * STAGE_BYTES;
    for (int r = 0; r < TILES; ++r) {
        int from = tile + r < tiles ? tile + r : tiles - 1;  // the last block's surplus reads what it will not use
        const u8* codes = w.codes + (static_cast<size_t>(from) * w.stages + stage) * STAGE_BYTES;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            int at = (v * WARP + lane) * 16;
            copy_async_16(slot + r * STAGE_BYTES + at, codes + at, policy);
        }
        if constexpr (META != NONE) {
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                if (c > 0 && !w.split) break;
                size_t at = record_of(w, from, stage, c) + lane / 4;
                u8* to = meta + ((r * CHUNKS + c) * WARP + lane) * RECORD;
                copy_async<RECORD>(to, w.meta + at * RECORD);
                if constexpr (META == ZERO) {
                    u8* zero = meta + TILES * CHUNKS * WARP * RECORD + ((r * CHUNKS + c) * WARP + lane) * 4;
                    copy_async<4>(zero, w.zeros + at / 4 * 4);
                }
            }
        }
    }
}

// Eight codes of a lane to four pairs of halves, exactly.
DEVICE void unpack_4(u32 codes, u32 less, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = subtract_halves((codes >> 4 * i & 0x000f000f) | HALF_1024, less);
}

DEVICE void unpack_8(u32 low, u32 high, u32 (&a)[4]) {
    a[0] = subtract_halves(pick_bytes(low, 0x64646464, 0x4140), HALF_1152);
    a[1] = subtract_halves(pick_bytes(low, 0x64646464, 0x4342), HALF_1152);
    a[2] = subtract_halves(pick_bytes(high, 0x64646464, 0x4140), HALF_1152);
    a[3] = subtract_halves(pick_bytes(high, 0x64646464, 0x4342), HALF_1152);
}

// The lane's part of a stage of w.
DEVICE void read_codes(const u8* stage, uint4 (&v)[VECTORS]) {
    auto* vectors = reinterpret_cast<const uint4*>(stage) + lane_id();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) v[i] = vectors[i * WARP];
}

// Of one chunk: pairs of halves of outputs g and g + 8. part: the halves, or what they are off by.
DEVICE void unpack(const uint4 (&v)[VECTORS], int chunk, int part, u32 zero, u32 (&a)[4], u32 (&b)[4]) {
    if constexpr (BITS == 4) {
        u32 zero_a = HALF_1024, zero_b = HALF_1024;
        if constexpr (META == SYMMETRIC) zero_a = zero_b = HALF_1032;
        if constexpr (META == ZERO) {
            zero_a += (zero & 15) * 0x10001;
            zero_b += (zero >> 4 & 15) * 0x10001;
        }
        unpack_4(chunk ? v[0].z : v[0].x, zero_a, a);
        unpack_4(chunk ? v[0].w : v[0].y, zero_b, b);
    } else if constexpr (BITS == 8) {
        unpack_8(v[0].x, v[0].y, a);
        unpack_8(v[0].z, v[0].w, b);
    } else {
        const uint4 &low = v[2 * part], &high = v[2 * part + 1];
        a[0] = low.x, a[1] = low.y, a[2] = low.z, a[3] = low.w;
        b[0] = high.x, b[1] = high.y, b[2] = high.z, b[3] = high.w;
    }
}

constexpr bool OFFSETS = BITS == 4 && (META == OFFSET || META == FLOAT);  // also of 8 bits: they are zero there

// A record's scales of outputs g and g + 8, and their offsets.
DEVICE void unpack_scales(const u32* record, float (&s)[4]) {
    s[0] = s[1] = 1, s[2] = s[3] = 0;
    if constexpr (META == FLOAT) {
        for (int i = 0; i < 4; ++i) s[i] = float_of(record[i]);
    } else if constexpr (META != NONE) {
        s[0] = low_float(record[0]), s[1] = high_float(record[0]);
        if constexpr (META == OFFSET) s[2] = low_float(record[1]), s[3] = high_float(record[1]);
    }
}

// acc += c scaled, and the inputs' sums times the offsets; c is spent.
DEVICE void apply(float (&acc)[4], float (&c)[4], const float (&sums)[4], const float* scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        acc[i] = fmaf(c[i], scales[i / 2], acc[i]);
        if constexpr (OFFSETS) acc[i] = fmaf(sums[i], scales[2 + i / 2], acc[i]);
        c[i] = 0;
    }
}

// c += the products of 32 inputs, for 16 outputs and 8 rows.
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], const uint4& x) {
    mma(c, a[0], b[0], a[1], b[1], x.x, x.y);
    mma(c, a[2], b[2], a[3], b[3], x.z, x.w);
}

// Which rows a product is of: all, one behind the other.
struct EveryRow {
    static constexpr bool LISTED = false;
    DEVICE_MEMBER int of_x(int i) const { return i; }
    DEVICE_MEMBER int of_y(int i) const { return i; }
};

// Or those of a list: rows of y, `share` of which have a row of x in common.
struct ListedRows {
    static constexpr bool LISTED = true;
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
    u8* ring = shared + warp * R::DEPTH * R::SLOT;
    u64 policy = evict_first();
    float acc[TILES][COLUMNS][4] = {};
    [[maybe_unused]] int listed[COLUMNS];
    if constexpr (Rows::LISTED)
        for (int j = 0; j < COLUMNS; ++j) listed[j] = first + 8 * j + g < rows ? of.of_x(first + 8 * j + g) : -1;

    for (int i = 0; i < R::DEPTH - 1; ++i) {
        int stage = warp + i * WARPS;
        if (stage < w.stages) fetch<TILES>(ring + i * R::SLOT, w, tile, stage, tiles, policy);
        copy_commit();
    }
    wait_for_kernels();               // the first stages of weights are on their way by then
    int at = 0, next = R::DEPTH - 1;  // slots
    for (int stage = warp; stage < w.stages; stage += WARPS) {
        int ahead = stage + (R::DEPTH - 1) * WARPS;
        if (ahead < w.stages) fetch<TILES>(ring + next * R::SLOT, w, tile, ahead, tiles, policy);
        copy_commit();
        copy_wait<R::DEPTH - 1>();
        const u8* slot = ring + at * R::SLOT;
        [[maybe_unused]] const u8* meta = slot + TILES * STAGE_BYTES;
        float c[TILES][COLUMNS][4] = {}, sums[COLUMNS][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            uint4 v[COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                int row = first + 8 * j + g;
                bool there = row < rows;
                if constexpr (Rows::LISTED) row = listed[j], there = row >= 0;
                v[j] = {0, 0, 0, 0};
                if (there)
                    v[j] = *reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * ldx + stage * STAGE +
                                                           chunk * CHUNK + 8 * t);
                if constexpr (OFFSETS) {
                    const u32 ones[4] = {ONES, ONES, ONES, ONES};
                    multiply(sums[j], ones, ones, v[j]);
                }
            }
            bool last = chunk == CHUNKS - 1 || w.split;
            int record = w.split ? chunk : 0;
#pragma unroll
            for (int r = 0; r < TILES; ++r) {
                [[maybe_unused]] const u8* mine = meta + ((r * CHUNKS + record) * WARP + lane) * RECORD;
                u32 zero = 0;
                if constexpr (META == ZERO) {
                    const u8* zeros = meta + TILES * CHUNKS * WARP * RECORD;
                    zero = zeros[((r * CHUNKS + record) * WARP + lane) * 4 + g % 4];
                }
                uint4 codes[VECTORS];
                read_codes(slot + r * STAGE_BYTES, codes);
                u32 a[4], b[4];
                unpack(codes, chunk, 0, zero, a, b);
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) multiply(c[r][j], a, b, v[j]);
                if constexpr (BITS == 32) {
                    unpack(codes, chunk, 1, zero, a, b);
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) {
                        float off[4] = {};
                        multiply(off, a, b, v[j]);
                        for (int i = 0; i < 4; ++i) c[r][j][i] = fmaf(off[i], OFF_BY, c[r][j][i]);
                    }
                }
                if (!last) continue;
                float scales[4];
                unpack_scales(reinterpret_cast<const u32*>(mine), scales);
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) apply(acc[r][j], c[r][j], sums[j], scales);
            }
            if (last)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j)
                    for (int i = 0; i < 4; ++i) sums[j][i] = 0;
        }
        at = at + 1 == R::DEPTH ? 0 : at + 1;
        next = next + 1 == R::DEPTH ? 0 : next + 1;
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
