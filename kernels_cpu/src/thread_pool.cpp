#include "thread_pool.h"

#include <unistd.h>

#include <system_error>

namespace tinychat {
namespace {

// A worker keeps its core this long after a step: the next one follows within it while an answer streams.
constexpr std::chrono::microseconds kIdleSpin{300};

class FlushDenormals {
  public:
#if defined(__x86_64__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushDenormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
        __asm__ volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

  private:
    uint64_t saved_;
#endif
};

}  // namespace

struct ThreadPool::Shared {
    static constexpr uint32_t kClosed = 1u << 31;

    Gate start;
    Gate empty;  // opened by the last worker to leave a closed job
    Job* job = nullptr;
    std::atomic<uint32_t> inside{kClosed};  // workers in the job; closed: none may enter
    std::atomic<bool> quit{false};
    std::vector<std::thread> threads;

    bool enter() {
        uint32_t n = inside.load(std::memory_order_relaxed);
        do {
            if (n & kClosed) return false;
        } while (!inside.compare_exchange_weak(n, n + 1, std::memory_order_acquire, std::memory_order_relaxed));
        return true;
    }
    void leave() {
        if (inside.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) empty.open(empty.value() + 1);
    }
};

ThreadPool::ThreadPool(int size) : size_(size < 1 ? 1 : size) {}

ThreadPool::~ThreadPool() {
    if (!shared_ || process_ != getpid()) return;  // after fork the threads live in the parent only
    shared_->quit.store(true);
    shared_->start.open(shared_->start.value() + 1);
    for (auto& t : shared_->threads) t.join();
    delete shared_;
}

void ThreadPool::start() {
    // In a forked child the old state may hold a locked mutex and threads that do not exist: leave it behind.
    shared_ = new Shared;
    process_ = getpid();
    try {
        for (int i = 1; i < size_; i++) shared_->threads.emplace_back(worker, shared_, i);
    } catch (const std::system_error&) {
        // The system gives no more (ulimit -u, -v): those that there are do the work, with the same result.
    }
}

void ThreadPool::worker(Shared* shared, int thread) {
    FlushDenormals flush;
    for (uint32_t seen = 0;;) {
        seen = shared->start.wait(seen, kIdleSpin);
        if (shared->quit.load()) return;
        if (!shared->enter()) continue;  // too late: the others have done it
        shared->job->work(thread);
        shared->leave();
    }
}

void ThreadPool::run(Job& job) {
    FlushDenormals flush;
    if (size_ == 1) return job.work(0);
    if (!shared_ || process_ != getpid()) start();
    const uint32_t before = shared_->empty.value();
    shared_->job = &job;
    shared_->inside.store(0, std::memory_order_release);
    shared_->start.open(shared_->start.value() + 1);
    job.work(0);
    if (shared_->inside.fetch_or(Shared::kClosed, std::memory_order_acq_rel) != 0)
        shared_->empty.wait(before, kIdleSpin);
}

}  // namespace tinychat
