// The verbs of latent attention, as Python calls them.
#include "bindings.h"
#include "latent_ops.h"

namespace tinychat {

void bind_latent(nb::class_<PyProgram>& program) {
    program
        .def(
            "head_linear",
            [](PyProgram& p, nb::object weight, int heads, Floats x, nb::object perm, Rows in, Floats out) {
                const Linear& w = nb::cast<const Linear&>(weight);
                require(heads >= 1 && heads <= 1024 && x.cols % heads == 0 && w.w.k <= x.cols / heads &&
                            w.w.n == out.cols && w.w.n % heads == 0 && w.w.n / heads % kTile == 0,
                        "the heads' matrices do not fit");
                const int rows = static_cast<int>(round_up(p.program.max_rows(), kRowBlock));
                require(in.a->k == w.w.k && readable(w.w, *in.a) && in.rows >= heads * rows && !w.w.bias,
                        "the heads' inputs do not fit");
                p.keep_alive(weight);
                p.program.head_linear(&w.w, heads, x.p, x.cols / heads, p.permutation(perm, w.w.k), in.a, out.p);
            },
            "weight"_a, "heads"_a, "x"_a, "perm"_a.none(), "in"_a, "out"_a,
            "each head's first columns of x times its matrix; in: rows for all heads, to be used")
        .def(
            "latent_rows",
            [](PyProgram& p, Floats q, Floats absorbed, Floats row, nb::object norm, float eps, int rotated,
               bool neighbours, Floats qkv) {
                const auto w = nb::cast<In<float>>(norm);
                const int rank = static_cast<int>(w.size());
                require(rank > 0 && rotated > 0 && rotated % 2 == 0 && row.cols == rank + rotated &&
                            absorbed.cols % rank == 0,
                        "the latent rows do not fit");
                const int heads = absorbed.cols / rank, plain = q.cols / std::max(1, heads) - rotated;
                require(heads > 0 && plain > 0 && q.cols == heads * (plain + rotated) &&
                            qkv.cols == (heads + 1) * (rotated + rank),
                        "the latent rows do not fit");
                p.keep_alive(norm);
                const LatentRows rows{q.p,   absorbed.p, row.p, w.data(),   eps,  heads,
                                      plain, rotated,    rank,  neighbours, qkv.p};
                p.program.other(latent_rows_op(p.program.kernels(), rows));
            },
            "q"_a, "absorbed"_a, "row"_a, "norm"_a, "eps"_a, "rotated"_a, "neighbours"_a, "qkv"_a,
            "queries (rotated, absorbed) of all heads, and a key (rotated, normed) behind them");
}

}  // namespace tinychat
