#include "thread_pool.h"

#include <unistd.h>

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
    Gate start, finish;
    Job* job = nullptr;  // null: the threads leave
    std::atomic<int> running{0};
    std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(int size) : size_(size < 1 ? 1 : size) {}

ThreadPool::~ThreadPool() {
    if (!shared_ || process_ != getpid()) return;  // after fork the threads live in the parent only
    shared_->job = nullptr;
    shared_->start.open(shared_->start.value() + 1);
    for (auto& t : shared_->threads) t.join();
    delete shared_;
}

void ThreadPool::start() {
    // In a forked child the old state may hold a locked mutex and threads that do not exist: leave it behind.
    shared_ = new Shared;
    process_ = getpid();
    for (int i = 1; i < size_; i++) shared_->threads.emplace_back(worker, shared_, i);
}

void ThreadPool::worker(Shared* shared, int thread) {
    FlushDenormals flush;
    for (uint32_t seen = 0;;) {
        seen = shared->start.wait(seen, kIdleSpin);
        if (!shared->job) return;
        shared->job->work(thread);
        if (shared->running.fetch_sub(1, std::memory_order_acq_rel) == 1) shared->finish.open(seen);
    }
}

void ThreadPool::run(Job& job) {
    FlushDenormals flush;
    if (size_ == 1) return job.work(0);
    if (!shared_ || process_ != getpid()) start();
    const uint32_t turn = shared_->start.value() + 1, before = shared_->finish.value();
    shared_->job = &job;
    shared_->running.store(size_ - 1, std::memory_order_relaxed);
    shared_->start.open(turn);
    job.work(0);
    shared_->finish.wait(before, kIdleSpin);
}

}  // namespace tinychat
