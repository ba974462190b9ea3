// What is written to the KV cache, and what eviction does to it.
#include "cache.cuh"

// cos and sin of each row's angles, times magnitude: float2 [rows, pairs]. grid: rows. The angle is reduced in
// doubles: at position 100000 a float is off by a hundredth of a turn.
extern "C" __global__ void __launch_bounds__(128)
    rope_table(const Step* step, const double* frequencies, float2* table, int pairs, float magnitude) {
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        double turns = static_cast<double>(step->position + static_cast<int>(blockIdx.x)) * frequencies[i] / TURN;
        float angle = static_cast<float>((turns - rint(turns)) * TURN);
        table[static_cast<size_t>(blockIdx.x) * pairs + i] = {magnitude * cosf(angle), magnitude * sinf(angle)};
    }
}
EXPORT(rope_table)
// resources rope_table: registers 48, spills 0, shared 0

// Channel i of x, turned: (x[i], x[i + pairs]) for i < pairs is one plane.
DEVICE float turned(const float* x, const float2* turns, int i, int head, int pairs) {
    if (i >= head) return 0;
    if (i >= 2 * pairs) return x[i];
    float2 r = turns[i % pairs];
    return i < pairs ? x[i] * r.x - x[i + pairs] * r.y : x[i] * r.x + x[i - pairs] * r.y;
}

// Queries are turned and become halves, q [rows, heads, HEAD]; keys are turned and, like values, written to the cache
// at slot length + row. qkv: float [rows, (heads + 2 kv_heads) · head]. pairs 0: nothing is turned.
// grid (rows, heads + 2 kv_heads), one warp.
extern "C" __global__ void __launch_bounds__(WARP)
    rope_append(const Step* step, const float* qkv, const float2* table, u16* q, u8* pool, const int* blocks, int layer,
                int layers, int heads, int kv_heads, int head, int pairs) {
    int row = blockIdx.x, which = blockIdx.y;
    const float* x = qkv + (static_cast<size_t>(row) * (heads + 2 * kv_heads) + which) * head;
    const float2* turns = table + static_cast<size_t>(row) * pairs;
    int slot = step->length + row;
    Cache cache{pool, blocks, layer, layers, kv_heads};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int i = part * 32 + lane_id();
        if (which < heads) {
            float y = turned(x, turns, i, head, pairs);
            q[(static_cast<size_t>(row) * heads + which) * HEAD + i] = to_half(y);
        } else if (which < heads + kv_heads) {
            store_key(cache.unit(slot, which - heads), slot % SLOTS, part, turned(x, turns, i, head, pairs));
        } else {
            store_value(cache.unit(slot, which - heads - kv_heads), slot % SLOTS, part, i < head ? x[i] : 0);
        }
    }
}
EXPORT(rope_append)
// resources rope_append: registers 64, spills 0, shared 0

// Keys and values of slots src over those of slots dst, nothing where src is negative: int [layers, kv_heads, n].
// What moves comes from behind everything that is written. grid (n, kv_heads, layers), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    move_slots(u8* pool, const int* blocks, const int* src, const int* dst, int layers, int kv_heads, int n) {
    int layer = blockIdx.z, head = blockIdx.y;
    size_t at = (static_cast<size_t>(layer) * kv_heads + head) * n + blockIdx.x;
    int from = src[at], to = dst[at];
    if (from < 0) return;
    Cache cache{pool, blocks, layer, layers, kv_heads};
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
// grid (n, kv_heads, layers), one warp.
extern "C" __global__ void __launch_bounds__(WARP)
    turn_keys(u8* pool, const int* blocks, const int* delta, const double* frequencies, int layers, int kv_heads, int n,
              int pairs) {
    __shared__ float key[HEAD];
    __shared__ float2 turns[HEAD / 2];
    int layer = blockIdx.z, head = blockIdx.y, slot = blockIdx.x;
    int by = delta[(static_cast<size_t>(layer) * kv_heads + head) * n + slot];
    if (by == 0) return;
    u8* unit = Cache{pool, blocks, layer, layers, kv_heads}.unit(slot, head);
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
// resources turn_keys: registers 48, spills 0, shared 2048
