// The ops that programs are made of: how each cuts its work, and the kernel that does a piece.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "program.h"

namespace tinychat {

// Elements that make a piece of row work worth a thread: a microsecond or two against a barrier of half of one.
constexpr int kRowWork = 2048;

// Rows in pieces of at least kRowWork elements.
inline int row_piece(int cols) { return std::max(1, kRowWork / std::max(1, cols)); }
inline int pieces(int n, int piece) { return (n + piece - 1) / piece; }

class EmbedOp : public Op {
  public:
    EmbedOp(const KernelTable& k, const LinearWeights* w, float* out, float scale, const float* add, float factor)
        : k_(k), w_(w), out_(out), scale_(scale), add_(add), factor_(factor) {}
    const char* name() const override { return "embed"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, 8); }
    void run(const StepState& s, int c, int) override {
        k_.embed({w_, s.ids.data(), out_, scale_, c * 8, std::min(s.rows, c * 8 + 8), add_, factor_});
    }

  private:
    const KernelTable& k_;
    const LinearWeights* w_;
    float* out_;
    float scale_;
    const float* add_;
    float factor_;
};

class RopeTableOp : public Op {
  public:
    RopeTableOp(const KernelTable& k, std::vector<double> freq, double magnitude, float* table)
        : k_(k), freq_(std::move(freq)), magnitude_(magnitude), table_(table) {}
    const char* name() const override { return "rope_table"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, 16); }
    void run(const StepState& s, int c, int) override {
        k_.rope_table({freq_.data(), static_cast<int>(freq_.size()), magnitude_, s.positions.data(), table_, c * 16,
                       std::min(s.rows, c * 16 + 16)});
    }

  private:
    const KernelTable& k_;
    std::vector<double> freq_;
    double magnitude_;
    float* table_;
};

class NormOp : public Op {
  public:
    NormOp(const KernelTable& k, const float* x, const float* weight, float eps, const Activations* out,
           const float* add, bool tail)
        : k_(k), x_(x), weight_(weight), eps_(eps), out_(out), add_(add), tail_(tail) {}
    const char* name() const override { return "rms_norm"; }
    int chunks(const StepState& s, int) override { return pieces(tail_ ? s.logit_rows() : s.rows, row_piece(out_->k)); }
    void run(const StepState& s, int c, int) override {
        const int piece = row_piece(out_->k), rows = tail_ ? s.logit_rows() : s.rows;
        const int32_t* from = tail_ ? s.asked.data() : nullptr;
        k_.rms_norm({x_, from, weight_, eps_, *out_, add_, c * piece, std::min(rows, (c + 1) * piece)});
    }

  private:
    const KernelTable& k_;
    const float *x_, *weight_;
    float eps_;
    const Activations* out_;
    const float* add_;
    bool tail_;
};

class HeadNormOp : public Op {
  public:
    HeadNormOp(const KernelTable& k, HeadNormArgs args) : k_(k), args_(args) {}
    const char* name() const override { return "norm_heads"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, piece()); }
    void run(const StepState& s, int c, int) override {
        HeadNormArgs a = args_;
        a.r0 = c * piece(), a.r1 = std::min(s.rows, (c + 1) * piece());
        k_.norm_heads(a);
    }

  private:
    int piece() const { return row_piece(args_.q_cols + args_.k_cols); }
    const KernelTable& k_;
    HeadNormArgs args_;
};

class QuantizeOp : public Op {
  public:
    QuantizeOp(const KernelTable& k, const float* x, const int32_t* perm, const Activations* out, bool tail)
        : k_(k), x_(x), perm_(perm), out_(out), tail_(tail) {}
    const char* name() const override { return "quantize"; }
    int chunks(const StepState& s, int) override { return pieces(tail_ ? s.logit_rows() : s.rows, row_piece(out_->k)); }
    void run(const StepState& s, int c, int) override {
        const int piece = row_piece(out_->k), rows = tail_ ? s.logit_rows() : s.rows;
        k_.quantize({x_, tail_ ? s.asked.data() : nullptr, perm_, *out_, c * piece, std::min(rows, (c + 1) * piece)});
    }

  private:
    const KernelTable& k_;
    const float* x_;
    const int32_t* perm_;
    const Activations* out_;
    bool tail_;
};

// Tiles of several weights that share an output (q, k, v; gate, up), cut by tile across all of them. In prefill gate
// and up go through the activation function while they are still in the cache: written out, they are the largest thing
// a layer makes.
class LinearOp : public Op {
  public:
    LinearOp(const KernelTable& k, const std::vector<float*>* scratch, std::vector<LinearPart> parts, float* y, int ldy,
             const float* add)
        : k_(k), scratch_(scratch), parts_(std::move(parts)), y_(y), ldy_(ldy), add_(add) {
        for (const auto& p : parts_) tiles_ += p.w->tiles();
    }
    // What follows is f(y[:, :k]) · y[:, k:2k] → out. False: it must be done by itself.
    bool fuse_gate(const float* y, const Activations* out, const GateFunction& f) {
        if (y != y_ || add_ || out->k * 2 != ldy_ || out->k % kTile || out->group > kGateColumns) return false;
        for (const auto& p : parts_)
            if (p.column % kTile) return false;
        gate_out_ = out, gate_ = f;
        return true;
    }
    bool fused(const StepState& s) const { return gate_out_ && s.rows > 2 * kRowBlock; }
    static size_t gate_scratch() { return static_cast<size_t>(kPanelRows) * 2 * kGateColumns; }

    const char* name() const override { return "linear"; }
    int chunks(const StepState& s, int threads) override {
        rows_ = s.rows;
        if (fused(s)) {
            // Columns first: their weights come once. Rows too where that leaves threads without work.
            const int across = pieces(gate_out_->k, gate_columns());
            rows_piece_ = rows_;
            while (across * pieces(rows_, rows_piece_) < 4 * threads && rows_piece_ > kPanelRows)
                rows_piece_ = static_cast<int>(round_up(rows_piece_ / 2, kPanelRows));
            return across * pieces(rows_, rows_piece_);
        }
        piece_ = piece(s, threads);
        return pieces(tiles_, piece_);
    }
    bool weights_of(const StepState& s, int thread, int threads, const uint8_t** p, size_t* n) const override {
        const int size = piece(s, threads);
        int tile = static_cast<int>(static_cast<long long>(pieces(tiles_, size)) * thread / threads) * size;
        for (const auto& part : parts_) {
            if (tile < part.w->tiles()) {
                *p = part.w->data + tile * part.w->tile_bytes();
                *n = std::min(size, part.w->tiles() - tile) * part.w->tile_bytes();
                return true;
            }
            tile -= part.w->tiles();
        }
        return false;
    }
    void run(const StepState& s, int c, int thread) override {
        if (fused(s)) return run_gated(c, (*scratch_)[thread]);
        int t0 = c * piece_, t1 = std::min(tiles_, t0 + piece_);
        for (const auto& p : parts_) {
            const int n = p.w->tiles(), a = std::max(t0, 0), b = std::min(t1, n);
            if (a < b)
                k_.linear({p.w, p.x, rows_, y_ + p.column, static_cast<size_t>(ldy_), add_ ? add_ + p.column : nullptr,
                           static_cast<size_t>(ldy_), a, b});
            t0 -= n, t1 -= n;
        }
    }

  private:
    int piece(const StepState& s, int threads) const {
        const int size = std::max(1, tiles_ / (threads * 8));
        // Prefill: the chunk's weights stay in L2 while panels of rows pass over them.
        return s.rows > 2 * kRowBlock ? std::min(size, 8) : size;
    }
    // Whole groups of the weights behind the gate: their sums must not be cut.
    int gate_columns() const { return kGateColumns / gate_out_->group * gate_out_->group; }
    void run_gated(int c, float* scratch) {
        const int k = gate_out_->k, across = pieces(k, gate_columns());
        const int c0 = c % across * gate_columns(), c1 = std::min(k, c0 + gate_columns());
        const int r0 = c / across * rows_piece_, r1 = std::min(rows_, r0 + rows_piece_);
        float* up = scratch + static_cast<size_t>(kPanelRows) * kGateColumns;
        for (int row = r0; row < r1; row += kPanelRows) {
            const int n = std::min(kPanelRows, r1 - row);
            outputs(c0, c1, row, n, scratch);
            outputs(k + c0, k + c1, row, n, up);
            k_.gate_mul({scratch, up, kGateColumns, gate_out_->from_row(row), gate_, 0, n, c0, c1});
        }
    }
    // Columns c0…c1-1 of y, of n rows, side by side.
    void outputs(int c0, int c1, int row, int n, float* y) {
        for (const auto& p : parts_) {
            const int a = std::max(c0, p.column), b = std::min(c1, p.column + p.w->n);
            if (a >= b) continue;
            const LinearWeights w = p.w->from_tile((a - p.column) / kTile);
            const Activations x = p.x->from_row(row);
            k_.linear({&w, &x, n, y + (a - c0), kGateColumns, nullptr, 0, 0, pieces(b - a, kTile)});
        }
    }

    static constexpr int kGateColumns = 128;
    const KernelTable& k_;
    const std::vector<float*>* scratch_;
    std::vector<LinearPart> parts_;
    float* y_;
    int ldy_;
    const float* add_;
    int tiles_ = 0, piece_ = 1, rows_ = 0, rows_piece_ = 0;
    const Activations* gate_out_ = nullptr;
    GateFunction gate_;
};

class GateOp : public Op {
  public:
    // routing: x and out are rows of experts, [slots]; or null. before: the linear that makes x, where that may do it
    // all; or null. up: rows of ld_up values, or null: it stands behind the gate in x.
    GateOp(const KernelTable& k, const float* x, const Activations* out, const GateFunction& f, const Routing* routing,
           const LinearOp* before, const float* up, size_t ld_up)
        : k_(k), x_(x), out_(out), f_(f), routing_(routing), before_(before), up_(up), ld_up_(ld_up) {}
    const char* name() const override {
        static const char* const names[] = {"silu_mul", "gelu_mul", "relu_square", "clamped_mul"};
        return names[static_cast<int>(f_.kind)];
    }
    int chunks(const StepState& s, int) override {
        if (before_ && before_->fused(s)) return 0;
        return (routing_ ? routing_->end : s.rows) * pieces(out_->k, cols());
    }
    void run(const StepState&, int c, int) override {
        const int across = pieces(out_->k, cols()), row = c / across, col = c % across * cols();
        if (routing_ && routing_->row_of[row] < 0) return;
        const size_t ld = static_cast<size_t>(up_ ? 1 : 2) * out_->k;
        const float *gate = x_ + col, *up = up_ ? up_ + col : gate + out_->k;
        k_.gate_mul({gate, up, ld, *out_, f_, row, row + 1, col, std::min(out_->k, col + cols()), ld_up_});
    }

  private:
    // Whole weight groups, about 4096 columns: their sums must not be cut.
    int cols() const { return std::max(1, 4096 / out_->group) * out_->group; }
    const KernelTable& k_;
    const float* x_;
    const Activations* out_;
    GateFunction f_;
    const Routing* routing_;
    const LinearOp* before_;
    const float* up_;
    size_t ld_up_;
};

// y = x with its last columns once more behind them.
class RepeatColumnsOp : public Op {
  public:
    RepeatColumnsOp(const float* x, int cols, int last, float* y) : x_(x), cols_(cols), last_(last), y_(y) {}
    const char* name() const override { return "repeat_columns"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, row_piece(cols_)); }
    void run(const StepState& s, int c, int) override {
        for (int r = c * row_piece(cols_), end = std::min(s.rows, r + row_piece(cols_)); r < end; r++) {
            const float* x = x_ + static_cast<size_t>(r) * cols_;
            float* y = y_ + static_cast<size_t>(r) * (cols_ + last_);
            memcpy(y, x, cols_ * sizeof(float));
            memcpy(y + cols_, x + cols_ - last_, last_ * sizeof(float));
        }
    }

  private:
    const float* x_;
    int cols_, last_;
    float* y_;
};

// Rows times one number, in place.
class ScaleRowsOp : public Op {
  public:
    ScaleRowsOp(float* x, int cols, const float* by) : x_(x), cols_(cols), by_(by) {}
    const char* name() const override { return "scale_rows"; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, row_piece(cols_)); }
    void run(const StepState& s, int c, int) override {
        const int r0 = c * row_piece(cols_), r1 = std::min(s.rows, r0 + row_piece(cols_));
        float *x = x_ + static_cast<size_t>(r0) * cols_, *end = x_ + static_cast<size_t>(r1) * cols_;
        for (const float by = *by_; x < end; x++) *x *= by;
    }

  private:
    float* x_;
    int cols_;
    const float* by_;
};

// Logits of the asked rows; for a greedy step each piece keeps only its best id, and no logits array is written.
class LmHeadOp : public Op {
  public:
    static constexpr int kRows = kPanelRows, kCols = 256;

    LmHeadOp(const KernelTable& k, const std::vector<float*>* scratch, const LinearWeights* w, const Activations* x,
             float scale, float cap)
        : k_(k), scratch_(scratch), w_(w), x_(x), scale_(scale), cap_(cap) {}
    const char* name() const override { return "lm_head"; }
    void reserve(const StepState& s, int threads) override {
        if (!s.greedy) return;
        chunks(s, threads);
        best_.resize(static_cast<size_t>(s.logit_rows()) * pieces(w_->tiles(), piece_));
    }
    int chunks(const StepState& s, int threads) override {
        piece_ = piece(s, threads);
        chunks_ = s.logit_rows() ? pieces(w_->tiles(), piece_) : 0;
        return chunks_;
    }
    bool weights_of(const StepState& s, int thread, int threads, const uint8_t** p, size_t* n) const override {
        if (!s.logit_rows()) return false;
        const int size = piece(s, threads), count = pieces(w_->tiles(), size);
        const int tile = static_cast<int>(static_cast<long long>(count) * thread / threads) * size;
        *p = w_->data + tile * w_->tile_bytes();
        *n = std::min(size, w_->tiles() - tile) * w_->tile_bytes();
        return true;
    }
    void run(const StepState& s, int c, int thread) override {
        const int t0 = c * piece_, t1 = std::min(w_->tiles(), t0 + piece_), rows = s.logit_rows();
        if (!s.logits) return best_of(c, t0, t1, rows, (*scratch_)[thread]);
        const size_t n = w_->n;
        k_.linear({w_, x_, rows, s.logits, n, nullptr, 0, t0, t1});
        finish(s.logits + t0 * kTile, n, rows, std::min(w_->n, t1 * kTile) - t0 * kTile);
    }
    ArgmaxResult best(int row) const {
        ArgmaxResult top = best_[static_cast<size_t>(row) * chunks_];
        for (int c = 1; c < chunks_; c++) {
            const ArgmaxResult& r = best_[static_cast<size_t>(row) * chunks_ + c];
            if (r.value > top.value) top = r;  // chunks are in id order, so a tie keeps the lowest id
        }
        return top;
    }

  private:
    int piece(const StepState& s, int threads) const {
        const int size = std::max(1, w_->tiles() / (threads * 16));
        return s.logit_rows() > 2 * kRowBlock ? std::min(size, 8) : size;
    }
    // Greedy steps too: rounding may make two logits equal, and then the lowest id is chosen.
    void finish(float* y, size_t ld, int rows, int cols) const {
        if (scale_ != 1.0f || cap_ != 0.0f) k_.finish_logits({y, ld, rows, cols, scale_, cap_});
    }
    void best_of(int c, int t0, int t1, int rows, float* scratch) {
        constexpr int kTiles = kCols / kTile;
        for (int r = 0; r < rows; r += kRows) {
            const int n = std::min(kRows, rows - r);
            const Activations x = x_->from_row(r);
            for (int t = t0; t < t1; t += kTiles) {
                const int end = std::min(t1, t + kTiles), first = t * kTile,
                          cols = std::min(w_->n, end * kTile) - first;
                const LinearWeights w = w_->from_tile(t);  // so that they land at the scratch's start
                k_.linear({&w, &x, n, scratch, kCols, nullptr, 0, 0, end - t});
                finish(scratch, kCols, n, cols);
                for (int m = 0; m < n; m++) {
                    ArgmaxResult found = k_.argmax(scratch + m * kCols, cols);
                    if (found.index >= 0) found.index += first;
                    ArgmaxResult& top = best_[static_cast<size_t>(r + m) * chunks_ + c];
                    if (t == t0 || found.value > top.value) top = found;
                }
            }
        }
    }

    const KernelTable& k_;
    const std::vector<float*>* scratch_;
    const LinearWeights* w_;
    const Activations* x_;
    float scale_, cap_;
    int piece_ = 1, chunks_ = 0;
    std::vector<ArgmaxResult> best_;
};

class GreedyOp : public Op {
  public:
    explicit GreedyOp(const LmHeadOp* head) : head_(head) {}
    const char* name() const override { return "greedy"; }
    int chunks(const StepState& s, int) override { return s.greedy && s.logit_rows() ? 1 : 0; }
    void run(const StepState& s, int, int) override {
        for (int m = 0; m < s.logit_rows(); m++) s.greedy[m] = head_->best(m).index;
    }

  private:
    const LmHeadOp* head_;
};

}  // namespace tinychat
