// What of a row of logits goes back to the host: the id of the largest, or the largest few. A block of 1024 threads a
// row of n floats, which lies in L2; argmax reads it once, largest twice.
#include "keys.cuh"

constexpr int THREADS = 1024;
constexpr int LARGEST = 256;

// The largest of each row of n logits, the lowest id on a tie; -1 where one is NaN or infinite, or none is finite.
// grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS) argmax(const float* x, int* to, int n) {
    start();
    __shared__ float values[THREADS];
    __shared__ int ids[THREADS];
    x += static_cast<size_t>(blockIdx.x) * n;
    float best = -INFINITY;
    int id = n;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        if (!(x[i] < INFINITY)) best = INFINITY, id = -1;  // nothing is larger, and no id lower
        if (x[i] > best) best = x[i], id = i;
    }
    values[threadIdx.x] = best;
    ids[threadIdx.x] = id;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        int i = threadIdx.x, j = i + half;
        if (i >= half) continue;
        if (values[j] > values[i] || (values[j] == values[i] && ids[j] < ids[i])) {
            values[i] = values[j];
            ids[i] = ids[j];
        }
    }
    if (threadIdx.x == 0) to[blockIdx.x] = ids[0] < n ? ids[0] : -1;
}
EXPORT(argmax)
// resources argmax: registers 48, spills 0, shared 8192

// A key a thread, best first (bitonic). Everything written before is seen, and everything sorted after.
DEVICE void sort(u64* keys) {
    int i = threadIdx.x;
    for (int size = 2; size <= THREADS; size *= 2)
        for (int distance = size / 2; distance; distance /= 2) {
            __syncthreads();
            int j = i ^ distance;
            if (j < i) continue;
            u64 a = keys[i], b = keys[j];
            if ((a < b) == !(i & size)) keys[i] = b, keys[j] = a;
        }
    __syncthreads();
}

// The LARGEST largest of a row, in the order of key_of, and the sum of exp((x - largest) · inverse temperature), 0
// where that is 0: a number for each row.
//   to  int32 [rows, 2 LARGEST + 2]: ids, bits of their values, how many there are, bits of the sum (or 0). grid: rows.
// Each thread finds the best of its n / 1024 logits. The LARGEST-th of those 1024 is not before the row's LARGEST-th,
// so what comes after it is not needed. About 300 logits are left where they lie at random; they are sorted. Should
// more than 1024 be left, there are none (0), and the host reads the row.
extern "C" __global__ void __launch_bounds__(THREADS)
    largest(const float* inverse_temperatures, const float* x, int* to, int n) {
    start();
    __shared__ u64 keys[THREADS];
    __shared__ float sums[THREADS / WARP];
    __shared__ int left;
    x += static_cast<size_t>(blockIdx.x) * n;
    to += static_cast<size_t>(blockIdx.x) * (2 * LARGEST + 2);
    float factor = inverse_temperatures[blockIdx.x];
    int thread = threadIdx.x;
    u64 best = 0;
    for (int i = thread; i < n; i += THREADS) {
        u64 key = key_of(x[i], i);
        best = key > best ? key : best;
    }
    keys[thread] = best;
    if (thread == 0) left = 0;
    sort(keys);
    u64 edge = keys[LARGEST - 1];
    float most = value_of(keys[0]), sum = 0;
    __syncthreads();
    keys[thread] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += THREADS) {
        if (factor != 0) sum += expf((x[i] - most) * factor);
        u64 key = key_of(x[i], i);
        if (key < edge) continue;
        int at = add_together(&left, 1);
        if (at < THREADS) keys[at] = key;
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
    sort(keys);
    if (thread < LARGEST) {
        to[thread] = id_of(keys[thread]);
        to[LARGEST + thread] = static_cast<int>(bits_of(value_of(keys[thread])));
    }
    if (thread) return;
    for (int i = 1; i < THREADS / WARP; ++i) sum += sums[i];
    to[2 * LARGEST] = left > THREADS ? 0 : left < LARGEST ? left : LARGEST;
    to[2 * LARGEST + 1] = static_cast<int>(bits_of(sum));
}
EXPORT(largest)
// resources largest: registers 48, spills 0, shared 8324
