// The ops of models whose residual is several streams side by side (AltUp), and what they do with small factors: plain
// loops over rows, a fraction of what the linears beside them take.
#pragma once

#include "program_ops.h"

namespace tinychat {

// An op that does each row by itself. f(row) is called for every row; cols: elements of a row, for cutting the work.
template <class F>
class RowsOp : public Op {
  public:
    RowsOp(const char* name, int cols, F f) : name_(name), cols_(cols), f_(std::move(f)) {}
    const char* name() const override { return name_; }
    int chunks(const StepState& s, int) override { return pieces(s.rows, row_piece(cols_)); }
    void run(const StepState& s, int c, int) override {
        const int r0 = c * row_piece(cols_), r1 = std::min(s.rows, r0 + row_piece(cols_));
        for (int r = r0; r < r1; r++) f_(static_cast<size_t>(r));
    }

  private:
    const char* name_;
    int cols_;
    F f_;
};

template <class F>
std::unique_ptr<Op> rows_op(const char* name, int cols, F f) {
    return std::make_unique<RowsOp<F>>(name, cols, std::move(f));
}

// √ of the mean square of n values; of at least `least`.
inline float magnitude(const float* x, int n, float least) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return std::sqrt(std::max(sum / static_cast<float>(n), least));
}

inline std::unique_ptr<Op> tanh_op(float* x, int n) {
    return rows_op("tanh", n, [=](size_t r) {
        for (int i = 0; i < n; i++) x[r * n + i] = std::tanh(x[r * n + i]);
    });
}

// y[i] = x[i] + Σ_j by[i · streams + j] · x[j]
inline std::unique_ptr<Op> mix_op(std::vector<const float*> x, const float* by, std::vector<float*> y, int n) {
    const int streams = static_cast<int>(x.size());
    return rows_op("mix_streams", n * streams, [=](size_t r) {
        for (int i = 0; i < streams; i++) {
            const float* c = by + r * streams * streams + static_cast<size_t>(i) * streams;
            float* out = y[i] + r * n;
            for (int k = 0; k < n; k++) out[k] = x[i][r * n + k];
            for (int j = 0; j < streams; j++)
                for (int k = 0; k < n; k++) out[k] += c[j] * x[j][r * n + k];
        }
    });
}

// x[i] += (1 + by[i]) · (now - x[0]), the first one last.
inline std::unique_ptr<Op> correct_op(std::vector<float*> x, const float* now, const float* by, int n) {
    const int streams = static_cast<int>(x.size());
    return rows_op("correct_streams", n * streams, [=](size_t r) {
        for (int i = streams - 1; i >= 0; i--) {
            const float c = 1.0f + by[r * streams + i];
            for (int k = 0; k < n; k++) x[i][r * n + k] += c * (now[r * n + k] - x[0][r * n + k]);
        }
    });
}

inline std::unique_ptr<Op> times_op(const float* x, const float* by, float* y, int n) {
    return rows_op("times", n, [=](size_t r) {
        for (int k = 0; k < n; k++) y[r * n + k] = x[r * n + k] * by[k];
    });
}

// x scaled to the magnitude of `like`.
inline std::unique_ptr<Op> resize_op(float* x, const float* like, int n) {
    return rows_op("resize", 2 * n, [=](size_t r) {
        const float by = magnitude(like + r * n, n, 0.0f) / magnitude(x + r * n, n, 1e-5f);
        for (int k = 0; k < n; k++) x[r * n + k] *= by;
    });
}

// y = factor · Σ x
inline std::unique_ptr<Op> sum_op(std::vector<const float*> x, float factor, float* y, int n) {
    return rows_op("sum", n * static_cast<int>(x.size()), [=](size_t r) {
        for (int k = 0; k < n; k++) {
            float sum = x[0][r * n + k];
            for (size_t i = 1; i < x.size(); i++) sum += x[i][r * n + k];
            y[r * n + k] = factor * sum;
        }
    });
}

// The first half of each row: how far its values lie above their mean and so many deviations, else 0.
inline std::unique_ptr<Op> cut_op(float* x, int n, float deviations) {
    return rows_op("cut_gates", 2 * n, [=](size_t r) {
        float* gate = x + r * 2 * n;
        float sum = 0.0f, squares = 0.0f;
        for (int k = 0; k < n; k++) sum += gate[k];
        const float mean = sum / static_cast<float>(n);
        for (int k = 0; k < n; k++) squares += (gate[k] - mean) * (gate[k] - mean);
        const float cutoff = mean + std::sqrt(squares / static_cast<float>(n)) * deviations;
        for (int k = 0; k < n; k++) gate[k] = gate[k] < cutoff ? 0.0f : gate[k] - cutoff;  // NaN stays
    });
}

}  // namespace tinychat
