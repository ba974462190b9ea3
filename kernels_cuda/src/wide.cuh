// The product of linear.cuh for many rows (prefill): the same sums in the same order, so the same bits, with more of
// them a block. A block of eight warps has 128 outputs and 128 rows; its rows of x go through shared memory, weights
// straight to registers, a stage ahead. Moves x once for 128 outputs, and the weights once for 128 rows, from L2.
//
// Products: 64 mma a warp and stage of 64 inputs, 2 MFLOP a block for 16 KB of x and 4 KB of weights: 100 FLOP a byte,
// where linear_2x64 has 28.
//
// Order: linear.cuh's warp i sums stages i, i + 8, …, then the warps' sums are added. Here one warp does all of that,
// one residue after the other.
#pragma once

#include "linear.cuh"

namespace wide {

constexpr int TILES = 2, COLUMNS = 8;  // of a warp: 32 outputs, 64 rows
constexpr int ALONG = 4, ACROSS = 2;   // warps along the outputs, and the rows
constexpr int BLOCK_TILES = ALONG * TILES, BLOCK_ROWS = ACROSS * COLUMNS * 8;
constexpr int UNITS = STAGE / 8;  // of 16 bytes, in a row of x
constexpr int BUFFERS = 3;
constexpr int PARTS = BITS == 32 ? 2 : 1;  // halves, and what they are off by

static_assert(ALONG * ACROSS == WARPS);

// One stage of a warp's weights, as it lies in memory.
struct Raw {
    uint4 codes[TILES][VECTORS];
    u32 meta[TILES][CHUNKS][RECORD ? RECORD / 4 : 1];
    u32 zeros[TILES][CHUNKS];
};

// And as the tensor cores take it: pairs of halves of outputs g and g + 8.
struct Unpacked {
    u32 a[TILES][CHUNKS][PARTS][4], b[TILES][CHUNKS][PARTS][4];
};

DEVICE void read_codes(Raw& raw, const Weights& w, int tile, int stage, int tiles) {
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
        int from = tile + r < tiles ? tile + r : tiles - 1;
        ::read_codes(w.codes + (static_cast<size_t>(from) * w.stages + stage) * STAGE_BYTES, raw.codes[r]);
    }
}

DEVICE void read_meta(Raw& raw, const Weights& w, int tile, int stage, int tiles) {
    if constexpr (META != NONE) {
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            int from = tile + r < tiles ? tile + r : tiles - 1;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                if (c > 0 && !w.split) break;
                size_t at = record_of(w, from, stage, c) + lane_id() / 4;
                auto* record = reinterpret_cast<const u32*>(w.meta + at * RECORD);
#pragma unroll
                for (int i = 0; i < RECORD / 4; ++i) raw.meta[r][c][i] = record[i];
                if constexpr (META == ZERO) raw.zeros[r][c] = w.zeros[at];
            }
        }
    }
}

DEVICE void unpack_all(Unpacked& to, const Raw& raw, bool split) {
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                u32 zero = META != ZERO ? 0 : c > 0 && split ? raw.zeros[r][c] : raw.zeros[r][0];
                unpack(raw.codes[r], c, p, zero, to.a[r][c][p], to.b[r][c][p]);
            }
}

// Where 16 bytes of x lie in a buffer: rows that eight lanes read at once are in different banks.
DEVICE int place(int row, int unit) { return (row * UNITS + (UNITS == 8 ? unit ^ (row & 1) * 4 : unit)) * 16; }

// The block's rows of x, one stage of them. Rows behind the last are copies of it, and not stored.
DEVICE void fetch_rows(u8* buffer, const u16* x, int first, int rows, int ldx, int stage) {
#pragma unroll
    for (int i = threadIdx.x; i < BLOCK_ROWS * UNITS; i += WARPS * WARP) {
        int row = i / UNITS, unit = i % UNITS, from = first + row < rows ? first + row : rows - 1;
        copy_async<16>(buffer + place(row, unit), x + static_cast<size_t>(from) * ldx + stage * STAGE + unit * 8);
    }
}

// acc += the stage's products for eight rows, of which the lane has 16 bytes a chunk.
DEVICE void add_column(float (&acc)[TILES][4], const Unpacked& w, const float (&scales)[TILES][CHUNKS][4],
                       const uint4 (&v)[CHUNKS], bool split) {
    float sums[4] = {}, c[TILES][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const u32 ones[4] = {ONES, ONES, ONES, ONES};
        if constexpr (OFFSETS) multiply(sums, ones, ones, v[chunk]);
        bool last = chunk == CHUNKS - 1 || split;
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            multiply(c[r], w.a[r][chunk][0], w.b[r][chunk][0], v[chunk]);
            if constexpr (BITS == 32) {
                float off[4] = {};
                multiply(off, w.a[r][chunk][PARTS - 1], w.b[r][chunk][PARTS - 1], v[chunk]);
                for (int i = 0; i < 4; ++i) c[r][i] = fmaf(off[i], OFF_BY, c[r][i]);
            }
            if (!last) continue;
            apply(acc[r], c[r], sums, scales[r][chunk]);
        }
        if (last)
            for (int i = 0; i < 4; ++i) sums[i] = 0;
    }
}

DEVICE void linear(const Weights& w, const u16* x, const float* bias, const Output& to, int rows, int ldx) {
    __shared__ u8 __align__(16) shared[BUFFERS][BLOCK_ROWS * STAGE * 2];
    int lane = lane_id(), g = lane / 4, t = lane % 4, across = warp_id() / ALONG * COLUMNS * 8;
    int first = blockIdx.x * BLOCK_ROWS, tiles = divide_up(to.outputs, TILE);
    int tile = blockIdx.y * BLOCK_TILES + warp_id() % ALONG * TILES;
    // The stages in their order: a residue's, then the next one's.
    auto follows = [&](int stage) {
        if (stage + WARPS < w.stages) return stage + WARPS;
        int residue = stage % WARPS + 1;
        return residue < WARPS && residue < w.stages ? residue : -1;
    };
    float acc[TILES][COLUMNS][4] = {}, total[TILES][COLUMNS][4] = {};

    int fetched = 0, buffer = 0;
    for (int i = 0; i < BUFFERS - 1; ++i) {
        if (fetched >= 0) fetch_rows(shared[i], x, first, rows, ldx, fetched);
        copy_commit();
        if (fetched >= 0) fetched = follows(fetched);
    }
    constexpr bool AHEAD = RECORD <= 4;  // registers do not suffice for longer records as well
    Raw raw;
    read_codes(raw, w, tile, 0, tiles);
    if (AHEAD) read_meta(raw, w, tile, 0, tiles);
    for (int stage = 0, next; stage >= 0; stage = next) {
        next = follows(stage);
        if (!AHEAD) read_meta(raw, w, tile, stage, tiles);
        copy_wait<BUFFERS - 2>();
        __syncthreads();  // the stage's rows are there, and nobody reads those of the last one any more
        if (fetched >= 0) {
            fetch_rows(shared[buffer ? buffer - 1 : BUFFERS - 1], x, first, rows, ldx, fetched);
            fetched = follows(fetched);
        }
        copy_commit();
        Unpacked unpacked;
        unpack_all(unpacked, raw, w.split);
        float scales[TILES][CHUNKS][4];
#pragma unroll
        for (int r = 0; r < TILES; ++r)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
                unpack_scales(c > 0 && !w.split ? raw.meta[r][0] : raw.meta[r][c], scales[r][c]);
        if (next >= 0) {
            read_codes(raw, w, tile, next, tiles);
            if (AHEAD) read_meta(raw, w, tile, next, tiles);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            uint4 v[CHUNKS];
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
                v[c] = *reinterpret_cast<const uint4*>(shared[buffer] + place(across + 8 * j + g, c * 4 + t));
            float column[TILES][4];
#pragma unroll
            for (int r = 0; r < TILES; ++r)
                for (int i = 0; i < 4; ++i) column[r][i] = acc[r][j][i];
            add_column(column, unpacked, scales, v, w.split);
#pragma unroll
            for (int r = 0; r < TILES; ++r)
                for (int i = 0; i < 4; ++i) acc[r][j][i] = column[r][i];
        }
        if (stage + WARPS >= w.stages)  // the residue's last
#pragma unroll
            for (int r = 0; r < TILES; ++r)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        total[r][j][i] += acc[r][j][i];
                        acc[r][j][i] = 0;
                    }
        buffer = buffer + 1 == BUFFERS ? 0 : buffer + 1;
    }
    copy_wait<0>();
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int n = (tile + r) * TILE + g + i / 2 * 8, row = first + across + 8 * j + 2 * t + i % 2;
                if (row < rows && n < to.outputs) store(to, bias, total[r][j][i], n, row);
            }
}

}  // namespace wide
