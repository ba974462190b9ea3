// What is written to the KV cache, and what eviction does to it.
#include "cache.cuh"

// cos and sin of each row's angles, times magnitude: float2 [rows, pairs]. grid: rows. The angle is reduced in
// doubles: at position 100000 a float is off by a hundredth of a turn.
extern "C" __global__ void __launch_bounds__(128)
    rope_table(const int* positions, const double* frequencies, float2* table, int pairs, float magnitude) {
    start();
    double position = positions[blockIdx.x];
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        double turns = position * frequencies[i] / TURN;
        float angle = static_cast<float>((turns - rint(turns)) * TURN);
        table[static_cast<size_t>(blockIdx.x) * pairs + i] = {magnitude * cosf(angle), magnitude * sinf(angle)};
    }
}
EXPORT(rope_table)
// resources rope_table: registers 48, spills 0, stack 32, shared 0

// Channel i of x, turned: (x[i], x[i + pairs]) for i < pairs is one plane.
DEVICE float turned(const float* x, const float2* turns, int i, int head, int pairs) {
    if (i >= head) return 0;
    if (i >= 2 * pairs) return x[i];
    float2 r = turns[i % pairs];
    return i < pairs ? x[i] * r.x - x[i + pairs] * r.y : x[i] * r.x + x[i - pairs] * r.y;
}

// Queries are turned and become halves, a.q; keys are turned and, like values, written to the cache where their rows'
// places are. qkv: float [rows, (heads + 2 kv_heads) · size]. pairs 0: nothing is turned. slope: queries are multiplied
// by 1 + slope · log(1 + ⌊position / original⌋); 0: they are not, and positions may be null.
// grid (rows, heads + 2 kv_heads), one warp.
extern "C" __global__ void __launch_bounds__(WARP)
    rope_append(const Attention a, const float* qkv, const float2* table, int pairs, const int* positions, float slope,
                int original) {
    start();
    int row = blockIdx.x, which = blockIdx.y, size = a.size;
    const float* x = qkv + (static_cast<size_t>(row) * (a.heads + 2 * a.kv_heads) + which) * size;
    const float2* turns = table + static_cast<size_t>(row) * pairs;
    Place place = a.places[row];
    int slot = place.slot;
    Cache cache = a.cache(place.table);
    float far = slope ? 1 + slope * logf(1.0f + static_cast<float>(positions[row] / original)) : 1;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int i = part * 32 + lane_id();
        if (which < a.heads) {
            float y = turned(x, turns, i, size, pairs) * far;
            a.q[(static_cast<size_t>(row) * a.heads + which) * HEAD + i] = to_half(y);
        } else if (which < a.heads + a.kv_heads) {
            store_key(cache.unit(slot, which - a.heads), slot % SLOTS, part, turned(x, turns, i, size, pairs));
        } else {
            store_value(cache.unit(slot, which - a.heads - a.kv_heads), slot % SLOTS, part, i < size ? x[i] : 0);
        }
    }
}
EXPORT(rope_append)
// resources rope_append: registers 64, spills 0, shared 0

// Keys and values of slots src over those of slots dst, nothing where src is negative: int [layers, kv_heads, n].
// What moves comes from behind everything that is written. grid (n, kv_heads, layers), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    move_slots(u8* pool, const int* table, const int* src, const int* dst, int layers, int kv_heads, int n) {
    start();
    int layer = blockIdx.z, head = blockIdx.y;
    size_t at = (static_cast<size_t>(layer) * kv_heads + head) * n + blockIdx.x;
    int from = src[at], to = dst[at];
    if (from < 0) return;
    Cache cache{pool, table, 0, layer, layers, kv_heads};
    u8 *a = cache.unit(from, head), *b = cache.unit(to, head);
    from %= SLOTS, to %= SLOTS;
    for (int i = threadIdx.x; i < HEAD; i += blockDim.x) {
        if constexpr (KV_BITS == 16) {
            halves(b)[to * HEAD + i] = halves(a)[from * HEAD + i];
            halves(values_of(b))[i * SLOTS + to] = halves(values_of(a))[i * SLOTS + from];
        } else {
            b[to * HEAD + i] = a[from * HEAD + i];
            values_of(b)[i * SLOTS + to] = values_of(a)[i * SLOTS + from];
            if (i < PARTS) {
                key_scales(b)[to * PARTS + i] = key_scales(a)[from * PARTS + i];
                value_scales(b)[i * SLOTS + to] = value_scales(a)[i * SLOTS + from];
            }
        }
    }
}
EXPORT(move_slots)
// resources move_slots: registers 48, spills 0, shared 0

// Keys of the first n slots, turned by delta positions: int [layers, kv_heads, n]; layers of another rope have zeros.
// A negative block is one that a window has left behind.
// grid (n, kv_heads, layers), one warp.
extern "C" __global__ void __launch_bounds__(WARP)
    turn_keys(u8* pool, const int* table, const int* delta, const double* frequencies, int layers, int kv_heads, int n,
              int pairs) {
    start();
    __shared__ float key[HEAD];
    __shared__ float2 turns[HEAD / 2];
    int layer = blockIdx.z, head = blockIdx.y, slot = blockIdx.x;
    int by = delta[(static_cast<size_t>(layer) * kv_heads + head) * n + slot];
    if (by == 0 || table[slot / SLOTS] < 0) return;
    u8* unit = Cache{pool, table, 0, layer, layers, kv_heads}.unit(slot, head);
    for (int i = lane_id(); i < HEAD; i += WARP) key[i] = load_key(unit, slot % SLOTS, i);
    for (int i = lane_id(); i < pairs; i += WARP) {
        double t = static_cast<double>(by) * frequencies[i] / TURN;
        float angle = static_cast<float>((t - rint(t)) * TURN);
        turns[i] = {cosf(angle), sinf(angle)};
    }
    __syncwarp();
    for (int part = 0; part < PARTS; ++part)
        store_key(unit, slot % SLOTS, part, turned(key, turns, part * 32 + lane_id(), HEAD, pairs));
}
EXPORT(turn_keys)
// resources turn_keys: registers 48, spills 0, stack 32, shared 2048

constexpr int SPREAD_THREADS = 256;
constexpr int SPREAD_WARPS = SPREAD_THREADS / WARP;

// How far the value of each of the first n slots lies from the weighted mean of them all: float [layers, kv_heads, n],
// like the weights, whose sum may be any; where it is 0, they count alike. A warp takes every 8th block of slots, its
// lane 4g + t of them the slots 4t … 4t + 3 and the channels g, g + 8, …: for the mean, then for the distances. Values
// are what attention sees, sums have one order. grid (kv_heads, layers).
extern "C" __global__ void __launch_bounds__(SPREAD_THREADS)
    value_spread(u8* pool, const int* table, const float* weights, float* to, int layers, int kv_heads, int n) {
    start();
    __shared__ float sums[SPREAD_WARPS];
    __shared__ float means[SPREAD_WARPS][HEAD];
    int layer = blockIdx.y, head = blockIdx.x, g = lane_id() / 4, t = lane_id() % 4;
    size_t at = (static_cast<size_t>(layer) * kv_heads + head) * n;
    weights += at, to += at;
    Cache cache{pool, table, 0, layer, layers, kv_heads};

    float total = 0;
    for (int i = threadIdx.x; i < n; i += SPREAD_THREADS) total += weights[i];
    total = warp_sum(total);
    if (lane_id() == 0) sums[warp_id()] = total;
    __syncthreads();
    total = 0;
    for (int i = 0; i < SPREAD_WARPS; ++i) total += sums[i];
    bool alike = !(total > 0);
    if (alike) total = static_cast<float>(n);

    float mean[HEAD / 8] = {};
    for (int slot = warp_id() * SLOTS; slot < n; slot += SPREAD_WARPS * SLOTS) {
        u8* unit = cache.unit(slot, head);
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int own = slot + 4 * t + i;
            w[i] = own >= n ? 0 : alike ? 1 : weights[own];
        }
#pragma unroll
        for (int c = 0; c < HEAD / 8; ++c) {
            uint2 v = load_value_part(unit, 8 * c + g);
            mean[c] = fmaf(w[0], low_float(v.x), mean[c]);
            mean[c] = fmaf(w[1], high_float(v.x), mean[c]);
            mean[c] = fmaf(w[2], low_float(v.y), mean[c]);
            mean[c] = fmaf(w[3], high_float(v.y), mean[c]);
        }
    }
#pragma unroll
    for (int c = 0; c < HEAD / 8; ++c) {
        mean[c] += shuffle_xor(mean[c], 1);
        mean[c] += shuffle_xor(mean[c], 2);
        if (t == 0) means[warp_id()][8 * c + g] = mean[c];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < HEAD; c += SPREAD_THREADS) {
        float sum = 0;
        for (int i = 0; i < SPREAD_WARPS; ++i) sum += means[i][c];
        means[0][c] = sum / total;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < HEAD / 8; ++c) mean[c] = means[0][8 * c + g];

    for (int slot = warp_id() * SLOTS; slot < n; slot += SPREAD_WARPS * SLOTS) {
        u8* unit = cache.unit(slot, head);
        float square[4] = {};
#pragma unroll
        for (int c = 0; c < HEAD / 8; ++c) {
            uint2 v = load_value_part(unit, 8 * c + g);
            float x[4] = {low_float(v.x), high_float(v.x), low_float(v.y), high_float(v.y)};
#pragma unroll
            for (int i = 0; i < 4; ++i) square[i] = fmaf(x[i] - mean[c], x[i] - mean[c], square[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int mask = 4; mask < WARP; mask *= 2) square[i] += shuffle_xor(square[i], mask);
            int own = slot + 4 * t + i;
            if (g == 0 && own < n) to[own] = sqrtf(square[i]);
        }
    }
}
EXPORT(value_spread)
// resources value_spread: registers 80, spills 0, shared 8224
