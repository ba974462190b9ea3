// Products of rows with the experts that they take: linear.cuh, each block with the weights of one expert, and some of
// the rows that take it (routes.cu lists them). Experts that nobody takes are not read.
#include "linear.cuh"

// table  addresses of each expert's codes, meta, zeros and bias; no codes: another launch has this expert
// work   {expert, first, end} of `pairs` for each x of the grid; expert −1: nothing
// pairs  rows of y, those of an expert behind each other; `share` of them have a row of x in common
// grid (pieces of work, ⌈tiles / TILES⌉), 256 threads.
#define LINEAR(name, TILES, COLUMNS, blocks)                                                                       \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, blocks)                                              \
        name(const u64* table, const int* work, const int* pairs, const u16* x, float* y, int outputs, int stages, \
             int group, int groups, int ldx, int ldy, int share) {                                                 \
        start();                                                                                                   \
        work += 3 * blockIdx.x;                                                                                    \
        if (work[0] < 0 || !table[4 * work[0]]) return;                                                            \
        table += 4 * work[0];                                                                                      \
        auto address = [&](int i) { return reinterpret_cast<const u8*>(table[i]); };                               \
        Weights w{address(0), address(1), address(2), stages, group, groups};                                      \
        Output to{y, outputs, ldy, 0, 1, 0};                                                                       \
        auto* bias = reinterpret_cast<const float*>(table[3]);                                                     \
        linear<TILES, COLUMNS>(w, ListedRows{pairs, share}, x, bias, to, work[1], work[2], ldx);                   \
    }                                                                                                              \
    EXPORT(name)

// resources experts_1x8: registers 80, spills 0, shared 49152, stage 124
LINEAR(experts_1x8, 1, 1, 3)
#if BITS == 32  // two tiles would leave no room for a pipeline
// resources experts_1x32: registers 128, spills 0, shared 49152
LINEAR(experts_1x32, 1, 4, 2)
#else
// resources experts_2x32: registers 192, spills 0, shared 49152
LINEAR(experts_2x32, 2, 4, 1)
#endif
