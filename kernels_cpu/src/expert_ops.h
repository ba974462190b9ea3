// Mixture of experts: each row of a step takes a few of many linears. Rows are sorted by expert first, so that the
// weights of an expert pass once for all rows that take it, and those of the others not at all.
#pragma once

#include "program_ops.h"

namespace tinychat {

// Softmax over the experts' scores, the largest of it for each row, and the slots that they get. One piece: a few
// microseconds a row.
class RouteOp : public Op {
  public:
    RouteOp(const float* scores, Routing* routing, const RouteRule& rule)
        : scores_(scores), r_(routing), rule_(rule), p_(routing->n_experts) {}
    const char* name() const override { return "route"; }
    int chunks(const StepState&, int) override { return 1; }
    void run(const StepState& s, int, int) override {
        for (int row = 0; row < s.rows; row++) choose(row);
        place(s.rows);
    }

  private:
    // The row's experts, ascending, and their weights. A NaN is never the largest, but something is always chosen.
    void choose(int row) {
        weigh(scores_ + static_cast<size_t>(row) * r_->n_experts);
        float kept = 0.0f;
        int32_t* expert = &r_->experts[static_cast<size_t>(row) * r_->taken];
        float* weight = &r_->weights[static_cast<size_t>(row) * r_->taken];
        left_ = p_;
        for (int e = 0; rule_.bias && e < r_->n_experts; e++) left_[e] += rule_.bias[e];
        if (rule_.groups > 1) choose_groups();
        for (int n = 0; n < r_->taken; n++) {
            int best = -1;
            for (int e = 0; e < r_->n_experts; e++)
                if (left_[e] > kTaken && (best < 0 || left_[e] > left_[best])) best = e;
            for (int e = 0; best < 0; e++)
                if (left_[e] != kTaken) best = e;  // NaN
            expert[n] = best;
            kept += p_[best];
            left_[best] = kTaken;
        }
        std::sort(expert, expert + r_->taken);
        if (rule_.sigmoid) kept += 1e-6f;  // all may be next to nothing
        for (int n = 0; n < r_->taken; n++)
            weight[n] = (rule_.normalize ? p_[expert[n]] / kept : p_[expert[n]]) * rule_.scale;
        for (int n = 0; rule_.each && n < r_->taken; n++) weight[n] *= rule_.each[expert[n]];
    }
    // Takes the experts of all but the best groups out: those with the largest weight, or, where there is a bias, with
    // the largest sum of two. Of equals the first; NaN counts for nothing.
    void choose_groups() {
        const int each = r_->n_experts / rule_.groups;
        sums_.assign(rule_.groups, 0.0f);
        for (int g = 0; g < rule_.groups; g++) {
            float one = kTaken, two = kTaken;
            for (int e = g * each; e < (g + 1) * each; e++) {
                if (left_[e] > one)
                    two = one, one = left_[e];
                else if (left_[e] > two)
                    two = left_[e];
            }
            sums_[g] = rule_.bias && each > 1 ? one + two : one;
        }
        order_.resize(rule_.groups);
        for (int g = 0; g < rule_.groups; g++) order_[g] = g;
        std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return sums_[a] > sums_[b]; });
        for (int i = rule_.taken_groups; i < rule_.groups; i++)
            std::fill_n(left_.begin() + order_[i] * each, each, kTaken);
    }
    // p_: the softmax of the scores, or the sigmoid of each.
    void weigh(const float* x) {
        const int n = r_->n_experts;
        if (rule_.sigmoid) {
            for (int e = 0; e < n; e++) p_[e] = 1.0f / (1.0f + std::exp(-x[e]));
            return;
        }
        const float top = *std::max_element(x, x + n);
        float total = 0.0f;
        for (int e = 0; e < n; e++) total += p_[e] = std::exp(x[e] - top);
        for (float& p : p_) p /= total;
    }
    // Slots for all rows, expert by expert, rows in their order.
    void place(int rows) {
        const int n = rows * r_->taken;
        std::fill(r_->count.begin(), r_->count.end(), 0);
        for (int i = 0; i < n; i++) r_->count[r_->experts[i]]++;
        r_->used.clear();
        int end = 0;
        for (int e = 0; e < r_->n_experts; e++) {
            r_->first[e] = end;
            if (!r_->count[e]) continue;
            r_->used.push_back(e);
            const int next = static_cast<int>(round_up(end + r_->count[e], kRowBlock));
            for (int slot = end; slot < next; slot++) r_->row_of[slot] = -1, r_->expert_of[slot] = e;
            end = next;
        }
        r_->end = end;
        std::fill(r_->count.begin(), r_->count.end(), 0);
        for (int i = 0; i < n; i++) {
            const int e = r_->experts[i], slot = r_->first[e] + r_->count[e]++;
            r_->slots[i] = slot, r_->row_of[slot] = i / r_->taken;
        }
    }

    static constexpr float kTaken = -INFINITY;
    const float* scores_;
    Routing* r_;
    RouteRule rule_;
    std::vector<float> p_, left_, sums_;
    std::vector<int> order_;
};

// What the experts of a slot read of its row, in the form and order that each wants.
class ExpertInputOp : public Op {
  public:
    // x: [rows, k], or [slots, k] where it comes from experts
    ExpertInputOp(const KernelTable& k, const Routing* routing, const float* x, bool from_rows,
                  std::vector<std::vector<ExpertInput>> inputs)
        : k_(k), r_(routing), x_(x), from_rows_(from_rows), inputs_(std::move(inputs)) {}
    const char* name() const override { return "expert_input"; }
    int chunks(const StepState&, int) override { return pieces(r_->end, piece()); }
    void run(const StepState&, int c, int) override {
        for (int slot = c * piece(), end = std::min(r_->end, slot + piece()); slot < end; slot++) {
            if (r_->row_of[slot] < 0) continue;
            for (const ExpertInput& in : inputs_[r_->expert_of[slot]])
                k_.quantize({x_, from_rows_ ? r_->row_of.data() : nullptr, in.perm, *in.out, slot, slot + 1});
        }
    }

  private:
    int piece() const { return kRowBlock * row_piece(inputs_[0][0].out->k); }
    const KernelTable& k_;
    const Routing* r_;
    const float* x_;
    bool from_rows_;
    std::vector<std::vector<ExpertInput>> inputs_;
};

// The tiles of all experts that some row takes, cut as one long row of tiles.
class ExpertLinearOp : public Op {
  public:
    // parts: of each expert; all experts have the same shapes
    ExpertLinearOp(const KernelTable& k, const Routing* routing, std::vector<std::vector<LinearPart>> parts, float* y,
                   int ldy)
        : k_(k), r_(routing), parts_(std::move(parts)), y_(y), ldy_(ldy) {
        for (const auto& p : parts_[0]) tiles_ += p.w->tiles();
    }
    const char* name() const override { return "expert_linear"; }
    int chunks(const StepState& s, int threads) override {
        total_ = static_cast<long long>(r_->used.size()) * tiles_;
        const long long size = std::max(1LL, total_ / (threads * 8));
        const long long least = total_ / kMostChunks + 1;
        piece_ = std::max(s.rows > 2 * kRowBlock ? std::min(size, 8LL) : size, least);
        return static_cast<int>((total_ + piece_ - 1) / piece_);
    }
    // Nobody knows before the router has chosen, and what comes behind is not next.
    bool weights_of(const StepState&, int, int, const uint8_t**, size_t* n) const override {
        *n = 0;
        return true;
    }
    void run(const StepState&, int c, int) override {
        const long long end = std::min(total_, (c + 1) * piece_);
        for (long long at = c * piece_; at < end;) {
            const int t0 = static_cast<int>(at % tiles_);
            const int t1 = static_cast<int>(std::min<long long>(tiles_, t0 + end - at));
            tiles(r_->used[at / tiles_], t0, t1);
            at += t1 - t0;
        }
    }

  private:
    static constexpr long long kMostChunks = 1 << 19;  // Program counts them in 20 bits
    void tiles(int expert, int t0, int t1) const {
        const int first = r_->first[expert];
        for (const auto& p : parts_[expert]) {
            const int n = p.w->tiles(), a = std::max(t0, 0), b = std::min(t1, n);
            const Activations x = p.x->from_row(first);
            if (a < b)
                k_.linear({p.w, &x, r_->count[expert], y_ + static_cast<size_t>(first) * ldy_ + p.column,
                           static_cast<size_t>(ldy_), nullptr, 0, a, b});
            t0 -= n, t1 -= n;
        }
    }

    const KernelTable& k_;
    const Routing* r_;
    std::vector<std::vector<LinearPart>> parts_;
    float* y_;
    int ldy_, tiles_ = 0;
    long long total_ = 0, piece_ = 1;
};

// y[row] += Σ weight · x[slot] over the row's experts, ascending; or is that sum alone.
class ExpertSumOp : public Op {
  public:
    ExpertSumOp(const Routing* routing, const float* x, float* y, int cols, bool onto)
        : r_(routing), x_(x), y_(y), cols_(cols), onto_(onto) {}
    const char* name() const override { return "expert_sum"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        for (int row = c * piece(), end = std::min(s.rows, row + piece()); row < end; row++)
            for (int i = 0; i < cols_; i += kCols) add(row, i, std::min(kCols, cols_ - i));
    }

  private:
    static constexpr int kCols = 64;
    int piece() const { return row_piece(cols_ * r_->taken / 4); }
    void add(int row, int column, int n) const {
        float sum[kCols] = {};
        for (int j = row * r_->taken; j < (row + 1) * r_->taken; j++) {
            const float* x = x_ + static_cast<size_t>(r_->slots[j]) * cols_ + column;
            for (int i = 0; i < n; i++) sum[i] += r_->weights[j] * x[i];
        }
        float* y = y_ + static_cast<size_t>(row) * cols_ + column;
        for (int i = 0; i < n; i++) y[i] = onto_ ? y[i] + sum[i] : sum[i];
    }

    const Routing* r_;
    const float* x_;
    float* y_;
    int cols_;
    bool onto_;
};

}  // namespace tinychat
