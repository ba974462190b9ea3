// Which experts each row takes, who takes each expert, and what becomes of their results. A pair is a row with an
// expert that it takes: row · taken + place.
#include "keys.cuh"

constexpr int THREADS = 1024;  // of `route`
constexpr int PLAIN = 256;     // of the others
constexpr int MOST = 1024;     // experts
constexpr int TAKEN = 64;      // of a row, at most
constexpr int GROUPS = 64;     // of experts, at most

// How a row's experts are chosen and weighed (`Ops.route`). bias, each: [experts], or null.
struct Rule {
    int normalize, sigmoid;
    float scale;
    const float *bias, *each;
    int groups, taken_groups;
};

// The largest key of a warp's lanes, on all of them.
DEVICE u64 largest(u64 key) {
    for (int mask = WARP / 2; mask; mask /= 2) {
        u64 other = shuffle_xor(key, mask);
        key = other > key ? other : key;
    }
    return key;
}

// One row's scores, as a warp sees them.
struct Scores {
    const float* scores;
    int experts;
    Rule rule;
    float most, all;  // the largest, and the sum of exp(score - most)

    // σ(score), or exp(score) as its share of all experts'.
    DEVICE_MEMBER float weight(int e) const {
        return rule.sigmoid ? 1 / (1 + expf(-scores[e])) : expf(scores[e] - most) / all;
    }

    // What experts are compared by.
    DEVICE_MEMBER u64 key(int e) const {
        if (rule.bias) return key_of(weight(e) + rule.bias[e], e);
        return key_of(rule.sigmoid ? weight(e) : scores[e], e);
    }

    // The largest key below `last` of the experts first … end - 1.
    DEVICE_MEMBER u64 best(int first, int end, u64 last) const {
        u64 best = 0;
        for (int e = first + lane_id(); e < end; e += WARP) {
            u64 k = key(e);
            if (k < last && k > best) best = k;
        }
        return largest(best);
    }

    // A bit for each group that the row takes: those with the largest weight, or sum of two with their bias.
    DEVICE_MEMBER u64 groups() const {
        int size = experts / rule.groups;
        u64 own[GROUPS / WARP] = {}, taken = 0;
        for (int g = 0; g < rule.groups; ++g) {
            u64 one = best(g * size, (g + 1) * size, ~0ull);
            float sum = value_of(one);
            if (rule.bias && size > 1) sum += value_of(best(g * size, (g + 1) * size, one));
#pragma unroll
            for (int i = 0; i < GROUPS / WARP; ++i)
                if (g == i * WARP + lane_id()) own[i] = key_of(sum, g);
        }
        for (int i = 0; i < rule.taken_groups; ++i) {
            u64 best = 0;
#pragma unroll
            for (u64 k : own) best = k > best && !(taken >> id_of(k) & 1) ? k : best;
            taken |= 1ull << id_of(largest(best));
        }
        return taken;
    }
};

// The `taken` first experts of a row, lowest expert first among equals, and their weights. Every lane of a warp takes
// part.
DEVICE void choose(const float* row, int experts, int taken, Rule rule, int* chosen, float* weights) {
    int lane = lane_id();
    Scores s{row, experts, rule, 0, 0};
    u64 top = 0;
    for (int e = lane; e < experts; e += WARP) {
        u64 k = key_of(row[e], e);
        top = k > top ? k : top;
    }
    s.most = value_of(largest(top));
    for (int e = lane; e < experts; e += WARP) s.all += expf(row[e] - s.most);
    s.all = warp_sum(s.all);
    u64 seen = rule.groups > 1 ? s.groups() : ~0ull, last = ~0ull;
    int size = experts / rule.groups;
    float own[TAKEN / WARP] = {}, total = 0;
    for (int place = 0; place < taken; ++place) {
        u64 best = 0;
        for (int e = lane; e < experts; e += WARP) {
            u64 key = rule.groups > 1 && !(seen >> (e / size) & 1) ? key_of(-INFINITY, e) : s.key(e);
            if (key < last && key > best) best = key;
        }
        best = largest(best);
        int expert = id_of(best);
        float weight = s.weight(expert);
        total += weight;
        if (lane == 0) chosen[place] = expert;
        if (rule.each) weight *= rule.each[expert];
#pragma unroll
        for (int i = 0; i < TAKEN / WARP; ++i)
            if (place == i * WARP + lane) own[i] = weight;
        last = best;
    }
    if (rule.sigmoid) total += 1e-6f;
#pragma unroll
    for (int i = 0; i < TAKEN / WARP; ++i)
        if (i * WARP + lane < taken) weights[i * WARP + lane] = (rule.normalize ? own[i] / total : own[i]) * rule.scale;
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
          int normalize, int sigmoid, float scale, const float* bias, const float* each, int groups, int taken_groups,
          int columns, int pieces) {
    start();
    Rule rule{normalize, sigmoid, scale, bias, each, groups, taken_groups};
    __shared__ int sums[2][THREADS];  // pairs and pieces of the experts so far
    __shared__ int next[MOST];        // where an expert's next pair goes
    int thread = threadIdx.x, all = rows * taken;
    next[thread] = 0;
    for (int row = warp_id(); row < rows; row += THREADS / WARP)
        choose(scores + static_cast<size_t>(row) * experts, experts, taken, rule, chosen + row * taken,
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
// resources route: registers 64, spills 48, stack 48, shared 12288

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
