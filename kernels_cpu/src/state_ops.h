// The ops of recurrent layers: how each cuts its work. Rows of a span follow each other; channels and heads are apart.
#pragma once

#include "program_ops.h"

namespace tinychat {

// A layer's state for the rows of one span, `offset` numbers from where the layer begins.
inline SpanState span_state(const StepState& s, size_t span, const StateLayer& at, size_t offset = 0) {
    const SpanSlots& slots = s.slots_of(span, at.memory);
    const StatePool& pool = s.states[at.memory];
    float* base = pool.base + at.layer * at.floats + offset;
    const float* source = slots.length < 0 ? nullptr : base + static_cast<size_t>(slots.length) * pool.floats;
    return {source, base, pool.floats, slots.blocks};
}

class ConvOp : public Op {
  public:
    // Pointers of args are to row 0. offset: of its state in the layer's.
    ConvOp(const KernelTable& k, const ConvArgs& args, const StateLayer& at, size_t offset)
        : k_(k), args_(args), at_(at), offset_(offset) {}
    const char* name() const override { return "short_conv"; }
    int chunks(const StepState& s, int) override { return static_cast<int>(s.spans.size()) * across(); }
    void run(const StepState& s, int c, int) override {
        const size_t span = c / across(), first = s.spans[span].first;
        ConvArgs a = args_;
        a.c0 = c % across() * kConvColumns, a.c1 = std::min(a.channels, a.c0 + kConvColumns);
        a.n = s.spans[span].rows, a.state = span_state(s, span, at_, offset_);
        a.x += first * a.ld, a.y += first * a.ldy;
        if (a.in) a.in += first * a.ld, a.out += first * a.ld;
        k_.short_conv(a);
    }

  private:
    int across() const { return pieces(args_.channels, kConvColumns); }
    const KernelTable& k_;
    ConvArgs args_;
    StateLayer at_;
    size_t offset_;
};

class DeltaGateOp : public Op {
  public:
    DeltaGateOp(const KernelTable& k, const DeltaGateArgs& args) : k_(k), args_(args) {}
    const char* name() const override { return "delta_gates"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        DeltaGateArgs a = args_;
        a.r0 = c * piece(), a.r1 = std::min(s.rows, (c + 1) * piece());
        k_.delta_gates(a);
    }

  private:
    int piece() const { return row_piece(2 * args_.at.keys()); }
    const KernelTable& k_;
    DeltaGateArgs args_;
};

class DeltaOp : public Op {
  public:
    DeltaOp(const KernelTable& k, const std::vector<float*>* scratch, const DeltaArgs& args, const StateLayer& at)
        : k_(k), scratch_(scratch), args_(args), at_(at) {}
    static size_t scratch(const DeltaLayer& at) { return static_cast<size_t>(at.key_dim) * kStateColumns; }
    const char* name() const override { return "delta_rule"; }
    int chunks(const StepState& s, int) override { return static_cast<int>(s.spans.size()) * each(); }
    void run(const StepState& s, int c, int thread) override {
        const size_t span = c / each(), first = s.spans[span].first;
        DeltaArgs a = args_;
        a.head = c % each() / a.at.blocks(), a.block = c % each() % a.at.blocks();
        a.n = s.spans[span].rows, a.state = span_state(s, span, at_);
        a.qkv += first * a.at.channels(), a.gates += first * 2 * a.at.n_values, a.y += first * a.at.values();
        a.scratch = (*scratch_)[thread];
        k_.delta_rule(a);
    }

  private:
    int each() const { return args_.at.n_values * args_.at.blocks(); }
    const KernelTable& k_;
    const std::vector<float*>* scratch_;
    DeltaArgs args_;
    StateLayer at_;
};

class MambaGateOp : public Op {
  public:
    MambaGateOp(const KernelTable& k, const MambaGateArgs& args) : k_(k), args_(args) {}
    const char* name() const override { return "mamba_gates"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        MambaGateArgs a = args_;
        a.r0 = c * piece(), a.r1 = std::min(s.rows, (c + 1) * piece());
        k_.mamba_gates(a);
    }

  private:
    int piece() const { return row_piece(16 * args_.at.n_heads); }  // exponentials take longer than products
    const KernelTable& k_;
    MambaGateArgs args_;
};

class MambaOp : public Op {
  public:
    MambaOp(const KernelTable& k, const std::vector<float*>* scratch, const MambaArgs& args, const StateLayer& at)
        : k_(k), scratch_(scratch), args_(args), at_(at) {}
    static size_t scratch(const MambaLayer& at) { return static_cast<size_t>(at.state) * kStateColumns; }
    const char* name() const override { return "mamba"; }
    int chunks(const StepState& s, int) override { return static_cast<int>(s.spans.size()) * each(); }
    void run(const StepState& s, int c, int thread) override {
        const size_t span = c / each(), first = s.spans[span].first;
        MambaArgs a = args_;
        a.head = c % each() / a.at.blocks(), a.block = c % each() % a.at.blocks();
        a.n = s.spans[span].rows, a.state = span_state(s, span, at_);
        a.xbc += first * a.at.channels(), a.gates += first * 2 * a.at.n_heads, a.y += first * a.at.values();
        a.scratch = (*scratch_)[thread];
        k_.mamba(a);
    }

  private:
    int each() const { return args_.at.n_heads * args_.at.blocks(); }
    const KernelTable& k_;
    const std::vector<float*>* scratch_;
    MambaArgs args_;
    StateLayer at_;
};

class GatedNormOp : public Op {
  public:
    GatedNormOp(const KernelTable& k, const GatedNormArgs& args) : k_(k), args_(args) {}
    const char* name() const override { return "norm_gated"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, row_piece(args_.cols)); }
    void run(const StepState& s, int c, int) override {
        GatedNormArgs a = args_;
        a.r0 = c * row_piece(a.cols), a.r1 = std::min(s.rows, (c + 1) * row_piece(a.cols));
        k_.gated_norm(a);
    }

  private:
    const KernelTable& k_;
    GatedNormArgs args_;
};

class SigmoidOp : public Op {
  public:
    SigmoidOp(const KernelTable& k, const SigmoidArgs& args) : k_(k), args_(args) {}
    const char* name() const override { return "sigmoid_mul"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        SigmoidArgs a = args_;
        a.r0 = c * piece(), a.r1 = std::min(s.rows, (c + 1) * piece());
        k_.sigmoid_mul(a);
    }

  private:
    int piece() const { return row_piece(args_.gates * args_.each); }
    const KernelTable& k_;
    SigmoidArgs args_;
};

// A layer's state that is one row. With x it becomes x's row, and y, if there is one, gets the row before each: the
// state before the first row, then x's own. Without x, y gets the state in each row.
class CarryOp : public Op {
  public:
    CarryOp(const StateLayer& at, const float* x, float* y) : at_(at), x_(x), y_(y) {}
    const char* name() const override { return "carry"; }
    int chunks(const StepState& s, int) override { return static_cast<int>(s.spans.size()); }
    void run(const StepState& s, int c, int) override {
        const size_t n = at_.floats, bytes = n * sizeof(float), first = s.spans[c].first * n;
        const SpanState state = span_state(s, c, at_);
        for (int i = 0; i < s.spans[c].rows; i++) {
            const float* before = x_ && i ? x_ + first + (i - 1) * n : state.source;
            float* y = y_ ? y_ + first + i * n : nullptr;
            if (y && before) memcpy(y, before, bytes);
            if (y && !before) std::fill(y, y + n, 0.0f);
        }
        for (int i = 0; x_ && i < s.spans[c].rows; i++)
            if (float* to = state.behind(i)) memcpy(to, x_ + first + i * n, bytes);
    }

  private:
    StateLayer at_;
    const float* x_;
    float* y_;
};

// Rows of a and b side by side.
class JoinOp : public Op {
  public:
    JoinOp(const float* a, int n, const float* b, int m, float* y) : a_(a), b_(b), n_(n), m_(m), y_(y) {}
    const char* name() const override { return "join"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        const size_t n = n_, m = m_, last = std::min(s.rows, (c + 1) * piece());
        for (size_t r = static_cast<size_t>(c) * piece(); r < last; r++) {
            memcpy(y_ + r * (n + m), a_ + r * n, n * sizeof(float));
            memcpy(y_ + r * (n + m) + n, b_ + r * m, m * sizeof(float));
        }
    }

  private:
    int piece() const { return row_piece(n_ + m_); }
    const float *a_, *b_;
    int n_, m_;
    float* y_;
};

// Queries that have a gate beside them each, apart: rows [heads][2][dim] and what follows them → rows of queries and
// what follows, and rows of gates.
class SplitGatesOp : public Op {
  public:
    SplitGatesOp(const float* x, int heads, int dim, int rest, float* qkv, float* gates)
        : x_(x), heads_(heads), dim_(dim), rest_(rest), qkv_(qkv), gates_(gates) {}
    const char* name() const override { return "split_gates"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        const int last = std::min(s.rows, (c + 1) * piece()), queries = heads_ * dim_;
        const size_t bytes = dim_ * sizeof(float);
        for (int r = c * piece(); r < last; r++) {
            const float* x = x_ + static_cast<size_t>(r) * (2 * queries + rest_);
            float *q = qkv_ + static_cast<size_t>(r) * (queries + rest_),
                  *gate = gates_ + static_cast<size_t>(r) * queries;
            for (int h = 0; h < heads_; h++, x += 2 * dim_, gate += dim_, q += dim_)
                memcpy(q, x, bytes), memcpy(gate, x + dim_, bytes);
            memcpy(q, x, rest_ * sizeof(float));
        }
    }

  private:
    int piece() const { return row_piece(2 * heads_ * dim_ + rest_); }
    const float* x_;
    int heads_, dim_, rest_;
    float *qkv_, *gates_;
};

}  // namespace tinychat
