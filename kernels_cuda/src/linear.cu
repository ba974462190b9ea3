// Products with every row of x: linear.cuh, and for many rows wide.cuh.
#include "wide.cuh"

// grid (⌈rows / 8 COLUMNS⌉, ⌈tiles / TILES⌉), 256 threads. `blocks`: resident on an SM; bounds the registers.
#define LINEAR(name, TILES, COLUMNS, blocks)                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, blocks)                                               \
        name(const u8* codes, const u8* meta, const u8* zeros, const u16* x, const float* bias, float* y, int rows, \
             int outputs, int stages, int group, int groups, int ldx, int ldy, int add, float scale, float cap) {   \
        Weights w{codes, meta, zeros, stages, group, groups};                                                       \
        Output to{y, outputs, ldy, add, scale, cap};                                                                \
        linear<TILES, COLUMNS>(w, EveryRow{}, x, bias, to, blockIdx.x * COLUMNS * 8, rows, ldx);                    \
    }                                                                                                               \
    EXPORT(name)

// stage: instructions of a warp for a stage of 4 bits with zeros. Memory delivers 512 bytes to an SM of an A100 in some
// 38 cycles, of an H200 in 24; four warps issue an instruction each in one.
// resources linear_1x8: registers 80, spills 0, shared 49152, stage 122
LINEAR(linear_1x8, 1, 1, 3)
// resources linear_1x16: registers 80, spills 0, shared 49152, stage 136
LINEAR(linear_1x16, 1, 2, 3)
#if BITS == 32  // two tiles would leave no room for a pipeline
// resources linear_1x64: registers 168, spills 0, shared 49152
LINEAR(linear_1x64, 1, 8, 1)
#else
// resources linear_2x64: registers 255, spills 16, stack 16, shared 49152
// resources linear_2x64/coded: registers 255, spills 96, stack 96, shared 49152
LINEAR(linear_2x64, 2, 8, 1)
#endif
#if BITS != 32 && BITS != 5 && BITS != 6  // of those, two tiles would leave no room for a pipeline
// resources linear_2x8: registers 128, spills 0, shared 49152, stage 190
LINEAR(linear_2x8, 2, 1, 2)
// resources linear_2x16: registers 128, spills 0, shared 49152, stage 214
LINEAR(linear_2x16, 2, 2, 2)
#endif

// grid (⌈rows / 128⌉, ⌈tiles / 8⌉), 256 threads.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_8x128(const u8* codes, const u8* meta, const u8* zeros, const u16* x, const float* bias, float* y, int rows,
                 int outputs, int stages, int group, int groups, int ldx, int ldy, int add, float scale, float cap) {
    start();
    Weights w{codes, meta, zeros, stages, group, groups};
    wide::linear(w, x, bias, {y, outputs, ldy, add, scale, cap}, rows, ldx);
}
EXPORT(linear_8x128)
// resources linear_8x128: registers 255, spills 32, stack 16, shared 49152
// resources linear_8x128/coded: registers 255, spills 32, stack 288, shared 49152
