// A program: the ops of one pass over the network, recorded once, replayed each step by all threads together.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "step.h"
#include "thread_pool.h"

namespace tinychat {

// Memory of one program: rows of buffers, touched only as far as steps have rows.
class Arena {
  public:
    Arena() = default;
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    void* take(size_t bytes);  // zeroed, 64-byte aligned; throws std::bad_alloc

  private:
    std::vector<std::pair<void*, size_t>> maps_;
};

class LinearOp;

class Op {
  public:
    virtual ~Op() = default;
    virtual const char* name() const = 0;
    // Pieces of work in this step; they run in any order on any thread. One piece runs without waking anybody.
    virtual int chunks(const StepState& s, int threads) = 0;
    virtual void run(const StepState& s, int chunk, int thread) = 0;
    // Where the thread's own share of the weights begins, and how many bytes its first piece has; false without
    // weights.
    virtual bool weights_of(const StepState& /*s*/, int /*thread*/, int /*threads*/, const uint8_t** /*p*/,
                            size_t* /*n*/) const {
        return false;
    }
    // Called before the step starts, on one thread: the place to grow buffers.
    virtual void reserve(const StepState& /*s*/, int /*threads*/) {}
};

// What a linear reads: rows in integers (quantized weights) or fp32 (dense ones).
struct LinearPart {
    const LinearWeights* w;
    const Activations* x;
    int column;  // of its first output in the op's output
};

// What one expert reads: its inputs in the form of its weights, in the order `perm` of them (null: as they are).
struct ExpertInput {
    Activations* out;
    const int32_t* perm;
};

// How scores become the weights of experts, of which the largest are taken.
struct RouteRule {
    bool normalize;                    // the weights of those that are taken sum to one
    bool sigmoid = false;              // each score by itself, not a softmax of all
    const float* bias = nullptr;       // [experts], added to the weights to choose by them
    float scale = 1.0f;                // the weights are multiplied by it in the end
    const float* each = nullptr;       // [experts], and by that of their expert
    int groups = 1, taken_groups = 1;  // equal groups of experts, and how many a row chooses from
};

// Which experts the rows of a step take. Each row has a slot with each of its experts; the slots of an expert follow
// each other from a multiple of kRowBlock on, so that its linears see them as rows of their own.
struct Routing {
    Routing(int n_experts, int taken, int max_rows)
        : n_experts(n_experts),
          taken(taken),
          experts(static_cast<size_t>(max_rows) * taken),
          slots(experts.size()),
          row_of(max_slots(n_experts, taken, max_rows)),
          expert_of(row_of.size()),
          first(n_experts),
          count(n_experts),
          weights(experts.size()) {
        used.reserve(n_experts);
    }
    static int max_slots(int n_experts, int taken, int max_rows) {
        return max_rows * taken + std::min(n_experts, max_rows * taken) * (kRowBlock - 1);
    }

    int n_experts, taken;                     // so many of so many for each row
    int end = 0;                              // slots in use, gaps counted
    std::vector<int32_t> experts, slots;      // [rows, taken], experts ascending
    std::vector<int32_t> row_of, expert_of;   // [slots]; row −1: a gap
    std::vector<int32_t> first, count, used;  // first slot and slots of each expert; experts that have any
    std::vector<float> weights;               // [rows, taken]
};

// What attention keeps between its two ops: behind AttentionArgs::partial and ScoreScratch, span after span. One layer
// at a time uses it.
struct AttentionBuffers {
    std::vector<float> partial, weights, peaks, totals;
    // In 16 bits, the blocks that are written of memories of 4 bits: one layer's; then those of layers whose keys and
    // values others read behind them.
    std::vector<std::vector<uint8_t>> exact;
    size_t exact_bytes = 0;  // of one of them, at most
};

// What the recorded ops expect of a KV memory.
struct MemoryUse {
    int layers = 0, n_kv = 0, head_dim = 0;
    int reach = 0;  // slots back from a row, itself included, that are read
    int tail = -1;  // the memory of its newest blocks, if it is one of 4 bits
    bool is_tail = false;
    int latent = 0;    // of its keys, channels that are values too
    size_t state = 0;  // numbers of each layer, if it is one of states
};

class Program : private Job {
  public:
    Program(IsaKind isa, int threads, int max_rows);

    const KernelTable& kernels() const { return k_; }
    int max_rows() const { return max_rows_; }
    int threads() const { return pool_.size(); }

    // Buffers: [max_rows, cols] fp32; a value as linears read it: fp32, integers of 8 or 16 bits (0: none), or both.
    // rows: instead of max_rows
    float* floats(int cols, int rows = 0);
    Activations* activations(int k, bool as_float, int bits, int group, int rows = 0);
    Routing* routing(int n_experts, int taken);

    // out = scale · rows of w; with `add`: factor · (add + that)
    void embed(const LinearWeights* w, float* out, float scale, const float* add = nullptr, float factor = 1.0f);
    float* rope_table(const std::vector<double>& frequencies, double magnitude);
    // tail: only the rows that get logits, moved to the front
    void rms_norm(const float* x, const float* weight, float eps, Activations* out, bool tail);
    void rms_norm_add(const float* x, const float* weight, float eps, float* y, int k);
    void rms_norm_rows(float* x, const float* weight, float eps, int k);  // in place
    void norm_heads(const HeadNormArgs& args);                            // of all rows
    void quantize(const float* x, const int32_t* perm, Activations* out, bool tail);
    void linear(std::vector<LinearPart> parts, float* y, int ldy, const float* add);
    // y = each head's first columns of its `width` of x, times its own matrix; w: one below the other. in: rows for
    // all heads.
    void head_linear(const LinearWeights* w, int heads, const float* x, int width, const int32_t* perm,
                     const Activations* in, float* y);
    void rotate(const RotateArgs& args);  // of all rows
    void rope_kv(const AttentionLayer& at, float* qkv, const float* table, int half);
    void attention(const AttentionLayer& at, const float* qkv, float* out);
    // up: where that lies in rows of its own, of ld_up values; else it stands behind the gate in x.
    void gate_mul(const float* x, Activations* out, const GateFunction& f, const Routing* routing = nullptr,
                  const float* up = nullptr, size_t ld_up = 0);
    void route(const float* scores, Routing* routing, const RouteRule& rule);
    void expert_input(const Routing* routing, const float* x, bool from_rows,
                      std::vector<std::vector<ExpertInput>> inputs);
    void expert_linear(const Routing* routing, std::vector<std::vector<LinearPart>> parts, float* y, int ldy);
    void expert_sum(const Routing* routing, const float* x, float* y, int cols, bool add);
    void repeat_columns(const float* x, int cols, int last, float* y);  // y = x, and its last columns again
    void scale_rows(float* x, int cols, const float* by);               // by the one number there
    // Any other op. It may change what a linear has made, so no later op is done along with that.
    void other(std::unique_ptr<Op> op) {
        last_linear_ = nullptr;
        add(std::move(op));
    }
    // y = out · conv(in · x), the three side by side in a row; a layer's state begins with that of its convolution.
    void short_conv(const StateLayer& at, const float* x, const float* weight, int channels, int width, float* y);
    // y = the delta rule over silu(conv(x)); conv: [rows, channels] and gates: [rows, 2 · value heads], to be used.
    void delta_rule(const StateLayer& state, const DeltaLayer& at, const float* x, const float* weight, int width,
                    const DeltaGateArgs& gates, float* y);
    // A Mamba-2 layer, without its gate: y = the states' outputs over silu(conv(x)). conv: of which x, ld, weight, bias
    // and width are given and y is to be used, [rows, channels]; gates: to be used.
    void mamba(const StateLayer& state, const MambaArgs& args, ConvArgs conv, const MambaGateArgs& gates);
    void gated_norm(const GatedNormArgs& args);  // of all rows
    void sigmoid_mul(const SigmoidArgs& args);
    void split_gates(const float* x, int heads, int dim, int rest, float* qkv, float* gates);
    void carry(const StateLayer& at, const float* x, float* y);  // x or y may be null
    void join(const float* a, int n, const float* b, int m, float* y);
    // What is recorded from here on is a part of its own: a step runs one part.
    void next_part() { parts_.push_back(ops_.size()); }
    int parts() const { return static_cast<int>(parts_.size()); }
    void lm_head(const LinearWeights* w, const Activations* x, float scale = 1.0f, float cap = 0.0f);

    // KV memories: as many as pools were given, or ops ask for.
    int memories() const { return static_cast<int>(std::max({pools_.size(), states_.size(), uses_.size()})); }
    // What ops expect of a memory; nothing of one that they do not know.
    MemoryUse use(int memory) const { return memory < static_cast<int>(uses_.size()) ? uses_[memory] : MemoryUse{}; }
    KvPool kv(int memory) const { return memory < static_cast<int>(pools_.size()) ? pools_[memory] : KvPool{}; }
    void set_kv(int memory, const KvPool& kv);
    StatePool states(int memory) const {
        return memory < static_cast<int>(states_.size()) ? states_[memory] : StatePool{};
    }
    void set_states(int memory, const StatePool& states);
    // Slots src of each layer and KV head over slots dst: [layers][kv_heads][n], those with src < 0 are skipped.
    // slots, exact: in a memory of 4 bits, those in use before, and the blocks of its tail; else nothing is looked at.
    void open_blocks(int memory, const int32_t* blocks, const int32_t* exact, int n);
    void move_slots(int memory, const int32_t* blocks, const int32_t* src, const int32_t* dst, int n, int slots,
                    const int32_t* exact);
    // The first n slots' keys turned by delta [layers][kv_heads][n] positions.
    void turn_keys(int memory, const int32_t* blocks, const double* freq, int half, const int32_t* delta, int n,
                   const int32_t* exact);
    // How far each of the first n slots' values lies from their weighted mean: all [layers][kv_heads][n].
    void value_spread(int memory, const int32_t* blocks, const float* weights, float* out, int n, const int32_t* exact);

    // Runs one part over the step. Callers on several threads take turns. The inputs have been checked.
    void run(StepState& step, int part = 0);

    // Seconds that each op took in its last run (thread 0's view, barriers included), when timing is on.
    void set_timing(bool on) { timing_ = on; }
    std::vector<std::pair<std::string, double>> timings() const;

  private:
    // Chunks that one thread takes first and the others help with: turn (24 bits), end (20), next (20) in one word, so
    // that a thread that comes late cannot take a chunk of an op that is over.
    struct alignas(64) Range {
        std::atomic<uint64_t> word{0};
    };

    bool claim(Range& range, uint32_t turn, int* chunk);
    void work(int thread) override;
    void advance(int thread, uint32_t turn);
    void note_time();
    void fetch_ahead(size_t after, int thread, uint32_t turn);
    void add(std::unique_ptr<Op> op) { ops_.push_back(std::move(op)); }

    const KernelTable& k_;
    int max_rows_;
    ThreadPool pool_;
    Arena arena_;
    std::vector<std::unique_ptr<Activations>> activations_;
    std::vector<std::unique_ptr<LinearWeights>> head_weights_;
    std::vector<std::unique_ptr<Routing>> routings_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::vector<size_t> parts_{0};  // where each begins
    std::vector<float*> scratch_;   // one for each thread
    LinearOp* last_linear_ = nullptr;
    size_t scratch_floats_ = 0;
    AttentionBuffers attention_;
    std::vector<MemoryUse> uses_;
    std::vector<KvPool> pools_;
    std::vector<StatePool> states_;

    std::mutex turn_;
    const StepState* step_ = nullptr;
    // Written by the thread that finished the last chunk of an op, read by threads that took a chunk of the next.
    size_t current_ = 0, end_ = 0;
    int total_ = 0;  // chunks of the current op
    std::vector<Range> ranges_;
    alignas(64) std::atomic<int> done_{0};
    std::atomic<bool> finished_{true};
    alignas(64) Gate gate_;
    std::chrono::steady_clock::time_point started_;
    bool timing_ = false;
    std::vector<double> seconds_;

    void need_scratch(size_t floats);
    void note_use(const AttentionLayer& at, int reach);
    void note_use(const StateLayer& at);
    ExactForms exact_forms(int memory, const int32_t* exact) const;
    // Runs `work(layer, head)` for all of them, by all threads together.
    template <class Work>
    void for_heads(const KvPool& kv, Work work);
};

}  // namespace tinychat
