// Keys and values into the cache, attention over it, and what it leaves for eviction.
#pragma once

#include "program_ops.h"

namespace tinychat {

class RopeOp : public Op {
  public:
    RopeOp(const KernelTable& k, float* qkv, const float* table, int half, int n_heads, int n_kv, int head_dim,
           int layer, float q_scale)
        : k_(k),
          qkv_(qkv),
          table_(table),
          half_(half),
          n_heads_(n_heads),
          n_kv_(n_kv),
          head_dim_(head_dim),
          layer_(layer),
          q_scale_(q_scale) {}
    const char* name() const override { return "rope_kv"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        RopeArgs a{qkv_,
                   table_,
                   half_,
                   n_heads_,
                   n_kv_,
                   head_dim_,
                   layer_,
                   q_scale_,
                   s.kv,
                   s.blocks,
                   s.length,
                   c * piece(),
                   std::min(s.rows, (c + 1) * piece())};
        k_.rope_kv(a);
    }

  private:
    int piece() const { return row_piece((n_heads_ + 2 * n_kv_) * head_dim_); }
    const KernelTable& k_;
    float* qkv_;
    const float* table_;
    int half_, n_heads_, n_kv_, head_dim_, layer_;
    float q_scale_;
};

// Few rows: one piece is one KV head and one part of the context, merged by the op behind this one.
// Many rows: one piece is one KV head and a few rows over the whole context, merged as it goes.
class AttentionOp : public Op {
  public:
    AttentionOp(const KernelTable& k, const std::vector<float*>* scratch, ScoreBuffers* scores, const float* qkv,
                int n_heads, int n_kv, int head_dim, int layer, float* out, int window, float cap)
        : k_(k),
          scratch_(scratch),
          scores_(scores),
          qkv_(qkv),
          n_heads_(n_heads),
          n_kv_(n_kv),
          head_dim_(head_dim),
          layer_(layer),
          out_(out),
          window_(window),
          cap_(cap) {}
    const char* name() const override { return "attention"; }
    void reserve(const StepState& s, int) override {
        if (s.scored_rows) reserve_scores(s);
        if (!split(s)) return;
        const size_t n = static_cast<size_t>(s.rows) * n_heads_ * parts(s) * (round_up(head_dim_, 16) + 16);
        if (partial_.size() < n) partial_.resize(n + n / 2);
    }
    int chunks(const StepState& s, int) override {
        return split(s) ? n_kv_ * parts(s) : n_kv_ * pieces(s.rows, kAttentionRows);
    }
    void run(const StepState& s, int c, int thread) override {
        AttentionArgs a = args(s);
        a.scratch = (*scratch_)[thread];
        if (split(s)) {
            a.kv_head = c / a.n_parts;
            a.p0 = c % a.n_parts, a.p1 = a.p0 + 1;
            a.r0 = 0, a.r1 = s.rows;
        } else {
            const int groups = pieces(s.rows, kAttentionRows);
            a.kv_head = c / groups;
            a.r0 = c % groups * kAttentionRows, a.r1 = std::min(s.rows, a.r0 + kAttentionRows);
            a.p1 = (s.length + a.r1 + kPartSlots - 1) / kPartSlots;
            // scored rows leave zeros where they do not look, so for them no part is skipped
            a.p0 = window_ && !s.scored_rows ? std::max(0, s.length + a.r0 + 1 - window_) / kPartSlots : 0;
        }
        k_.attention(a);
        if (whole_heads(s)) score(s, c);
    }
    bool split(const StepState& s) const { return s.rows <= 2 * kAttentionRows && parts(s) > 1; }
    // Whether a piece is one KV head, every row and the whole context.
    bool whole_heads(const StepState& s) const { return s.rows <= kAttentionRows && !split(s); }
    // What the scored rows attended to, once all of their parts are merged.
    void score(const StepState& s, int kv_head) const {
        if (!s.scored_rows) return;
        const KvPool& kv = *s.kv;
        ScoreArgs a{};
        a.score = &scores_->view;
        a.n_heads = n_heads_, a.per_kv = n_heads_ / kv.n_kv, a.kv_head = kv_head, a.n_parts = parts(s);
        a.rows = s.scored_rows, a.length = s.length + s.rows - s.scored_rows;
        a.row_stride = s.sum_scores ? 0 : static_cast<size_t>(kv.n_layers) * kv.n_kv * s.score_slots;
        a.out = s.scores + (static_cast<size_t>(layer_) * kv.n_kv + kv_head) * s.score_slots;
        k_.attention_score(a);
    }
    static int parts(const StepState& s) { return (s.length + s.rows + kPartSlots - 1) / kPartSlots; }
    AttentionArgs args(const StepState& s) {
        const size_t ld = static_cast<size_t>(n_heads_ + 2 * n_kv_) * head_dim_;
        AttentionArgs a{};
        a.q = qkv_, a.ldq = ld, a.n_heads = n_heads_, a.layer = layer_;
        a.kv = s.kv, a.blocks = s.blocks, a.length = s.length, a.n_parts = parts(s), a.out = out_;
        a.window = window_, a.cap = cap_;
        a.partial = split(s) ? partial_.data() : nullptr;
        a.score = s.scored_rows ? &scores_->view : nullptr;
        return a;
    }

  private:
    void reserve_scores(const StepState& s) {
        const size_t pairs = static_cast<size_t>(s.scored_rows) * n_heads_;
        ScoreScratch& view = scores_->view;
        view.ld = static_cast<size_t>(parts(s)) * kPartSlots;
        view.from = s.rows - s.scored_rows;
        if (scores_->weights.size() < pairs * view.ld) scores_->weights.resize(pairs * (view.ld + 4 * kPartSlots));
        if (scores_->peaks.size() < pairs * parts(s)) scores_->peaks.resize(pairs * (parts(s) + 4));
        if (scores_->totals.size() < pairs * 2) scores_->totals.resize(pairs * 2);
        view.weights = scores_->weights.data();
        view.peaks = scores_->peaks.data();
        view.totals = scores_->totals.data();
    }

    const KernelTable& k_;
    const std::vector<float*>* scratch_;
    ScoreBuffers* scores_;
    const float* qkv_;
    int n_heads_, n_kv_, head_dim_, layer_;
    float* out_;
    int window_;
    float cap_;
    std::vector<float> partial_;
};

// What is left once every part of the context was attended to: merging them, and what the scored rows attended to.
// One piece is one KV head, or all of them where there is little to do.
class AttentionMergeOp : public Op {
  public:
    AttentionMergeOp(const KernelTable& k, AttentionOp* attention) : k_(k), attention_(attention) {}
    const char* name() const override { return "attention_merge"; }
    int chunks(const StepState& s, int) override {
        if (attention_->whole_heads(s) || !(attention_->split(s) || s.scored_rows)) return 0;
        return little(s) ? 1 : s.kv->n_kv;
    }
    void run(const StepState& s, int c, int) override {
        AttentionArgs a = attention_->args(s);
        a.r0 = 0, a.r1 = s.rows;
        const bool all = little(s);
        for (a.kv_head = all ? 0 : c; a.kv_head < (all ? s.kv->n_kv : c + 1); a.kv_head++) {
            if (attention_->split(s)) k_.attention_merge(a);
            attention_->score(s, a.kv_head);
        }
    }

  private:
    static bool little(const StepState& s) { return AttentionOp::parts(s) <= 4 && s.scored_rows <= 1; }
    const KernelTable& k_;
    AttentionOp* attention_;
};

}  // namespace tinychat
