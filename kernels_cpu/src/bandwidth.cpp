#include "bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace tinychat {
namespace {

// Sum of all 64-bit words of p[0 … n), n a multiple of 256. Generic vectors: the baseline of any architecture already
// reads faster than memory delivers, given a prefetch a few lines ahead.
typedef uint64_t Vec __attribute__((vector_size(32)));

uint64_t sum(const char* p, size_t n) {
    const Vec* v = reinterpret_cast<const Vec*>(p);
    Vec a{}, b{}, c{}, d{};
    for (size_t i = 0; i < n / sizeof(Vec); i += 8) {
        __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 2048);
        __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 2048 + 64);
        __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 2048 + 128);
        __builtin_prefetch(reinterpret_cast<const char*>(v + i) + 2048 + 192);
        a += v[i] + v[i + 1];
        b += v[i + 2] + v[i + 3];
        c += v[i + 4] + v[i + 5];
        d += v[i + 6] + v[i + 7];
    }
    a += b + c + d;
    return a[0] + a[1] + a[2] + a[3];
}

}  // namespace

double read_bandwidth(int threads, size_t bytes, int rounds) {
    threads = std::max(1, threads);
    size_t part = std::max<size_t>(4096, bytes / threads / 4096 * 4096), total = part * threads;
    void* map = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(map, total, MADV_HUGEPAGE);
#endif
    char* p = static_cast<char*>(map);
    memset(p, 1, total);
    std::atomic<uint64_t> sink{0};
    double best = 0;
    for (int r = 0; r < rounds; r++) {
        auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> workers;
        for (int t = 0; t < threads; t++) {
            auto read = [&, t] { sink += sum(p + t * part, part); };
            try {
                workers.emplace_back(read);
            } catch (const std::system_error&) {
                read();  // the system gives no more threads
            }
        }
        for (auto& w : workers) w.join();
        double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = std::max(best, total / s / 1e9);
    }
    munmap(map, total);
    return best;
}

}  // namespace tinychat
