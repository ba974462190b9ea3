// What latent attention has beside attention: a matrix for each head, and rows put together out of their parts.
#pragma once

#include "stream_ops.h"

namespace tinychat {

// The first `in[h]->k` of the `width` columns of each head h as its linear reads them.
inline std::unique_ptr<Op> head_input_op(const KernelTable& k, const float* x, int width, const int32_t* perm,
                                         std::vector<const Activations*> in) {
    const size_t ld = in.size() * static_cast<size_t>(width);
    return rows_op("head_input", static_cast<int>(ld), [=, &k](size_t r) {
        const int row = static_cast<int>(r);
        for (size_t h = 0; h < in.size(); h++) k.quantize({x + h * width, nullptr, perm, *in[h], row, row + 1, ld});
    });
}

// The parts of a layer's rows: q [heads][plain + rotated], absorbed [heads][rank], row [rank + rotated] → qkv: queries
// [heads][rotated + rank] and a key [rotated + rank], whose compressed part is normed.
struct LatentRows {
    const float *q, *absorbed, *row, *norm;
    float eps;
    int heads, plain, rotated, rank;
    bool neighbours;  // rotated values come in pairs (x[2i], x[2i + 1]); they leave as halves
    float* qkv;

    int cols() const { return rotated + rank; }
};

inline std::unique_ptr<Op> latent_rows_op(const KernelTable& k, const LatentRows& a) {
    const size_t ld = static_cast<size_t>(a.heads + 1) * a.cols();
    return rows_op("latent_rows", static_cast<int>(ld), [=, &k](size_t r) {
        const auto turned = [&](const float* from, float* to) {
            const int half = a.rotated / 2;
            for (int i = 0; i < half; i++)
                to[i] = from[a.neighbours ? 2 * i : i], to[half + i] = from[a.neighbours ? 2 * i + 1 : half + i];
        };
        const int query = a.plain + a.rotated;
        const float *q = a.q + r * a.heads * query, *absorbed = a.absorbed + r * a.heads * a.rank;
        float* to = a.qkv + r * ld;
        for (int h = 0; h < a.heads; h++, to += a.cols()) {
            turned(q + h * query + a.plain, to);
            memcpy(to + a.rotated, absorbed + h * a.rank, a.rank * sizeof(float));
        }
        const float* row = a.row + r * a.cols();
        turned(row + a.rank, to);
        memcpy(to + a.rotated, row, a.rank * sizeof(float));
        k.norm_heads({to + a.rotated, ld, a.rank, 0, a.rank, a.rank, a.norm, a.norm, a.eps, 0, 1});
    });
}

}  // namespace tinychat
