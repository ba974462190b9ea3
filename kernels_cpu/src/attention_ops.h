// Keys and values into the cache, attention over it, and what it leaves for eviction: span after span of a step, the
// work of all of them dealt out together.
#pragma once

#include "program_ops.h"

namespace tinychat {

// The blocks that a step writes in a memory of 4 bits, in 16 bits: the tail's, or those of the buffers.
class ExactOf {
  public:
    ExactOf(const AttentionLayer& at, AttentionBuffers* buffers) : at_(at), buffers_(buffers) {
        scratch_.n_layers = 1, scratch_.n_kv = at.n_kv, scratch_.head_dim = at.head_dim;
        if (at.tail < 0) return;
        buffers->exact_bytes = std::max(buffers->exact_bytes, scratch_.block_bytes());
        buffers->exact.resize(std::max<size_t>(buffers->exact.size(), at.exact + 1));
    }
    void reserve() {
        if (at_.tail < 0) return;
        const uint8_t* first = buffers_->exact[at_.exact].data();
        scratch_.base = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(first), 64));
    }
    ExactBlocks of(const StepState& s, const SpanSlots& slots) const {
        if (at_.tail < 0) return {};
        return {&s.pools[at_.tail], &scratch_, slots.exact, at_.layer, slots.scratch, slots.length / kBlockSlots};
    }

  private:
    AttentionLayer at_;
    AttentionBuffers* buffers_;
    KvPool scratch_;
};

class RopeOp : public Op {
  public:
    RopeOp(const KernelTable& k, const AttentionLayer& at, float* qkv, const float* table, int half,
           AttentionBuffers* buffers)
        : k_(k), at_(at), qkv_(qkv), table_(table), half_(half), exact_(at, buffers) {}
    void reserve(const StepState&, int) override { exact_.reserve(); }
    const char* name() const override { return "rope_kv"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        const int end = std::min(s.rows, (c + 1) * piece());
        for (int row = c * piece(); row < end;) {
            const size_t i = s.span_at(row);
            const Span& span = s.spans[i];
            const SpanSlots& slots = s.slots_of(i, at_.memory);
            const int stop = std::min(end, span.first + span.rows);
            k_.rope_kv({at_, qkv_ + static_cast<size_t>(span.first) * at_.cols(),
                        table_ + static_cast<size_t>(span.first) * 2 * half_, half_, &s.pools[at_.memory], slots.blocks,
                        slots.length, row - span.first, stop - span.first, exact_.of(s, slots),
                        s.positions.data() + span.first});
            row = stop;
        }
    }

  private:
    int piece() const { return row_piece(at_.cols()); }
    const KernelTable& k_;
    AttentionLayer at_;
    float* qkv_;
    const float* table_;
    int half_;
    ExactOf exact_;
};

// Queries and keys rotated in place, for what is done to them before they are attended with.
class RotateOp : public Op {
  public:
    RotateOp(const KernelTable& k, const RotateArgs& args) : k_(k), args_(args) {}
    const char* name() const override { return "rotate"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        RotateArgs a = args_;
        a.r0 = c * piece(), a.r1 = std::min(s.rows, (c + 1) * piece());
        k_.rotate(a);
    }

  private:
    int piece() const { return row_piece(args_.heads * args_.head_dim); }
    const KernelTable& k_;
    RotateArgs args_;
};

// Stores the blocks that this step completes in 4 bits. One piece is one of them.
class PackKvOp : public Op {
  public:
    PackKvOp(const KernelTable& k, const AttentionLayer& at, AttentionBuffers* buffers)
        : k_(k), at_(at), exact_(at, buffers) {}
    const char* name() const override { return "pack_kv"; }
    void reserve(const StepState&, int) override { exact_.reserve(); }
    int chunks(const StepState& s, int) override {
        int n = 0;
        for (size_t i = 0; i < s.spans.size(); i++) n += completed(s, i);
        return n;
    }
    void run(const StepState& s, int c, int) override {
        size_t i = 0;
        for (int n; c >= (n = completed(s, i)); i++) c -= n;
        const SpanSlots& slots = s.slots_of(i, at_.memory);
        k_.pack_kv(
            {&s.pools[at_.memory], slots.blocks, at_.layer, slots.length / kBlockSlots + c, exact_.of(s, slots)});
    }

  private:
    int completed(const StepState& s, size_t i) const {
        const int length = s.slots_of(i, at_.memory).length;
        return (length + s.spans[i].rows) / kBlockSlots - length / kBlockSlots;
    }
    const KernelTable& k_;
    AttentionLayer at_;
    ExactOf exact_;
};

// A span of few rows: one piece is one KV head and one part of the context, merged by the op behind this one.
// A span of many rows: one piece is one KV head and a few rows over the whole context, merged as it goes.
class AttentionOp : public Op {
  public:
    AttentionOp(const KernelTable& k, const std::vector<float*>* scratch, AttentionBuffers* buffers,
                const AttentionLayer& at, const float* qkv, float* out)
        : k_(k), scratch_(scratch), buffers_(buffers), at_(at), qkv_(qkv), out_(out), exact_(at, buffers) {}
    const char* name() const override { return "attention"; }
    void reserve(const StepState& s, int) override {
        exact_.reserve();
        plans_.clear();
        Plan next{};
        size_t partial = 0, weights = 0, peaks = 0, totals = 0;
        for (size_t i = 0; i < s.spans.size(); i++) {
            const int rows = s.spans[i].rows;
            const SpanSlots& slots = s.slots_of(i, at_.memory);
            Plan p = next;
            // scored rows leave zeros where they do not look, so for them no part is skipped
            p.part0 = slots.scored_rows ? 0 : at_.first_slot(slots.length + 1) / kPartSlots;
            p.parts = pieces(slots.length + rows, kPartSlots) - p.part0;
            p.states = p.parts + at_.exact_states();
            p.split = rows <= 2 * kAttentionRows && p.parts > 1;
            // A piece takes several parts where a step would have more pieces than a program can count.
            p.piece = p.split ? 1 + p.parts * at_.n_kv / (kMostPieces / static_cast<int>(s.spans.size())) : 1;
            p.whole_heads = rows <= kAttentionRows && !p.split;
            p.partial = partial, p.weights = weights, p.peaks = peaks, p.totals = totals;
            const size_t heads = static_cast<size_t>(rows) * at_.n_heads;
            const size_t scored = static_cast<size_t>(slots.scored_rows) * at_.n_heads;
            if (p.split) partial += heads * p.states * (round_up(at_.head_dim, 16) + 16);
            weights += scored * row_weights(p), peaks += scored * p.states, totals += scored * 2;
            plans_.push_back(p);
            next.chunk += at_.n_kv * (p.split ? pieces(p.parts, p.piece) : pieces(rows, kAttentionRows));
            if (!p.whole_heads && (p.split || slots.scored_rows)) next.merge += little(p, slots) ? 1 : at_.n_kv;
        }
        plans_.push_back(next);
        grow(buffers_->partial, partial);
        grow(buffers_->weights, weights), grow(buffers_->peaks, peaks), grow(buffers_->totals, totals);
    }
    int chunks(const StepState&, int) override { return plans_.back().chunk; }
    void run(const StepState& s, int c, int thread) override {
        const size_t i = planned(&Plan::chunk, c);
        const Plan& p = plans_[i];
        AttentionArgs a = args(s, i);
        a.scratch = (*scratch_)[thread];
        const int rows = a.r1, mine = c - p.chunk,
                  each = p.split ? pieces(p.parts, p.piece) : pieces(rows, kAttentionRows);
        a.kv_head = mine / each;
        if (p.split) {
            a.p0 = p.part0 + mine % each * p.piece, a.p1 = std::min(p.part0 + p.parts, a.p0 + p.piece);
            a.own = a.p1 == p.part0 + p.parts;
        } else {
            a.r0 = mine % each * kAttentionRows, a.r1 = std::min(rows, a.r0 + kAttentionRows);
            a.p1 = pieces(a.length + a.r1, kPartSlots);
            a.p0 = a.score.weights ? 0 : at_.first_slot(a.length + a.r0 + 1) / kPartSlots;
            a.own = true;
        }
        k_.attention(a);
        if (p.whole_heads) score(s, i, a);
    }
    int merge_chunks() const { return plans_.back().merge; }
    // What is left once every part of the context was attended to: merging them, and what the scored rows attended to.
    // One piece is one KV head of a span, or all of them where there is little to do.
    void merge(const StepState& s, int c) const {
        const size_t i = planned(&Plan::merge, c);
        const Plan& p = plans_[i];
        AttentionArgs a = args(s, i);
        const bool all = little(p, s.slots_of(i, at_.memory));
        const int first = all ? 0 : c - p.merge, end = all ? at_.n_kv : first + 1;
        for (a.kv_head = first; a.kv_head < end; a.kv_head++) {
            if (p.split) k_.attention_merge(a);
            score(s, i, a);
        }
    }

  private:
    // How the work over one span is cut, and where in the buffers it keeps what it finds. The last one is behind all.
    struct Plan {
        int chunk, merge;         // its first piece of this op, and of the merge
        int part0, parts;         // of the context, that any row attends to
        int states;               // that a row leaves: of each part, and in 4 bits of what is exact
        int piece;                // parts of a piece
        bool split, whole_heads;  // whether a piece is a part of the context; one KV head, every row and all of it
        size_t partial, weights, peaks, totals;
    };
    static constexpr int kMostPieces = 1 << 18;  // of all spans; Program counts them in 20 bits

    // The span whose pieces the c-th is among.
    size_t planned(int Plan::* first, int c) const {
        const auto behind =
            std::upper_bound(plans_.begin(), plans_.end(), c, [&](int v, const Plan& p) { return v < p.*first; });
        return behind - plans_.begin() - 1;
    }
    static size_t row_weights(const Plan& p) {
        return static_cast<size_t>(p.parts) * kPartSlots + (p.states > p.parts ? kStretchSlots + kBlockSlots : 0);
    }
    static bool little(const Plan& p, const SpanSlots& slots) { return p.parts <= 4 && slots.scored_rows <= 1; }
    template <class T>
    static void grow(std::vector<T>& v, size_t n) {
        if (v.size() < n) v.resize(n + n / 2);
    }
    // Of all rows of a span.
    AttentionArgs args(const StepState& s, size_t i) const {
        const Span& span = s.spans[i];
        const SpanSlots& slots = s.slots_of(i, at_.memory);
        const Plan& p = plans_[i];
        AttentionArgs a{};
        a.at = at_;
        a.q = qkv_ + static_cast<size_t>(span.first) * at_.cols();
        a.kv = &s.pools[at_.memory], a.blocks = slots.blocks, a.length = slots.length;
        a.part0 = p.part0, a.n_parts = p.parts, a.n_states = p.states, a.r1 = span.rows;
        a.exact = exact_.of(s, slots);
        a.out = out_ + static_cast<size_t>(span.first) * at_.n_heads * at_.value_dim();
        a.partial = p.split ? buffers_->partial.data() + p.partial : nullptr;
        if (slots.scored_rows)
            a.score = {buffers_->weights.data() + p.weights, buffers_->peaks.data() + p.peaks,
                       buffers_->totals.data() + p.totals, row_weights(p), span.rows - slots.scored_rows};
        return a;
    }
    // What the scored rows attended to, once all of their parts are merged.
    void score(const StepState& s, size_t i, const AttentionArgs& of) const {
        const SpanSlots& slots = s.slots_of(i, at_.memory);
        if (!slots.scored_rows) return;
        ScoreArgs a{at_, of.score, of.kv_head, of.n_parts, of.n_states, 0, 0, nullptr, 0};
        a.rows = slots.scored_rows, a.length = slots.length + of.score.from;
        const KvPool& kv = *of.kv;
        a.row_stride = slots.sum_scores ? 0 : static_cast<size_t>(kv.n_layers) * kv.n_kv * slots.score_slots;
        a.out = slots.scores + (static_cast<size_t>(at_.layer) * kv.n_kv + of.kv_head) * slots.score_slots;
        k_.attention_score(a);
    }

    const KernelTable& k_;
    const std::vector<float*>* scratch_;
    AttentionBuffers* buffers_;
    AttentionLayer at_;
    const float* qkv_;
    float* out_;
    ExactOf exact_;
    std::vector<Plan> plans_;  // [spans + 1]
};

class AttentionMergeOp : public Op {
  public:
    explicit AttentionMergeOp(const AttentionOp* attention) : attention_(attention) {}
    const char* name() const override { return "attention_merge"; }
    int chunks(const StepState&, int) override { return attention_->merge_chunks(); }
    void run(const StepState& s, int c, int) override { attention_->merge(s, c); }

  private:
    const AttentionOp* attention_;
};

}  // namespace tinychat
