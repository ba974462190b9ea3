// Persistent threads that run one function together, and the gate that they wait at.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tinychat {

inline void cpu_relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// A number that threads wait on to change: a bounded spin, because inside a step the wait is shorter than a system
// call, then sleep, because the thread waited for may have lost its core.
class Gate {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    // An exchange, not a store: either this sees the sleeper or the sleeper sees the value, and qemu (7.2, on x86)
    // lets a load overtake a sequentially consistent store of AArch64. On x86 both compile to the same instruction.
    void open(uint32_t value) {
        value_.exchange(value, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
        std::lock_guard<std::mutex> lock(mutex_);
        changed_.notify_all();
    }

    // Returns the value once it is not `old`.
    uint32_t wait(uint32_t old, std::chrono::microseconds spin) {
        for (int i = 0; i < 200; i++) {
            if (uint32_t v = value(); v != old) return v;
            cpu_relax();
        }
        const auto until = std::chrono::steady_clock::now() + spin;
        do {
            for (int i = 0; i < 50; i++) {
                if (uint32_t v = value(); v != old) return v;
                cpu_relax();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != old; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        return value();
    }

  private:
    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

// Work that all threads of a pool enter together.
class Job {
  public:
    virtual ~Job() = default;
    virtual void work(int thread) = 0;  // thread: 0 (the caller) … size - 1
};

// `size - 1` threads beside the caller. Not thread-safe: the owner serialises run().
// Denormals are flushed to zero in every thread that works, and the caller's setting is restored.
class ThreadPool {
  public:
    explicit ThreadPool(int size);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }
    void run(Job& job);

  private:
    struct Shared;
    static void worker(Shared* shared, int thread);
    void start();

    int size_;
    int process_ = 0;
    Shared* shared_ = nullptr;
};

}  // namespace tinychat
