// Which experts each row takes, who takes each expert, and what becomes of their results. A pair is a row with an
// expert that it takes: row · taken + place.
#include "keys.cuh"

constexpr int THREADS = 1024;  // of `route`
constexpr int PLAIN = 256;     // of the others
constexpr int MOST = 1024;     // experts
constexpr int TAKEN = 64;      // of a row, at most

// The `taken` largest scores of a row, lowest expert first among equals, and exp(score) as shares of all experts', or
// of those taken (normalize). Every lane of a warp takes part.
DEVICE void choose(const float* scores, int experts, int taken, int normalize, int* chosen, float* weights) {
    int lane = lane_id();
    u64 last = ~0ull;
    float most = 0, all = 0, own[TAKEN / WARP] = {}, total = 0;
    for (int place = 0; place < taken; ++place) {
        u64 best = 0;
        for (int e = lane; e < experts; e += WARP) {
            u64 key = key_of(scores[e], e);
            if (key < last && key > best) best = key;
        }
        for (int mask = WARP / 2; mask; mask /= 2) {
            u64 other = shuffle_xor(best, mask);
            best = other > best ? other : best;
        }
        if (place == 0) {
            most = value_of(best);
            for (int e = lane; e < experts; e += WARP) all += expf(scores[e] - most);
            all = warp_sum(all);
        }
        float weight = expf(value_of(best) - most) / all;
        total += weight;
        if (lane == 0) chosen[place] = id_of(best);
#pragma unroll
        for (int i = 0; i < TAKEN / WARP; ++i)
            if (place == i * WARP + lane) own[i] = weight;
        last = best;
    }
#pragma unroll
    for (int i = 0; i < TAKEN / WARP; ++i)
        if (i * WARP + lane < taken) weights[i * WARP + lane] = normalize ? own[i] / total : own[i];
}

// Sums of the threads' numbers before and with each: to[thread], of two numbers each. `n` threads have one that counts.
DEVICE void running_sums(int (&to)[2][THREADS], int n) {
    int i = threadIdx.x;
    for (int distance = 1; distance < n; distance *= 2) {
        __syncthreads();
        int a = i >= distance ? to[0][i - distance] : 0, b = i >= distance ? to[1][i - distance] : 0;
        __syncthreads();
        to[0][i] += a;
        to[1][i] += b;
    }
    __syncthreads();
}

// scores [rows, experts] to
//   chosen, weights  [rows, taken]: each pair's expert and what its result is multiplied by
//   pairs            all of them, those of an expert behind each other (in no particular order: no row's bits depend
//                    on its neighbours)
//   work             `pieces` times {expert, first, end} of pairs, at most `columns` in one; then expert −1
// One block: a layer's scores are few, and the rest waits for all of them.
extern "C" __global__ void __launch_bounds__(THREADS)
    route(const float* scores, int* chosen, float* weights, int* pairs, int* work, int rows, int experts, int taken,
          int normalize, int columns, int pieces) {
    start();
    __shared__ int sums[2][THREADS];  // pairs and pieces of the experts so far
    __shared__ int next[MOST];        // where an expert's next pair goes
    int thread = threadIdx.x, all = rows * taken;
    next[thread] = 0;
    for (int row = warp_id(); row < rows; row += THREADS / WARP)
        choose(scores + static_cast<size_t>(row) * experts, experts, taken, normalize, chosen + row * taken,
               weights + row * taken);
    __syncthreads();
    for (int p = thread; p < all; p += THREADS) add_together(&next[chosen[p]], 1);
    __syncthreads();
    int mine = next[thread], parts = divide_up(mine, columns);
    sums[0][thread] = mine;
    sums[1][thread] = parts;
    running_sums(sums, experts);
    int end = sums[0][thread], begin = end - mine, piece = sums[1][thread] - parts;
    next[thread] = begin;
    for (int i = 0; i < parts; ++i) {
        int* w = work + 3 * (piece + i);
        w[0] = thread;
        w[1] = begin + i * columns;
        w[2] = end < w[1] + columns ? end : w[1] + columns;
    }
    for (int i = sums[1][experts - 1] + thread; i < pieces; i += THREADS) work[3 * i] = -1;
    __syncthreads();
    for (int p = thread; p < all; p += THREADS) pairs[add_together(&next[chosen[p]], 1)] = p;
}
EXPORT(route)
// resources route: registers 64, spills 0, shared 12288

// The halves that each pair's expert reads, in its order: to[pair][i] = x[pair / share][perms[expert][i]]; no address:
// as they are. x: halves [rows, ld]. grid (⌈ld / 256⌉, pairs).
extern "C" __global__ void __launch_bounds__(PLAIN)
    reorder_pairs(const u16* x, const u64* perms, const int* chosen, u16* to, int n, int ld, int share) {
    start();
    int i = blockIdx.x * PLAIN + threadIdx.x, pair = blockIdx.y;
    if (i >= ld) return;
    auto* perm = reinterpret_cast<const int*>(perms[chosen[pair]]);
    x += static_cast<size_t>(pair / share) * ld;
    to[static_cast<size_t>(pair) * ld + i] = i < n ? x[perm ? perm[i] : i] : 0;
}
EXPORT(reorder_pairs)
// resources reorder_pairs: registers 32, spills 0, shared 0

// to[row] += Σ weight · x[pair] over the row's pairs, in their order. x: float [pairs, n]. grid (⌈n / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(PLAIN)
    add_pairs(const float* x, const float* weights, float* to, int n, int taken) {
    start();
    int i = blockIdx.x * PLAIN + threadIdx.x, row = blockIdx.y;
    if (i >= n) return;
    x += static_cast<size_t>(row) * taken * n;
    float sum = to[static_cast<size_t>(row) * n + i];
    for (int place = 0; place < taken; ++place)
        sum = fmaf(weights[row * taken + place], x[static_cast<size_t>(place) * n + i], sum);
    to[static_cast<size_t>(row) * n + i] = sum;
}
EXPORT(add_pairs)
// resources add_pairs: registers 64, spills 0, shared 0
