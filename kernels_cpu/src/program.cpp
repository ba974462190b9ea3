#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "program_ops.h"

namespace tinychat {

// At a barrier the other thread is a chunk away at most; longer means that it lost its core.
constexpr std::chrono::microseconds kBarrierSpin{200};

Arena::~Arena() {
    for (auto& m : maps_) munmap(m.first, m.second);
}

void* Arena::take(size_t bytes) {
    bytes = round_up(std::max<size_t>(bytes, 1), 4096);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    maps_.emplace_back(p, bytes);
    return p;
}

Program::Program(IsaKind isa, int threads, int max_rows, int act_bits)
    : k_(kernels_for(isa)),
      max_rows_(static_cast<int>(round_up(max_rows, kRowBlock))),
      act_bits_(act_bits),
      pool_(threads),
      ranges_(pool_.size()) {
    scratch_.resize(pool_.size(), nullptr);
}

float* Program::floats(int cols) {
    return static_cast<float*>(arena_.take(static_cast<size_t>(max_rows_) * cols * sizeof(float)));
}

Activations* Program::activations(int k, bool as_float, bool as_int) {
    auto a = std::make_unique<Activations>();
    a->k = k;
    a->bits = act_bits_;
    if (as_float) a->f = floats(k);
    if (as_int) {
        const size_t n = static_cast<size_t>(max_rows_) * k;
        a->q = arena_.take(n * (act_bits_ / 8));
        a->scale = static_cast<float*>(arena_.take(n / kActGroup * sizeof(float)));
        a->xsum = static_cast<float*>(arena_.take(n / kActGroup * sizeof(float)));
        a->nsum = static_cast<int32_t*>(arena_.take(n / kActGroup * sizeof(int32_t)));
    }
    activations_.push_back(std::move(a));
    return activations_.back().get();
}

void Program::need_scratch(size_t floats) {
    if (floats <= scratch_floats_) return;
    scratch_floats_ = floats;
    for (auto& s : scratch_) s = static_cast<float*>(arena_.take(floats * sizeof(float)));
}

void Program::embed(const LinearWeights* w, float* out) { add(std::make_unique<EmbedOp>(k_, w, out)); }

float* Program::rope_table(const std::vector<double>& frequencies) {
    float* table = floats(2 * static_cast<int>(frequencies.size()));
    add(std::make_unique<RopeTableOp>(k_, frequencies, table));
    return table;
}

void Program::rms_norm(const float* x, const float* weight, float eps, Activations* out, bool tail) {
    add(std::make_unique<NormOp>(k_, x, weight, eps, out, tail));
}

void Program::quantize(const float* x, const int32_t* perm, Activations* out, bool tail) {
    add(std::make_unique<QuantizeOp>(k_, x, perm, out, tail));
}

void Program::linear(std::vector<LinearPart> parts, float* y, int ldy, const float* add_to) {
    add(std::make_unique<LinearOp>(k_, std::move(parts), y, ldy, add_to));
}

void Program::rope_kv(float* qkv, const float* table, int half, int n_heads, int n_kv, int head_dim, int layer) {
    add(std::make_unique<RopeOp>(k_, qkv, table, half, n_heads, n_kv, head_dim, layer));
}

void Program::attention(const float* qkv, int n_heads, int n_kv, int head_dim, int layer, float* out) {
    need_scratch(attention_scratch(n_heads, n_kv, head_dim));
    auto op = std::make_unique<AttentionOp>(k_, &scratch_, qkv, n_heads, n_kv, head_dim, layer, out);
    AttentionOp* attention = op.get();
    add(std::move(op));
    add(std::make_unique<AttentionMergeOp>(k_, attention));
}

void Program::silu_mul(const float* x, Activations* out) { add(std::make_unique<SiluOp>(k_, x, out)); }

void Program::lm_head(const LinearWeights* w, const Activations* x) {
    need_scratch(static_cast<size_t>(LmHeadOp::kRows) * LmHeadOp::kCols);
    auto op = std::make_unique<LmHeadOp>(k_, &scratch_, w, x);
    LmHeadOp* head = op.get();
    add(std::move(op));
    add(std::make_unique<GreedyOp>(head));
}

void Program::run(StepState step) {
    std::lock_guard<std::mutex> lock(turn_);
    step.kv = &kv_;
    step_ = step;
    for (auto& op : ops_) op->reserve(step_, pool_.size());
    if (timing_) seconds_.assign(ops_.size(), 0.0);
    current_ = static_cast<size_t>(-1);
    first_turn_ = gate_.value();
    pool_.run(*this);
}

// Called by the last thread to arrive, while the others wait: runs the ops that are one piece, then deals out the next.
void Program::advance(int thread) {
    const int threads = pool_.size();
    while (++current_ < ops_.size()) {
        Op& op = *ops_[current_];
        const int n = op.chunks(step_, threads);
        if (n == 0) continue;
        if (n == 1) {
            const auto start = std::chrono::steady_clock::now();
            op.run(step_, 0, thread);
            if (timing_)
                seconds_[current_] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            continue;
        }
        for (int t = 0; t < threads; t++) {
            ranges_[t].next.store(static_cast<int>(static_cast<long long>(n) * t / threads), std::memory_order_relaxed);
            ranges_[t].end = static_cast<int>(static_cast<long long>(n) * (t + 1) / threads);
        }
        return;
    }
}

void Program::work(int thread) {
    const int threads = pool_.size();
    uint32_t turn = first_turn_ + 1;
    if (thread == 0) {  // while the others wake up
        advance(0);
        gate_.open(turn);
    } else {
        gate_.wait(first_turn_, kBarrierSpin);
    }
    while (current_ < ops_.size()) {
        Op& op = *ops_[current_];
        const size_t index = current_;
        const auto start = timing_ ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
        for (int v = 0; v < threads; v++) {  // own range first: it is contiguous in memory; then help the others
            Range& r = ranges_[(thread + v) % threads];
            if (v && r.next.load(std::memory_order_relaxed) >= r.end) continue;
            for (int c; (c = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) op.run(step_, c, thread);
        }
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            if (timing_)
                seconds_[index] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            advance(thread);
            gate_.open(++turn);
        } else {
            turn = gate_.wait(turn, kBarrierSpin);
        }
    }
}

std::vector<std::pair<std::string, double>> Program::timings() const {
    std::vector<std::pair<std::string, double>> out;
    for (size_t i = 0; i < seconds_.size(); i++) out.emplace_back(ops_[i]->name(), seconds_[i]);
    return out;
}

}  // namespace tinychat
