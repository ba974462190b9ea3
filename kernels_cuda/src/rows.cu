// What happens between two linears, one row of activations at a time. Sums run in fp32 in an order that depends on
// nothing but the width, so a row's result does not depend on the others. Each moves its inputs and outputs once.
#include "device.cuh"

constexpr int THREADS = 256;

// The same on every thread. scratch: a float a warp.
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < THREADS / WARP; ++i) sum += scratch[i];
    __syncthreads();
    return sum;
}

// 1 / sqrt(mean(x²) + eps) of n floats.
DEVICE float norm_factor(const float* x, int n, float eps, float* scratch) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum = fmaf(x[i], x[i], sum);
    return 1 / sqrtf(block_sum(sum, scratch) / static_cast<float>(n) + eps);
}

DEVICE float silu(float x) { return x / (1 + expf(-x)); }

// The tanh formula.
DEVICE float gelu(float x) { return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

// to[row] = x[row] / sqrt(mean(x²) + eps) · weight, as halves, zero from n to ld.
// x: float [rows, n]. grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* x, const float* weight, u16* to, int n, int ld, float eps) {
    start();
    __shared__ float scratch[THREADS / WARP];
    x += static_cast<size_t>(blockIdx.x) * n;
    to += static_cast<size_t>(blockIdx.x) * ld;
    float factor = norm_factor(x, n, eps, scratch);
    for (int i = threadIdx.x; i < ld; i += THREADS) to[i] = i < n ? to_half(x[i] * factor * weight[i]) : 0;
}
EXPORT(rms_norm)
// resources rms_norm: registers 40, spills 0, shared 64

// to[row] += the norm of x[row], in floats.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_add(const float* x, const float* weight, float* to, int n, float eps) {
    start();
    __shared__ float scratch[THREADS / WARP];
    x += static_cast<size_t>(blockIdx.x) * n;
    to += static_cast<size_t>(blockIdx.x) * n;
    float factor = norm_factor(x, n, eps, scratch);
    for (int i = threadIdx.x; i < n; i += THREADS) to[i] += x[i] * factor * weight[i];
}
EXPORT(rms_norm_add)
// resources rms_norm_add: registers 40, spills 0, shared 64

// Heads of n floats of x, the first at `offset` of each row, normed in place. grid (rows, heads).
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_heads(float* x, const float* weight, int n, int offset, int ldx, float eps) {
    start();
    __shared__ float scratch[THREADS / WARP];
    x += static_cast<size_t>(blockIdx.x) * ldx + offset + blockIdx.y * n;
    float factor = norm_factor(x, n, eps, scratch);
    for (int i = threadIdx.x; i < n; i += THREADS) x[i] = x[i] * factor * weight[i];
}
EXPORT(norm_heads)
// resources norm_heads: registers 40, spills 0, shared 64

// Groups of n columns of x, normed and times silu(gate), as halves, zero behind them to ld. weight: [weights], again
// and again, or null: no norm; gate: columns of rows that are ldg apart; gated: the gate comes before the norm. grid
// (rows, groups).
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_gated(float* x, const float* weight, const float* gate, u16* to, int n, int weights, int ldg, int ld,
               int gated, float eps) {
    start();
    __shared__ float scratch[THREADS / WARP];
    int group = blockIdx.y, all = gridDim.y * n;
    x += static_cast<size_t>(blockIdx.x) * all + group * n;
    gate += static_cast<size_t>(blockIdx.x) * ldg + group * n;
    to += static_cast<size_t>(blockIdx.x) * ld;
    if (gated)
        for (int i = threadIdx.x; i < n; i += THREADS) x[i] *= silu(gate[i]);
    float factor = weight ? norm_factor(x, n, eps, scratch) : 1;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float y = weight ? x[i] * factor * weight[(group * n + i) % weights] : x[i];
        to[group * n + i] = to_half(gated ? y : y * silu(gate[i]));
    }
    if (group == 0)
        for (int i = all + threadIdx.x; i < ld; i += THREADS) to[i] = 0;
}
EXPORT(norm_gated)
// resources norm_gated: registers 48, spills 0, shared 64

// Columns times a factor each, in place: floats, or halves that are ld apart. grid (⌈n / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS) multiply(float* x, const float* factors, int n) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) x[static_cast<size_t>(blockIdx.y) * n + i] *= factors[i];
}
EXPORT(multiply)
// resources multiply: registers 32, spills 0, shared 0

extern "C" __global__ void __launch_bounds__(THREADS) multiply_halves(u16* x, const float* factors, int n, int ld) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    x += static_cast<size_t>(blockIdx.y) * ld + i;
    *x = to_half(to_float(*x) * factors[i]);
}
EXPORT(multiply_halves)
// resources multiply_halves: registers 32, spills 0, shared 0

// to = f(first half of x) · second half, as halves, zero from n to ld. x: float [rows, 2n]. grid (⌈ld / 256⌉, rows).
template <class F>
DEVICE void gate(const float* x, u16* to, int n, int ld, F f) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= ld) return;
    x += static_cast<size_t>(blockIdx.y) * 2 * n;
    to[static_cast<size_t>(blockIdx.y) * ld + i] = i < n ? to_half(f(x[i]) * x[n + i]) : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(const float* x, u16* to, int n, int ld) {
    start();
    gate(x, to, n, ld, [](float v) { return silu(v); });
}
EXPORT(silu_mul)
// resources silu_mul: registers 40, spills 0, shared 0

extern "C" __global__ void __launch_bounds__(THREADS) gelu_mul(const float* x, u16* to, int n, int ld) {
    start();
    gate(x, to, n, ld, [](float v) { return gelu(v); });
}
EXPORT(gelu_mul)
// resources gelu_mul: registers 40, spills 0, shared 0

// g · σ(alpha · g) · (u + 1), of the halves g, at most `limit`, and u, within ± limit.
extern "C" __global__ void __launch_bounds__(THREADS)
    clamped_mul(const float* x, float limit, float alpha, u16* to, int n, int ld) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= ld) return;
    x += static_cast<size_t>(blockIdx.y) * 2 * n;
    float y = 0;
    if (i < n) {
        float g = fminf(x[i], limit), u = fminf(fmaxf(x[n + i], -limit), limit);
        y = g / (1 + expf(-alpha * g)) * (u + 1);
    }
    to[static_cast<size_t>(blockIdx.y) * ld + i] = to_half(y);
}
EXPORT(clamped_mul)
// resources clamped_mul: registers 40, spills 0, shared 0

// max(x, 0)², as halves, zero from n to ld. x: float [rows, n]. grid (⌈ld / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS) relu_square(const float* x, u16* to, int n, int ld) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= ld) return;
    float y = i < n ? fmaxf(x[static_cast<size_t>(blockIdx.y) * n + i], 0.0f) : 0;
    to[static_cast<size_t>(blockIdx.y) * ld + i] = to_half(y * y);
}
EXPORT(relu_square)
// resources relu_square: registers 32, spills 0, shared 0

// x *= σ(gate), halves in place; each of a row's n / share gates is for `share` neighbours. grid (⌈n / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS) sigmoid_mul(const float* gate, u16* x, int n, int ld, int share) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float g = gate[static_cast<size_t>(blockIdx.y) * (n / share) + i / share];
    x += static_cast<size_t>(blockIdx.y) * ld + i;
    *x = to_half(to_float(*x) / (1 + expf(-g)));
}
EXPORT(sigmoid_mul)
// resources sigmoid_mul: registers 32, spills 0, shared 0

// Rows of n floats whose first `queries` are heads of `size` with as many gates behind each, apart: to heads [rows,
// n - queries / 2], which also get what stands behind the queries, and gates [rows, queries / 2]. grid (⌈n / 256⌉,
// rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    split_gates(const float* x, float* heads, float* gates, int n, int queries, int size) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    size_t row = blockIdx.y;
    float value = x[row * n + i];
    int head = i / (2 * size), at = i % (2 * size), half = queries / 2;
    if (i >= queries)
        heads[row * (n - half) + i - half] = value;
    else if (at < size)
        heads[row * (n - half) + head * size + at] = value;
    else
        gates[row * half + head * size + at - size] = value;
}
EXPORT(split_gates)
// resources split_gates: registers 40, spills 0, shared 0

// Floats to the halves that a linear reads, in its order (perm, or null). grid (⌈ld / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS) halve(const float* x, const int* perm, u16* to, int n, int ld) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= ld) return;
    x += static_cast<size_t>(blockIdx.y) * n;
    to[static_cast<size_t>(blockIdx.y) * ld + i] = i < n ? to_half(x[perm ? perm[i] : i]) : 0;
}
EXPORT(halve)
// resources halve: registers 32, spills 0, shared 0

// Halves in another order: to[i] = x[perm[i]]. Both [rows, ld]. grid (⌈ld / 256⌉, rows).
extern "C" __global__ void __launch_bounds__(THREADS) reorder(const u16* x, const int* perm, u16* to, int n, int ld) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= ld) return;
    size_t row = static_cast<size_t>(blockIdx.y) * ld;
    to[row + i] = i < n ? x[row + perm[i]] : 0;
}
EXPORT(reorder)
// resources reorder: registers 32, spills 0, shared 0

// Rows of halves, picked: to[i] = x[rows[i]], all of them ld long. grid (⌈ld / 256⌉, picked rows).
extern "C" __global__ void __launch_bounds__(THREADS) pick_rows(const u16* x, const int* rows, u16* to, int ld) {
    start();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= ld) return;
    to[static_cast<size_t>(blockIdx.y) * ld + i] = x[static_cast<size_t>(rows[blockIdx.y]) * ld + i];
}
EXPORT(pick_rows)
// resources pick_rows: registers 32, spills 0, shared 0
