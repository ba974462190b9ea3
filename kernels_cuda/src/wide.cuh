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
constexpr int AT_ONCE = GROUP > 0 || SPLIT ? 1 : CHUNKS;  // chunks whose sums are scaled together

static_assert(ALONG * ACROSS == WARPS);

// Sums over all residues. They change eight times in all, so where coded scales, or those of each chunk, need
// registers, they are kept in local memory: what ptxas would put there instead is needed in each stage.
template <bool LOCAL>
struct Total {
    typedef float Sum;
};
template <>
struct Total<true> {
    typedef volatile float Sum;
};

// One stage of a warp's weights, as it lies in memory.
struct Raw {
    Codes codes[TILES];
    u32 beside[TILES][RUNS][WORDS ? WORDS : 1], zeros[TILES][RUNS];
};

// Some chunks of it as the tensor cores take them, and their scales.
struct Unpacked {
    Chunk w[TILES][AT_ONCE];
    float scales[TILES][AT_ONCE * 2 / QUADS][4];
};

// A tile that is there, for the r-th of a warp.
DEVICE int tile_of(int tile, int r, int tiles) { return tile + r < tiles ? tile + r : tiles - 1; }

DEVICE void read_codes(Raw& raw, const Weights& w, int tile, int stage, int tiles) {
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
        size_t at = static_cast<size_t>(tile_of(tile, r, tiles)) * w.stages + stage;
        ::read_codes(w.codes + at * STAGE_BYTES, raw.codes[r]);
    }
}

DEVICE void read_beside(Raw& raw, const Weights& w, int tile, int stage, int tiles) {
#pragma unroll
    for (int r = 0; r < TILES; ++r) ::read_beside(w, tile_of(tile, r, tiles), stage, raw.beside[r], raw.zeros[r]);
}

DEVICE void unpack(Unpacked& to, const Raw& raw, int first) {
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
            for (int quad = 0; quad < 2; quad += QUADS) {
                bool later = record_in(first + i, quad) > 0;
                u32 zeros = KIND != Beside::ZERO ? 0
                            : later              ? raw.zeros[r][scale_of(first + i, quad)]
                                                 : raw.zeros[r][0];
                unpack_parts(to.w[r][i], raw.codes[r], first + i, quad, zeros);
            }
}

DEVICE void read_scales(Unpacked& to, const Raw& raw, int stage, int first) {
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
            for (int quad = 0; quad < 2; quad += QUADS) {
                int c = scale_of(first + i, quad);
                bool later = !CODED && record_in(first + i, quad) > 0;
                scales_of(later ? raw.beside[r][c] : raw.beside[r][0], stage, c, to.scales[r][scale_of(i, quad)]);
            }
}

// Where 16 bytes of x lie in a buffer: rows that are read at once are in different banks. Those are two of eight lanes,
// or, where lanes read 8 bytes, four of sixteen.
DEVICE int place(int row, int unit) {
    int turn = HALVES ? (UNITS == 8 ? (row & 3) * 2 : row & 2) : UNITS == 8 ? (row & 1) * 4 : 0;
    return (row * UNITS + (unit ^ turn)) * 16;
}

// The lane's eight of a chunk's inputs.
DEVICE uint4 read_row(const u8* buffer, int row, int chunk, int t) {
    if (HALVES) {
        int unit = chunk * 4 + t / 2, within = t % 2 * 8;
        uint2 low = *reinterpret_cast<const uint2*>(buffer + place(row, unit) + within);
        uint2 high = *reinterpret_cast<const uint2*>(buffer + place(row, unit + 2) + within);
        return {low.x, low.y, high.x, high.y};
    }
    return *reinterpret_cast<const uint4*>(buffer + place(row, chunk * 4 + t));
}

// The block's rows of x, one stage of them. Rows behind the last are copies of it, and not stored.
DEVICE void fetch_rows(u8* buffer, const u16* x, int first, int rows, int ldx, int stage) {
#pragma unroll
    for (int i = threadIdx.x; i < BLOCK_ROWS * UNITS; i += WARPS * WARP) {
        int row = i / UNITS, unit = i % UNITS, from = first + row < rows ? first + row : rows - 1;
        copy_async<16>(buffer + place(row, unit), x + static_cast<size_t>(from) * ldx + stage * STAGE + unit * 8);
    }
}

// acc += the products of some chunks for eight rows, of which the lane has 16 bytes a chunk.
DEVICE void add_column(float (&acc)[TILES][4], const Unpacked& w, const uint4 (&v)[AT_ONCE]) {
    float sums[4] = {}, c[TILES][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < AT_ONCE; ++chunk)
#pragma unroll
        for (int quad = 0; quad < 2; quad += QUADS) {
            if constexpr (OFFSETS) add_inputs(sums, quad, v[chunk]);
            bool last = GROUP > 0 || chunk == AT_ONCE - 1 || SPLIT;
#pragma unroll
            for (int r = 0; r < TILES; ++r) {
                multiply_parts(c[r], quad, w.w[r][chunk], v[chunk]);
                if (last) apply(acc[r], c[r], sums, w.scales[r][scale_of(chunk, quad)]);
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
    float acc[TILES][COLUMNS][4] = {};
    Total<CODED || SPLIT>::Sum total[TILES][COLUMNS][4] = {};

    int fetched = 0, buffer = 0;
    for (int i = 0; i < BUFFERS - 1; ++i) {
        if (fetched >= 0) fetch_rows(shared[i], x, first, rows, ldx, fetched);
        copy_commit();
        if (fetched >= 0) fetched = follows(fetched);
    }
    constexpr bool AHEAD = RECORD <= 4;  // registers do not suffice for longer records as well
    Raw raw;
    read_codes(raw, w, tile, 0, tiles);
    if (AHEAD) read_beside(raw, w, tile, 0, tiles);
    for (int stage = 0, next; stage >= 0; stage = next) {
        next = follows(stage);
        if (!AHEAD) read_beside(raw, w, tile, stage, tiles);
        copy_wait<BUFFERS - 2>();
        __syncthreads();  // the stage's rows are there, and nobody reads those of the last one any more
        if (fetched >= 0) {
            fetch_rows(shared[buffer ? buffer - 1 : BUFFERS - 1], x, first, rows, ldx, fetched);
            fetched = follows(fetched);
        }
        copy_commit();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += AT_ONCE) {
            Unpacked unpacked;
            unpack(unpacked, raw, chunk);
            read_scales(unpacked, raw, stage, chunk);
            if (chunk + AT_ONCE == CHUNKS && next >= 0) {
                read_codes(raw, w, tile, next, tiles);
                if (AHEAD) read_beside(raw, w, tile, next, tiles);
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                uint4 v[AT_ONCE];
#pragma unroll
                for (int c = 0; c < AT_ONCE; ++c) v[c] = read_row(shared[buffer], across + 8 * j + g, chunk + c, t);
                float column[TILES][4];
#pragma unroll
                for (int r = 0; r < TILES; ++r)
                    for (int i = 0; i < 4; ++i) column[r][i] = acc[r][j][i];
                add_column(column, unpacked, v);
#pragma unroll
                for (int r = 0; r < TILES; ++r)
                    for (int i = 0; i < 4; ++i) acc[r][j][i] = column[r][i];
            }
        }
        if (stage + WARPS >= w.stages)  // the residue's last
#pragma unroll
            for (int r = 0; r < TILES; ++r)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        total[r][j][i] = total[r][j][i] + acc[r][j][i];
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
