#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "attention_ops.h"
#include "expert_ops.h"
#include "latent_ops.h"
#include "program_ops.h"
#include "state_ops.h"

namespace tinychat {

// At a barrier the other thread is a chunk away at most; longer means that it lost its core.
constexpr std::chrono::microseconds kBarrierSpin{200};

// Weights of the next linear that a waiting thread fetches into its L2 cache: what memory delivers in a few
// microseconds.
constexpr size_t kAheadBytes = 96 << 10;
constexpr int kAheadRows = 16;  // decode and verification; in prefill memory is not what is waited for

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

Program::Program(IsaKind isa, int threads, int max_rows)
    : k_(kernels_for(isa)),
      max_rows_(static_cast<int>(round_up(max_rows, kRowBlock))),
      pool_(threads),
      ranges_(pool_.size()) {
    scratch_.resize(pool_.size(), nullptr);
}

float* Program::floats(int cols, int rows) {
    return static_cast<float*>(arena_.take(static_cast<size_t>(rows ? rows : max_rows_) * cols * sizeof(float)));
}

Routing* Program::routing(int n_experts, int taken) {
    routings_.push_back(std::make_unique<Routing>(n_experts, taken, max_rows_));
    return routings_.back().get();
}

Activations* Program::activations(int k, bool as_float, int bits, int group, int rows) {
    auto a = std::make_unique<Activations>();
    a->k = k;
    a->bits = bits ? bits : 8;
    if (as_float) a->f = floats(k, rows);
    if (bits) {
        const size_t n = round_up(rows ? rows : max_rows_, kRowBlock) * k;
        a->q = arena_.take(n * (bits / 8));
        a->scale = static_cast<float*>(arena_.take(n / kActGroup * sizeof(float)));
        a->group = group;
        a->gsum = static_cast<float*>(arena_.take(n / group * sizeof(float)));
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

void Program::embed(const LinearWeights* w, float* out, float scale, const float* added, float factor) {
    add(std::make_unique<EmbedOp>(k_, w, out, scale, added, factor));
}

float* Program::rope_table(const std::vector<double>& frequencies, double magnitude) {
    float* table = floats(2 * static_cast<int>(frequencies.size()));
    add(std::make_unique<RopeTableOp>(k_, frequencies, magnitude, table));
    return table;
}

void Program::rms_norm(const float* x, const float* weight, float eps, Activations* out, bool tail) {
    add(std::make_unique<NormOp>(k_, x, weight, eps, out, nullptr, tail));
}

void Program::rms_norm_add(const float* x, const float* weight, float eps, float* y, int k) {
    auto out = std::make_unique<Activations>();
    out->f = y, out->k = k;
    add(std::make_unique<NormOp>(k_, x, weight, eps, out.get(), y, false));
    activations_.push_back(std::move(out));
}

void Program::rms_norm_rows(float* x, const float* weight, float eps, int k) {
    auto out = std::make_unique<Activations>();
    out->f = x, out->k = k;
    add(std::make_unique<NormOp>(k_, x, weight, eps, out.get(), nullptr, false));
    activations_.push_back(std::move(out));
}

void Program::norm_heads(const HeadNormArgs& args) { add(std::make_unique<HeadNormOp>(k_, args)); }

void Program::quantize(const float* x, const int32_t* perm, Activations* out, bool tail) {
    add(std::make_unique<QuantizeOp>(k_, x, perm, out, tail));
}

void Program::linear(std::vector<LinearPart> parts, float* y, int ldy, const float* add_to) {
    need_scratch(LinearOp::gate_scratch());
    auto op = std::make_unique<LinearOp>(k_, &scratch_, std::move(parts), y, ldy, add_to);
    last_linear_ = op.get();
    add(std::move(op));
}

void Program::head_linear(const LinearWeights* w, int heads, const float* x, int width, const int32_t* perm,
                          const Activations* in, float* y) {
    const int n = w->n / heads, rows = static_cast<int>(round_up(max_rows_, kRowBlock));
    std::vector<const Activations*> inputs;
    std::vector<LinearPart> parts;
    for (int h = 0; h < heads; h++) {
        activations_.push_back(std::make_unique<Activations>(in->from_row(h * rows)));
        head_weights_.push_back(std::make_unique<LinearWeights>(w->from_tile(h * n / kTile)));
        head_weights_.back()->n = n;
        inputs.push_back(activations_.back().get());
        parts.push_back({head_weights_.back().get(), inputs.back(), h * n});
    }
    other(head_input_op(k_, x, width, perm, std::move(inputs)));
    linear(std::move(parts), y, w->n, nullptr);
}

void Program::note_use(const AttentionLayer& at, int reach) {
    if (at.memory >= static_cast<int>(uses_.size())) uses_.resize(at.memory + 1);
    MemoryUse& use = uses_[at.memory];
    use = {std::max(use.layers, at.layer + 1), at.n_kv, at.head_dim, std::max(use.reach, reach), at.tail};
    use.latent = at.latent;
    if (at.tail < 0) return;
    if (at.tail >= static_cast<int>(uses_.size())) uses_.resize(at.tail + 1);
    MemoryUse& tail = uses_[at.tail];
    tail = {std::max(tail.layers, at.layer + 1), at.n_kv, at.head_dim, 0, -1, true};
}

void Program::rotate(const RotateArgs& args) { add(std::make_unique<RotateOp>(k_, args)); }

void Program::rope_kv(const AttentionLayer& at, float* qkv, const float* table, int half) {
    note_use(at, 1);
    add(std::make_unique<RopeOp>(k_, at, qkv, table, half, &attention_));
    if (at.tail >= 0 && !at.shared) add(std::make_unique<PackKvOp>(k_, at, &attention_));
}

void Program::attention(const AttentionLayer& at, const float* qkv, float* out) {
    note_use(at, at.window ? at.window : std::numeric_limits<int>::max());
    need_scratch(attention_scratch(at));
    auto op = std::make_unique<AttentionOp>(k_, &scratch_, &attention_, at, qkv, out);
    const AttentionOp* attention = op.get();
    add(std::move(op));
    add(std::make_unique<AttentionMergeOp>(attention));
}

void Program::set_kv(int memory, const KvPool& kv) {
    std::lock_guard<std::mutex> lock(turn_);
    if (memory >= static_cast<int>(pools_.size())) pools_.resize(memory + 1);
    pools_[memory] = kv;
}

void Program::gate_mul(const float* x, Activations* out, const GateFunction& f, const Routing* routing, const float* up,
                       size_t ld_up) {
    const bool fused = !routing && !up && last_linear_ && last_linear_->fuse_gate(x, out, f);
    add(std::make_unique<GateOp>(k_, x, out, f, routing, fused ? last_linear_ : nullptr, up, ld_up));
}

void Program::route(const float* scores, Routing* routing, const RouteRule& rule) {
    add(std::make_unique<RouteOp>(scores, routing, rule));
}

void Program::expert_input(const Routing* routing, const float* x, bool from_rows,
                           std::vector<std::vector<ExpertInput>> inputs) {
    add(std::make_unique<ExpertInputOp>(k_, routing, x, from_rows, std::move(inputs)));
}

void Program::expert_linear(const Routing* routing, std::vector<std::vector<LinearPart>> parts, float* y, int ldy) {
    add(std::make_unique<ExpertLinearOp>(k_, routing, std::move(parts), y, ldy));
}

void Program::expert_sum(const Routing* routing, const float* x, float* y, int cols, bool onto) {
    add(std::make_unique<ExpertSumOp>(routing, x, y, cols, onto));
}

void Program::repeat_columns(const float* x, int cols, int last, float* y) {
    add(std::make_unique<RepeatColumnsOp>(x, cols, last, y));
}

void Program::scale_rows(float* x, int cols, const float* by) { add(std::make_unique<ScaleRowsOp>(x, cols, by)); }

void Program::note_use(const StateLayer& at) {
    if (at.memory >= static_cast<int>(uses_.size())) uses_.resize(at.memory + 1);
    MemoryUse& use = uses_[at.memory];
    use.layers = std::max(use.layers, at.layer + 1), use.state = at.floats;
}

void Program::short_conv(const StateLayer& at, const float* x, const float* weight, int channels, int width, float* y) {
    note_use(at);
    ConvArgs args{};
    args.in = x, args.out = x + channels, args.x = x + 2 * channels, args.ld = static_cast<size_t>(3) * channels;
    args.weight = weight, args.channels = channels, args.width = width, args.y = y, args.ldy = channels;
    add(std::make_unique<ConvOp>(k_, args, at, 0));
}

void Program::delta_rule(const StateLayer& state, const DeltaLayer& at, const float* x, const float* weight, int width,
                         const DeltaGateArgs& gates, float* y) {
    note_use(state);
    need_scratch(DeltaOp::scratch(at));
    const int channels = at.channels();
    ConvArgs conv{};
    conv.x = x, conv.ld = channels, conv.weight = weight, conv.channels = channels, conv.width = width;
    conv.silu = true, conv.y = gates.qkv, conv.ldy = channels;
    add(std::make_unique<ConvOp>(k_, conv, state, static_cast<size_t>(at.values()) * at.key_dim));
    add(std::make_unique<DeltaGateOp>(k_, gates));
    DeltaArgs args{};
    args.at = at, args.qkv = gates.qkv, args.gates = gates.gates, args.y = y;
    add(std::make_unique<DeltaOp>(k_, &scratch_, args, state));
}

void Program::mamba(const StateLayer& state, const MambaArgs& args, ConvArgs conv, const MambaGateArgs& gates) {
    note_use(state);
    need_scratch(MambaOp::scratch(args.at));
    conv.channels = args.at.channels(), conv.silu = true, conv.ldy = conv.channels;
    add(std::make_unique<ConvOp>(k_, conv, state, static_cast<size_t>(args.at.values()) * args.at.state));
    add(std::make_unique<MambaGateOp>(k_, gates));
    add(std::make_unique<MambaOp>(k_, &scratch_, args, state));
}

void Program::gated_norm(const GatedNormArgs& args) { add(std::make_unique<GatedNormOp>(k_, args)); }

void Program::sigmoid_mul(const SigmoidArgs& args) { add(std::make_unique<SigmoidOp>(k_, args)); }

void Program::split_gates(const float* x, int heads, int dim, int rest, float* qkv, float* gates) {
    add(std::make_unique<SplitGatesOp>(x, heads, dim, rest, qkv, gates));
}

void Program::carry(const StateLayer& at, const float* x, float* y) {
    note_use(at);
    add(std::make_unique<CarryOp>(at, x, y));
}

void Program::join(const float* a, int n, const float* b, int m, float* y) {
    add(std::make_unique<JoinOp>(a, n, b, m, y));
}

void Program::set_states(int memory, const StatePool& states) {
    std::lock_guard<std::mutex> lock(turn_);
    if (memory >= static_cast<int>(states_.size())) states_.resize(memory + 1);
    states_[memory] = states;
}

void Program::lm_head(const LinearWeights* w, const Activations* x, float scale, float cap) {
    need_scratch(static_cast<size_t>(LmHeadOp::kRows) * LmHeadOp::kCols);
    auto op = std::make_unique<LmHeadOp>(k_, &scratch_, w, x, scale, cap);
    LmHeadOp* head = op.get();
    add(std::move(op));
    add(std::make_unique<GreedyOp>(head));
}

void Program::open_blocks(int memory, const int32_t* blocks, const int32_t* exact, int n) {
    std::lock_guard<std::mutex> lock(turn_);
    const KvPool &kv = pools_[memory], &tail = pools_[use(memory).tail];
    for_heads(kv, [&](int layer, int head) {
        for (int i = 0; i < n; i++) k_.open_block({&kv, &tail, blocks[i], exact[i], layer, head});
    });
}

void Program::move_slots(int memory, const int32_t* blocks, const int32_t* src, const int32_t* dst, int n, int slots,
                         const int32_t* exact) {
    std::lock_guard<std::mutex> lock(turn_);
    const KvPool& kv = pools_[memory];
    if (kv.bits == 4) {
        const ExactForms forms = exact_forms(memory, exact);
        for_heads(kv, [&](int layer, int head) {
            const size_t at = (static_cast<size_t>(layer) * kv.n_kv + head) * n;
            k_.move_slots({&kv, forms, blocks, layer, head, slots, n, src + at, dst + at});
        });
        return;
    }
    const size_t element = kv.bits / 8, row = kv.padded_dim() * element;
    for (int layer = 0; layer < kv.n_layers; layer++)
        for (int head = 0; head < kv.n_kv; head++)
            for (int i = 0; i < n; i++) {
                const size_t at = (static_cast<size_t>(layer) * kv.n_kv + head) * n + i;
                if (src[at] < 0) continue;
                const int a = src[at] % kBlockSlots, b = dst[at] % kBlockSlots;
                const int from = blocks[src[at] / kBlockSlots], to = blocks[dst[at] / kBlockSlots];
                uint8_t *ka = kv.keys(from, layer, head), *kb = kv.keys(to, layer, head);
                uint8_t *va = kv.values(from, layer, head), *vb = kv.values(to, layer, head);
                for (int d = 0; d < kv.padded_dim(); d++)
                    memcpy(kb + (d * kBlockSlots + b) * element, ka + (d * kBlockSlots + a) * element, element);
                if (!kv.latent) memcpy(vb + b * row, va + a * row, row);
                if (kv.bits == 16) continue;
                for (int g = 0; g < kv.groups(); g++) {
                    const size_t scales = kv.code_bytes() + g * kBlockSlots * sizeof(uint16_t);
                    memcpy(kb + scales + b * sizeof(uint16_t), ka + scales + a * sizeof(uint16_t), sizeof(uint16_t));
                    if (kv.latent) continue;
                    memcpy(vb + scales + b * sizeof(uint16_t), va + scales + a * sizeof(uint16_t), sizeof(uint16_t));
                }
            }
}

void Program::turn_keys(int memory, const int32_t* blocks, const double* freq, int half, const int32_t* delta, int n,
                        const int32_t* exact) {
    std::lock_guard<std::mutex> lock(turn_);
    const KvPool& kv = pools_[memory];
    const ExactForms forms = exact_forms(memory, exact);
    for (int layer = 0; layer < kv.n_layers; layer++)
        for (int head = 0; head < kv.n_kv; head++)
            k_.turn_keys({&kv, forms, blocks, freq, half, layer, head, n,
                          delta + (static_cast<size_t>(layer) * kv.n_kv + head) * n});
}

void Program::value_spread(int memory, const int32_t* blocks, const float* weights, float* out, int n,
                           const int32_t* exact) {
    std::lock_guard<std::mutex> lock(turn_);
    const KvPool& kv = pools_[memory];
    const ExactForms forms = exact_forms(memory, exact);
    for_heads(kv, [&](int layer, int head) {
        const size_t at = (static_cast<size_t>(layer) * kv.n_kv + head) * n;
        k_.value_spread({&kv, forms, blocks, layer, head, n, weights + at, out + at});
    });
}

ExactForms Program::exact_forms(int memory, const int32_t* exact) const {
    return exact ? ExactForms{&pools_[use(memory).tail], exact} : ExactForms{};
}

template <class Work>
void Program::for_heads(const KvPool& kv, Work work) {
    struct Heads final : Job {
        Heads(const KvPool& kv, Work& each) : kv(kv), each(each) {}
        void work(int) override {
            for (int i = next++; i < kv.n_layers * kv.n_kv; i = next++) each(i / kv.n_kv, i % kv.n_kv);
        }
        const KvPool& kv;
        Work& each;
        std::atomic<int> next{0};
    } job(kv, work);
    pool_.run(job);
}

void Program::run(StepState& step, int part) {
    std::lock_guard<std::mutex> lock(turn_);
    step.pools = pools_.data(), step.states = states_.data();
    int scratch = 0;
    for (size_t i = 0; i < step.spans.size(); i++)
        for (int m = 0; m < static_cast<int>(uses_.size()); m++) {
            if (uses_[m].tail < 0) continue;
            SpanSlots& slots = step.slots_of(i, m);
            slots.scratch = scratch;
            const int end = slots.length + step.spans[i].rows;
            scratch += (end + kBlockSlots - 1) / kBlockSlots - slots.length / kBlockSlots;
        }
    const size_t exact = attention_.exact_bytes * scratch + 64;
    for (auto& blocks : attention_.exact)
        if (blocks.size() < exact) blocks.resize(exact + exact / 2);
    step_ = &step;
    end_ = part + 1 < parts() ? parts_[part + 1] : ops_.size();
    for (size_t i = parts_[part]; i < end_; i++) ops_[i]->reserve(step, pool_.size());
    if (timing_) seconds_.assign(ops_.size(), 0.0);
    current_ = parts_[part] - 1;
    finished_.store(false, std::memory_order_relaxed);
    pool_.run(*this);
}

// Called by the thread that finished an op, while the others wait: runs the ops that are one piece, then deals out the
// next.
void Program::advance(int thread, uint32_t turn) {
    const int threads = pool_.size();
    while (++current_ < end_) {
        Op& op = *ops_[current_];
        const int n = op.chunks(*step_, threads);
        if (n == 0) continue;
        if (timing_) started_ = std::chrono::steady_clock::now();
        if (n == 1) {
            op.run(*step_, 0, thread);
            note_time();
            continue;
        }
        total_ = n;
        done_.store(0, std::memory_order_relaxed);
        for (int t = 0; t < threads; t++) {
            const uint64_t next = static_cast<uint64_t>(n) * t / threads,
                           end = static_cast<uint64_t>(n) * (t + 1) / threads;
            ranges_[t].word.store(static_cast<uint64_t>(turn) << 40 | end << 20 | next, std::memory_order_release);
        }
        return;
    }
    finished_.store(true, std::memory_order_relaxed);
}

void Program::note_time() {
    if (timing_)
        seconds_[current_] = std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
}

bool Program::claim(Range& range, uint32_t turn, int* chunk) {
    constexpr uint64_t kMask = (1 << 20) - 1;
    uint64_t word = range.word.load(std::memory_order_relaxed);
    do {
        if ((word >> 40) != (turn & 0xffffff) || (word & kMask) >= (word >> 20 & kMask)) return false;
    } while (!range.word.compare_exchange_weak(word, word + 1, std::memory_order_acquire, std::memory_order_relaxed));
    *chunk = static_cast<int>(word & kMask);
    return true;
}

// Memory would idle while one thread does the small work between two linears: the waiting one starts on its next
// weights.
void Program::fetch_ahead(size_t after, int thread, uint32_t turn) {
    const uint8_t* p = nullptr;
    size_t n = 0;
    for (size_t i = after + 1; i < end_ && !n; i++)
        if (ops_[i]->weights_of(*step_, thread, pool_.size(), &p, &n)) break;
    n = std::min(n, kAheadBytes);
    for (size_t i = 0; i < n && gate_.value() == turn; i += 512)
        for (size_t line = i; line < std::min(n, i + 512); line += 64) __builtin_prefetch(p + line, 0, 2);
}

// An op is over when its chunks are done, not when every thread has come by: a thread whose core is busy with something
// else is never waited for, unless it was stopped in the middle of a chunk.
void Program::work(int thread) {
    const int threads = pool_.size();
    const bool few_rows = step_->rows <= kAheadRows;
    uint32_t turn = gate_.value();
    if (thread == 0) {  // while the others wake up
        advance(0, turn + 1);
        gate_.open(++turn);
    }
    while (!finished_.load(std::memory_order_acquire)) {
        int mine = 0;
        size_t index = 0;
        for (int v = 0; v < threads; v++) {  // own range first: it is contiguous in memory; then help the others
            Range& range = ranges_[(thread + v) % threads];
            for (int chunk; claim(range, turn, &chunk); mine++) {
                index = current_;
                ops_[index]->run(*step_, chunk, thread);
            }
        }
        // total_ belongs to this op only until these chunks are counted: then another thread may deal out the next op.
        const int total = mine ? total_ : 0;
        if (mine && done_.fetch_add(mine, std::memory_order_acq_rel) + mine == total) {
            note_time();
            advance(thread, turn + 1);
            gate_.open(++turn);
        } else {
            if (mine && few_rows) fetch_ahead(index, thread, turn);
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
