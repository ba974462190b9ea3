// Layers whose tokens pass through a state (network/recurrence.py). A state of such a layer: the heads' numbers, if it
// has heads, then what the convolution saw of the last WIDTH - 1 tokens, the oldest first. Rows of a sequence go
// through it one by one, each in an order of sums of its own, so that a row's result does not depend on the step that
// it is in.
//
// WIDTH    tokens that the convolution sees
// COLUMNS  numbers of a head's state for each of its values, all of them in registers; 0: it has no heads
#include "device.cuh"
#include "step.cuh"

constexpr int THREADS = 256;

// Of one layer: `size` floats in each of the pool's slots, from slot · stride on.
struct States {
    float* pool;
    int stride;

    DEVICE_MEMBER float* of(int slot) const { return slot < 0 ? nullptr : pool + slot * static_cast<size_t>(stride); }
};

// First row of the sequence that a row belongs to.
DEVICE int first_of(const Pass* passes, int row) {
    int source = passes[row].source;
    return source < -1 ? row + source + 1 : row;
}

// What a convolution reads: columns of rows, or products of two of them.
struct Columns {
    const float* x;
    int ld;

    DEVICE_MEMBER float operator()(int row, int c) const { return x[static_cast<size_t>(row) * ld + c]; }
};

struct Products {
    const float *a, *b;
    int ld;

    DEVICE_MEMBER float operator()(int row, int c) const {
        size_t at = static_cast<size_t>(row) * ld + c;
        return a[at] * b[at];
    }
};

// A channel of a row. before: what the sequence's state saw, or null.
template <class In>
DEVICE float convolved(In in, const float* before, const float* weight, int row, int first, int c, int channels) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        int at = row + i - (WIDTH - 1);
        float x = 0;
        if (at >= first)
            x = in(at, c);
        else if (before)
            x = before[(at - first + WIDTH - 1) * static_cast<size_t>(channels) + c];
        sum = fmaf(weight[c * WIDTH + i], x, sum);
    }
    return sum;
}

// What it saw, to the states that are kept. For the first row of each sequence; everything is read before it is
// written.
template <class In>
DEVICE void leave(In in, States states, const Pass* passes, int rows, int c, int channels) {
    int first = blockIdx.y;
    if (passes[first].source < -1) return;
    float seen[WIDTH - 1];
    const float* before = states.of(passes[first].source);
#pragma unroll
    for (int i = 0; i < WIDTH - 1; ++i) seen[i] = before ? before[i * static_cast<size_t>(channels) + c] : 0;
    for (int row = first; row < rows && (row == first || passes[row].source < -1); ++row) {
#pragma unroll
        for (int i = 0; i < WIDTH - 2; ++i) seen[i] = seen[i + 1];
        seen[WIDTH - 2] = in(row, c);
        if (float* to = states.of(passes[row].kept))
#pragma unroll
            for (int i = 0; i < WIDTH - 1; ++i) to[i * static_cast<size_t>(channels) + c] = seen[i];
    }
}

DEVICE float silu(float x) { return x / (1 + expf(-x)); }

DEVICE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// C · conv(B · x) of rows (B, C, x), as halves, zero from `channels` to ld. grid (⌈ld / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    short_conv(const float* bcx, const float* weight, float* pool, int stride, const Pass* passes, u16* to,
               int channels, int ld) {
    start();
    int c = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (c >= ld) return;
    float y = 0;
    if (c < channels) {
        int first = first_of(passes, row);
        const float* before = States{pool, stride}.of(passes[first].source);
        y = convolved(Products{bcx, bcx + 2 * channels, 3 * channels}, before, weight, row, first, c, channels);
        y *= bcx[static_cast<size_t>(row) * 3 * channels + channels + c];
    }
    to[static_cast<size_t>(row) * ld + c] = to_half(y);
}
EXPORT(short_conv)
// resources short_conv: registers 48, spills 0, shared 0

// The same rows' part of the states. grid (⌈channels / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    leave_products(const float* bcx, float* pool, int stride, const Pass* passes, int rows, int channels) {
    start();
    int c = blockIdx.x * THREADS + threadIdx.x;
    if (c < channels)
        leave(Products{bcx, bcx + 2 * channels, 3 * channels}, States{pool, stride}, passes, rows, c, channels);
}
EXPORT(leave_products)
// resources leave_products: registers 48, spills 0, shared 0

// silu(conv(x) + bias): float [rows, channels]. x: columns of rows that are ldx apart. pool: of the part of the states
// that the convolution saw. grid (⌈channels / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_conv(const float* x, const float* weight, const float* bias, const float* pool, int stride, const Pass* passes,
              float* to, int channels, int ldx) {
    start();
    int c = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (c >= channels) return;
    int first = first_of(passes, row);
    const float* before = States{const_cast<float*>(pool), stride}.of(passes[first].source);
    float y = convolved(Columns{x, ldx}, before, weight, row, first, c, channels);
    to[static_cast<size_t>(row) * channels + c] = silu(bias ? y + bias[c] : y);
}
EXPORT(silu_conv)
// resources silu_conv: registers 48, spills 0, shared 0

// grid (⌈channels / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    leave_columns(const float* x, float* pool, int stride, const Pass* passes, int rows, int channels, int ldx) {
    start();
    int c = blockIdx.x * THREADS + threadIdx.x;
    if (c < channels) leave(Columns{x, ldx}, States{pool, stride}, passes, rows, c, channels);
}
EXPORT(leave_columns)
// resources leave_columns: registers 48, spills 0, shared 0

#if COLUMNS
constexpr int PARTS = 4;              // threads that share the numbers of a value
constexpr int VALUES = WARP / PARTS;  // of a head, that a warp has
constexpr int OWN = (COLUMNS + PARTS - 1) / PARTS;

DEVICE int part() { return lane_id() / VALUES; }

// Over the threads of a value, the same on each.
DEVICE float value_sum(float x) {
#pragma unroll
    for (int mask = VALUES; mask < WARP; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// The numbers of a head's state for one of its values that this thread has: s[i] is number i · PARTS + part(). In
// memory each lies `values` behind the one before.
struct Head {
    float s[OWN];

    template <class F>
    DEVICE_MEMBER void each(F f) {
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if (i * PARTS + part() < COLUMNS) f(s[i], i * PARTS + part());
    }

    DEVICE_MEMBER void load(const float* from, int values) {
        for (float& x : s) x = 0;
        if (from) each([&](float& x, int i) { x = from[i * values]; });
    }

    DEVICE_MEMBER void store(float* to, int values) {
        each([&](float& x, int i) { to[i * values] = x; });
    }
};

// A warp for eight of a head's values, for all rows of a sequence. y: float [rows, channels], queries and keys of
// n_keys heads and values of all, behind the convolution; beta, alpha: [rows, heads]. to: float [rows, heads · values].
// grid (heads, ⌈values / 8⌉, rows), 32 threads.
extern "C" __global__ void __launch_bounds__(WARP)
    delta_rule(const float* y, const float* beta, const float* alpha, const float* decay, const float* dt, float* pool,
               int stride, const Pass* passes, float* to, int rows, int n_keys, int values, int tiled) {
    start();
    __shared__ float q[COLUMNS], k[COLUMNS];
    int head = blockIdx.x, heads = gridDim.x, value = blockIdx.y * VALUES + lane_id() % VALUES, first = blockIdx.z;
    if (passes[first].source < -1) return;
    bool mine = value < values;
    int keys = n_keys * COLUMNS, channels = 2 * keys + heads * values;
    int key_head = tiled ? head % n_keys : head / (heads / n_keys);
    States states{pool, stride};
    size_t own = static_cast<size_t>(head) * COLUMNS * values + value;
    Head h;
    const float* before = mine ? states.of(passes[first].source) : nullptr;
    h.load(before ? before + own : nullptr, values);
    for (int row = first; row < rows && (row == first || passes[row].source < -1); ++row) {
        const float *yq = y + static_cast<size_t>(row) * channels + key_head * COLUMNS, *yk = yq + keys;
        float of_q = 0, of_k = 0;
        for (int i = lane_id(); i < COLUMNS; i += WARP) {
            of_q = fmaf(yq[i], yq[i], of_q);
            of_k = fmaf(yk[i], yk[i], of_k);
        }
        of_q = 1 / sqrtf((warp_sum(of_q) + 1e-6f) * COLUMNS);
        of_k = 1 / sqrtf(warp_sum(of_k) + 1e-6f);
        __syncthreads();
        for (int i = lane_id(); i < COLUMNS; i += WARP) {
            q[i] = yq[i] * of_q;
            k[i] = yk[i] * of_k;
        }
        __syncthreads();
        size_t at = static_cast<size_t>(row) * heads + head;
        float stays = expf(decay[head] * softplus(alpha[at] + dt[head])), had = 0, out = 0;
        h.each([&](float& x, int i) {
            x *= stays;
            had = fmaf(x, k[i], had);
        });
        float v = mine ? y[static_cast<size_t>(row) * channels + 2 * keys + head * values + value] : 0;
        float change = (v - value_sum(had)) / (1 + expf(-beta[at]));
        h.each([&](float& x, int i) {
            x = fmaf(k[i], change, x);
            out = fmaf(x, q[i], out);
        });
        out = value_sum(out);
        if (!mine) continue;
        if (part() == 0) to[at * values + value] = out;
        if (float* kept = states.of(passes[row].kept)) h.store(kept + own, values);
    }
}
EXPORT(delta_rule)
// resources delta_rule: registers 255, spills 0, shared 2048

// The same of a state-space layer. y: float [rows, channels], values of all heads, then what the groups write by and
// read by; steps: columns of rows that are ldx apart. to: float [rows, heads · values].
extern "C" __global__ void __launch_bounds__(WARP)
    state_space(const float* y, const float* steps, const float* decay, const float* dt, const float* skip, float* pool,
                int stride, const Pass* passes, float* to, int rows, int groups, int values, int ldx, float least,
                float most) {
    start();
    __shared__ float written[COLUMNS], read[COLUMNS];
    int head = blockIdx.x, heads = gridDim.x, value = blockIdx.y * VALUES + lane_id() % VALUES, first = blockIdx.z;
    if (passes[first].source < -1) return;
    bool mine = value < values;
    int all = heads * values, channels = all + 2 * groups * COLUMNS, group = head / (heads / groups);
    States states{pool, stride};
    size_t own = static_cast<size_t>(head) * COLUMNS * values + value;
    Head h;
    const float* before = mine ? states.of(passes[first].source) : nullptr;
    h.load(before ? before + own : nullptr, values);
    for (int row = first; row < rows && (row == first || passes[row].source < -1); ++row) {
        const float* at = y + static_cast<size_t>(row) * channels;
        __syncthreads();
        for (int i = lane_id(); i < COLUMNS; i += WARP) {
            written[i] = at[all + group * COLUMNS + i];
            read[i] = at[all + (groups + group) * COLUMNS + i];
        }
        __syncthreads();
        float step = softplus(steps[static_cast<size_t>(row) * ldx + head] + dt[head]);
        step = fminf(fmaxf(step, least), most);
        float v = mine ? at[head * values + value] : 0, stays = expf(decay[head] * step), change = step * v, out = 0;
        h.each([&](float& x, int i) {
            x = fmaf(x, stays, written[i] * change);
            out = fmaf(x, read[i], out);
        });
        out = value_sum(out);
        if (!mine) continue;
        if (part() == 0) to[static_cast<size_t>(row) * all + head * values + value] = fmaf(skip[head], v, out);
        if (float* kept = states.of(passes[row].kept)) h.store(kept + own, values);
    }
}
EXPORT(state_space)
// resources state_space: registers 255, spills 0, shared 2048
#endif
