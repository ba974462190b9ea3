// to[row] = scale · (row ids[row] of the embedding), in floats: [rows, n]. The embedding lies as linear.cu reads it,
// because it may be the output head too. grid (⌈n / 256⌉, rows), 256 threads. Moves n · BITS / 8 bytes a row.
#include "beside.cuh"

extern "C" __global__ void __launch_bounds__(256)
    embed(const u8* codes, const u8* meta, const u8* zeros, const int* ids, float* to, int n, int stages, int group,
          int groups, float scale) {
    start();
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    float w = weight_at({codes, meta, zeros, stages, group, groups}, ids[blockIdx.y], i);
    to[static_cast<size_t>(blockIdx.y) * n + i] = w * scale;
}
EXPORT(embed)
// resources embed: registers 40, spills 0, shared 0
