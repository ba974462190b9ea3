// Python's view of the CPU kernels: tinychat.kernels_cpu._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <cmath>
#include <stdexcept>

#include "bandwidth.h"
#include "cpu_info.h"
#include "pack.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tinychat;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

LinearWeights describe(int kind, int meta, int n, int k, int group) {
    LinearWeights w;
    require(kind >= 0 && kind <= 4 && meta >= 0 && meta <= 4 && n > 0 && k > 0, "not a linear");
    w.kind = static_cast<WeightKind>(kind);
    w.meta = static_cast<Meta>(meta);
    w.n = n, w.k = k, w.group = group;
    if (w.quantized()) {
        require(group > 0 && group % kActGroup == 0 && k % group == 0,
                "the group must be a multiple of 32 and divide k");
        require(w.meta != Meta::kNone, "a quantized linear needs scales");
        require(w.kind == WeightKind::kW4 || w.meta == Meta::kSym || w.meta == Meta::kFloat,
                "8-bit weights are symmetric");
    } else {
        require(w.meta == Meta::kNone, "a dense linear has no scales");
    }
    return w;
}

bool readable(const LinearWeights& w, const Activations& x) {
    return w.quantized() ? x.q != nullptr && x.group == w.group : x.f != nullptr;
}

// Packed weights; keeps the memory that they lie in alive.
struct Linear {
    LinearWeights w;
    Bytes data;
    nb::object bias_owner;

    Linear(int kind, int meta, int n, int k, int group, Bytes bytes, nb::object bias) : data(bytes), bias_owner(bias) {
        w = describe(kind, meta, n, k, group);
        require(bytes.size() == w.bytes(), "the packed bytes do not have the size of the shape");
        require(reinterpret_cast<uintptr_t>(bytes.data()) % 64 == 0, "packed weights must be aligned to 64 bytes");
        w.data = bytes.data();
        if (!bias.is_none()) {
            auto b = nb::cast<In<float>>(bias);
            require(static_cast<int>(b.size()) == n, "the bias does not have one value for each output");
            w.bias = b.data();
        }
    }
};

// A buffer of fp32 rows, and the quantized view of a value. rows 0: those of the program.
struct Floats {
    float* p;
    int cols;
    int rows = 0;
};
struct Rows {
    Activations* a;
    int rows = 0;
};
struct Routes {
    Routing* r;
    int slots() const { return static_cast<int>(r->row_of.size()); }
};

// A program and what its pointers lead to.
struct PyProgram {
    Program program;
    std::vector<nb::object> keep;
    nb::object pool_owner;
    std::vector<LinearWeights> heads;
    int vocab_in = 0, vocab_out = 0;
    bool closed = false;

    PyProgram(const std::string& isa, int threads, int max_rows) : program(find(isa), threads, max_rows) {
        require(threads >= 1 && threads <= 1024 && max_rows >= 1, "threads 1…1024, at least one row");
    }
    static IsaKind find(const std::string& isa) {
        for (IsaKind i : supported_isas())
            if (isa == isa_name(i)) return i;
        throw std::invalid_argument("this CPU does not run " + isa);
    }
    // With room behind the last row of a view, kernels would still write only what was asked for.
    void keep_alive(nb::handle h) { keep.push_back(nb::borrow(h)); }
    // The order of n inputs; null for None.
    const int32_t* permutation(const nb::object& perm, int n) {
        if (perm.is_none()) return nullptr;
        auto a = nb::cast<In<int32_t>>(perm);
        require(static_cast<int>(a.size()) == n, "the permutation has the wrong size");
        for (size_t i = 0; i < a.size(); i++)
            require(a.data()[i] >= 0 && a.data()[i] < n, "the permutation leaves the row");
        keep_alive(perm);
        return a.data();
    }
};

// Positive step inputs, checked here once so that kernels need not: a wrong id or block is an exception, not a crash.
void run_step(PyProgram& p, In<int32_t> ids, long long position, int length, In<int32_t> blocks, int logits_from,
              nb::object logits, nb::object greedy, nb::object scores, int scored_rows) {
    StepState s;
    const KvPool& kv = p.program.kv();
    s.rows = static_cast<int>(ids.size());
    require(s.rows >= 1 && s.rows <= p.program.max_rows(), "a step has 1 to max_rows tokens");
    require(position >= 0 && length >= 0, "position and length must not be negative");
    require(logits_from >= 0 && logits_from <= s.rows, "logits_from is outside the step");
    for (size_t i = 0; p.vocab_in && i < ids.size(); i++)
        require(ids.data()[i] >= 0 && ids.data()[i] < p.vocab_in, "a token id is outside the vocabulary");
    if (kv.n_layers) {
        const size_t need = (static_cast<size_t>(length) + s.rows + kBlockSlots - 1) / kBlockSlots;
        require(blocks.size() >= need, "the block table does not cover the step");
        for (size_t i = 0; i < need; i++)
            require(blocks.data()[i] >= 0 && blocks.data()[i] < kv.n_blocks, "a block is outside the pool");
    }
    s.position = position, s.length = length, s.logits_from = logits_from;
    s.ids = ids.data(), s.blocks = blocks.data();
    if (!logits.is_none()) {
        auto out = nb::cast<Out<float>>(logits);
        require(out.size() == static_cast<size_t>(s.logit_rows()) * p.vocab_out, "logits have the wrong size");
        s.logits = out.data();
    }
    if (!greedy.is_none()) {
        auto out = nb::cast<Out<int32_t>>(greedy);
        require(out.size() == static_cast<size_t>(s.logit_rows()), "greedy ids have the wrong size");
        s.greedy = out.data();
    }
    if (!scores.is_none()) {
        auto out = nb::cast<Out<float>>(scores);
        require(scored_rows >= 1 && scored_rows <= s.rows, "scored rows are rows of the step");
        require(out.ndim() == 4 && (out.shape(0) == 1 || static_cast<int>(out.shape(0)) == scored_rows) &&
                    static_cast<int>(out.shape(1)) == kv.n_layers && static_cast<int>(out.shape(2)) == kv.n_kv &&
                    static_cast<int>(out.shape(3)) >= length + s.rows,
                "scores have the wrong shape");
        s.scores = out.data(), s.scored_rows = scored_rows;
        s.sum_scores = out.shape(0) == 1, s.score_slots = static_cast<int>(out.shape(3));
    }
    require(s.logit_rows() == 0 || s.logits || s.greedy, "the step asks for logits and gives no place for them");
    nb::gil_scoped_release release;
    p.program.run(s);
}

// n of an array [layers, kv_heads, n] that goes with a block table of the pool.
template <class T>
int slots_of_heads(const PyProgram& p, const In<int32_t>& blocks, const In<T>& a) {
    const KvPool& kv = p.program.kv();
    require(a.ndim() == 3 && static_cast<int>(a.shape(0)) == kv.n_layers && static_cast<int>(a.shape(1)) == kv.n_kv,
            "slots are given for each layer and KV head");
    for (size_t i = 0; i < blocks.size(); i++)
        require(blocks.data()[i] >= 0 && blocks.data()[i] < kv.n_blocks, "a block is outside the pool");
    return static_cast<int>(a.shape(2));
}

void bind_packing(nb::module_& m) {
    m.def(
        "packed_bytes",
        [](int kind, int meta, int n, int k, int group) { return describe(kind, meta, n, k, group).bytes(); }, "kind"_a,
        "meta"_a, "n"_a, "k"_a, "group"_a, "Bytes of a packed linear.");
    m.def(
        "pack",
        [](int kind, int meta, int n, int k, int group, AnyArray codes, nb::object scales, nb::object aux,
           Out<uint8_t> out, int threads) {
            LinearWeights w = describe(kind, meta, n, k, group);
            const size_t elements = static_cast<size_t>(n) * k;
            const size_t width = w.kind == WeightKind::kF32                                  ? 4
                                 : w.kind == WeightKind::kF16 || w.kind == WeightKind::kBF16 ? 2
                                                                                             : 1;
            require(codes.nbytes() == elements * width, "codes have the wrong size");
            require(out.nbytes() == w.bytes(), "the output has the wrong size");
            const void *sp = nullptr, *ap = nullptr;
            AnyArray sa, aa;
            if (w.quantized()) {
                const size_t groups = elements / group;
                sa = nb::cast<AnyArray>(scales);
                require(sa.nbytes() == groups * (w.meta == Meta::kFloat ? 4 : 2), "scales have the wrong size");
                sp = sa.data();
                if (w.meta != Meta::kSym) {
                    aa = nb::cast<AnyArray>(aux);
                    const size_t size = w.meta == Meta::kFloat ? 4 : w.meta == Meta::kOffset16 ? 2 : 1;
                    require(aa.nbytes() == groups * size, "zeros or offsets have the wrong size");
                    ap = aa.data();
                }
            }
            nb::gil_scoped_release release;
            pack_linear(w, codes.data(), sp, ap, out.data(), threads);
        },
        "kind"_a, "meta"_a, "n"_a, "k"_a, "group"_a, "codes"_a, "scales"_a.none(), "aux"_a.none(), "out"_a, "threads"_a,
        "Canonical weights into tiles.");
    nb::class_<Linear>(m, "Linear")
        .def(nb::init<int, int, int, int, int, Bytes, nb::object>(), "kind"_a, "meta"_a, "n"_a, "k"_a, "group"_a,
             "data"_a, "bias"_a.none())
        .def_prop_ro("bytes", [](const Linear& l) { return l.w.bytes(); })
        .def_prop_ro("shape", [](const Linear& l) { return std::make_pair(l.w.n, l.w.k); })
        .def_prop_ro("group", [](const Linear& l) { return l.w.group; })
        .def_prop_ro("quantized", [](const Linear& l) { return l.w.quantized(); });
}

// Linears of experts: all of the same shapes, reading rows that are slots of the routes.
std::vector<std::vector<LinearPart>> expert_parts(
    PyProgram& p, const Routes& routes, const std::vector<std::vector<std::tuple<nb::object, Rows, int>>>& experts,
    Floats out) {
    require(static_cast<int>(experts.size()) == routes.r->n_experts, "there is not one linear for each expert");
    require(out.rows >= routes.slots(), "the output has too few slots");
    std::vector<std::vector<LinearPart>> parts;
    for (const auto& expert : experts) {
        std::vector<LinearPart> native;
        for (const auto& [weight, rows, column] : expert) {
            const Linear& w = nb::cast<const Linear&>(weight);
            require(w.w.k == rows.a->k && column >= 0 && column + w.w.n <= out.cols, "a linear does not fit");
            require(readable(w.w, *rows.a), "a linear's input has another form");
            require(rows.rows >= routes.slots(), "the input has too few slots");
            p.keep_alive(weight);
            native.push_back({&w.w, rows.a, column});
        }
        require(!native.empty() && (parts.empty() || native.size() == parts[0].size()), "experts differ");
        for (size_t i = 0; !parts.empty() && i < native.size(); i++)
            require(native[i].w->n == parts[0][i].w->n, "experts differ");
        parts.push_back(std::move(native));
    }
    return parts;
}

void bind_experts(nb::class_<PyProgram>& program) {
    program
        .def(
            "routes",
            [](PyProgram& p, int n_experts, int taken) {
                require(taken >= 1 && taken <= n_experts && n_experts <= 1 << 17, "experts taken are some of all");
                return Routes{p.program.routing(n_experts, taken)};
            },
            "n_experts"_a, "taken"_a)
        .def(
            "route",
            [](PyProgram& p, Floats scores, Routes routes, bool normalize) {
                require(scores.cols == routes.r->n_experts, "there is not one score for each expert");
                p.program.route(scores.p, routes.r, normalize);
            },
            "scores"_a, "routes"_a, "normalize"_a)
        .def(
            "expert_input",
            [](PyProgram& p, Routes routes, Floats x, std::vector<std::vector<std::pair<Rows, nb::object>>> inputs) {
                require(static_cast<int>(inputs.size()) == routes.r->n_experts, "each expert has its inputs");
                std::vector<std::vector<ExpertInput>> native;
                for (const auto& expert : inputs) {
                    native.emplace_back();
                    for (const auto& [rows, perm] : expert) {
                        require(rows.a->k == x.cols && rows.rows >= routes.slots(), "an expert's input does not fit");
                        native.back().push_back({rows.a, p.permutation(perm, x.cols)});
                    }
                    require(!native.back().empty(), "each expert has its inputs");
                }
                p.program.expert_input(routes.r, x.p, x.rows < routes.slots(), std::move(native));
            },
            "routes"_a, "x"_a, "inputs"_a, "inputs: for each expert, rows to write and the order of its inputs or None")
        .def(
            "expert_linear",
            [](PyProgram& p, Routes routes, std::vector<std::vector<std::tuple<nb::object, Rows, int>>> experts,
               Floats out) {
                auto parts = expert_parts(p, routes, experts, out);
                p.program.expert_linear(routes.r, std::move(parts), out.p, out.cols);
            },
            "routes"_a, "experts"_a, "out"_a)
        .def(
            "expert_silu_mul",
            [](PyProgram& p, Routes routes, Floats x, Rows out) {
                require(x.cols == 2 * out.a->k, "gate and up do not fit");
                require(x.rows >= routes.slots() && out.rows >= routes.slots(), "there are too few slots");
                p.program.gate_mul(x.p, out.a, false, routes.r);
            },
            "routes"_a, "x"_a, "out"_a)
        .def(
            "expert_sum",
            [](PyProgram& p, Routes routes, Floats x, Floats y) {
                require(x.cols == y.cols && x.rows >= routes.slots(), "the experts' outputs do not fit");
                p.program.expert_sum(routes.r, x.p, y.p, y.cols);
            },
            "routes"_a, "x"_a, "y"_a, "y += the experts' outputs, weighted");
}

void bind_program(nb::module_& m) {
    nb::class_<Routes>(m, "Routes", "Which experts the rows of a step take.").def_prop_ro("slots", [](const Routes& r) {
        return r.slots();
    });
    nb::class_<Floats>(m, "Floats", "fp32 rows of a program.").def_ro("cols", &Floats::cols);
    nb::class_<Rows>(m, "Rows", "A value as linears read it: integers, fp32, or both.")
        .def_prop_ro("floats", [](const Rows& r) {
            require(r.a->f != nullptr, "these rows have no fp32 form");
            return Floats{r.a->f, r.a->k, r.rows};
        });
    nb::class_<PyProgram> program(m, "Program");
    bind_experts(program);
    program.def(nb::init<const std::string&, int, int>(), "isa"_a, "threads"_a, "max_rows"_a)
        .def_prop_ro("max_rows", [](const PyProgram& p) { return p.program.max_rows(); })
        .def(
            "floats", [](PyProgram& p, int cols, int rows) { return Floats{p.program.floats(cols, rows), cols, rows}; },
            "cols"_a, "rows"_a = 0, "rows 0: max_rows")
        .def(
            "array",
            [](nb::object self, Floats f) {
                const int rows = f.rows ? f.rows : nb::cast<PyProgram&>(self).program.max_rows();
                const size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(f.cols)};
                return nb::ndarray<nb::numpy, float, nb::ndim<2>>(f.p, 2, shape, self);
            },
            "floats"_a, "The buffer as a numpy array [rows, cols], to look into.")
        .def(
            "rows",
            [](PyProgram& p, int k, bool as_float, int bits, int group, int rows) {
                require(bits == 0 || bits == 8 || bits == 16, "integers have 8 or 16 bits");
                require(!bits || (group > 0 && group % kActGroup == 0 && k % group == 0),
                        "quantized rows need whole groups of a multiple of 32 inputs");
                return Rows{p.program.activations(k, as_float, bits, group, rows), rows};
            },
            "k"_a, "as_float"_a, "bits"_a, "group"_a, "rows"_a = 0)
        .def(
            "embed",
            [](PyProgram& p, nb::object weight, Floats out, float scale) {
                const Linear& w = nb::cast<const Linear&>(weight);
                require(w.w.k == out.cols, "the embedding does not fit its output");
                p.keep_alive(weight);
                p.vocab_in = w.w.n;
                p.program.embed(&w.w, out.p, scale);
            },
            "weight"_a, "out"_a, "scale"_a = 1.0f)
        .def(
            "rope_table",
            [](PyProgram& p, std::vector<double> frequencies, double magnitude) {
                const int cols = 2 * static_cast<int>(frequencies.size());
                return Floats{p.program.rope_table(frequencies, magnitude), cols};
            },
            "frequencies"_a, "magnitude"_a = 1.0)
        .def(
            "rms_norm",
            [](PyProgram& p, Floats x, nb::object weight, float eps, Rows out, bool tail) {
                auto w = nb::cast<In<float>>(weight);
                require(static_cast<int>(w.size()) == x.cols && out.a->k == x.cols, "the norm's shapes differ");
                p.keep_alive(weight);
                p.program.rms_norm(x.p, w.data(), eps, out.a, tail);
            },
            "x"_a, "weight"_a, "eps"_a, "out"_a, "tail"_a)
        .def(
            "rms_norm_add",
            [](PyProgram& p, Floats x, nb::object weight, float eps, Floats y) {
                auto w = nb::cast<In<float>>(weight);
                require(static_cast<int>(w.size()) == x.cols && y.cols == x.cols, "the norm's shapes differ");
                p.keep_alive(weight);
                p.program.rms_norm_add(x.p, w.data(), eps, y.p, y.cols);
            },
            "x"_a, "weight"_a, "eps"_a, "y"_a, "y += norm(x)")
        .def(
            "norm_heads",
            [](PyProgram& p, Floats qkv, nb::object q_weight, nb::object k_weight, int q_cols, int k_cols, float eps) {
                auto q = nb::cast<In<float>>(q_weight), k = nb::cast<In<float>>(k_weight);
                const int q_width = static_cast<int>(q.size()), k_width = static_cast<int>(k.size());
                require(q_width > 0 && k_width > 0 && q_cols % q_width == 0 && k_cols % k_width == 0 &&
                            q_cols + k_cols <= qkv.cols,
                        "the heads' norms do not fit");
                p.keep_alive(q_weight), p.keep_alive(k_weight);
                p.program.norm_heads({qkv.p, static_cast<size_t>(qkv.cols), q_cols, k_cols, q_width, k_width, q.data(),
                                      k.data(), eps, 0, 0});
            },
            "qkv"_a, "q_weight"_a, "k_weight"_a, "q_cols"_a, "k_cols"_a, "eps"_a)
        .def(
            "quantize",
            [](PyProgram& p, Floats x, nb::object perm, Rows out, bool tail) {
                require(out.a->k == x.cols, "the shapes of quantize differ");
                p.program.quantize(x.p, p.permutation(perm, x.cols), out.a, tail);
            },
            "x"_a, "perm"_a.none(), "out"_a, "tail"_a)
        .def(
            "linear",
            [](PyProgram& p, std::vector<std::tuple<nb::object, Rows, int>> parts, Floats out, nb::object add_to) {
                std::vector<LinearPart> native;
                for (auto& [weight, rows, column] : parts) {
                    const Linear& w = nb::cast<const Linear&>(weight);
                    require(w.w.k == rows.a->k && column >= 0 && column + w.w.n <= out.cols, "a linear does not fit");
                    require(readable(w.w, *rows.a), "a linear's input has another form");
                    p.keep_alive(weight);
                    native.push_back({&w.w, rows.a, column});
                }
                const float* add = nullptr;
                if (!add_to.is_none()) {
                    const Floats& f = nb::cast<const Floats&>(add_to);
                    require(f.cols == out.cols, "the residual does not fit");
                    add = f.p;
                }
                p.program.linear(std::move(native), out.p, out.cols, add);
            },
            "parts"_a, "out"_a, "add_to"_a.none())
        .def(
            "rope_kv",
            [](PyProgram& p, Floats qkv, Floats table, int n_heads, int n_kv, int head_dim, int layer, float q_scale) {
                require(qkv.cols == (n_heads + 2 * n_kv) * head_dim && table.cols <= head_dim && head_dim <= 1024,
                        "the heads do not fit");
                p.program.rope_kv(qkv.p, table.p, table.cols / 2, n_heads, n_kv, head_dim, layer,
                                  q_scale ? q_scale : 1.0f / std::sqrt(static_cast<float>(head_dim)));
            },
            "qkv"_a, "table"_a, "n_heads"_a, "n_kv"_a, "head_dim"_a, "layer"_a, "q_scale"_a = 0.0f,
            "q_scale 0: 1 / sqrt(head_dim)")
        .def(
            "attention",
            [](PyProgram& p, Floats qkv, int n_heads, int n_kv, int head_dim, int layer, Floats out, int window,
               float cap) {
                require(window >= 0 && cap >= 0.0f, "a window and a cap are not negative");
                require(n_kv > 0 && n_heads % n_kv == 0 && qkv.cols == (n_heads + 2 * n_kv) * head_dim &&
                            out.cols == n_heads * head_dim,
                        "the heads do not fit");
                p.program.attention(qkv.p, n_heads, n_kv, head_dim, layer, out.p, window, cap);
            },
            "qkv"_a, "n_heads"_a, "n_kv"_a, "head_dim"_a, "layer"_a, "out"_a, "window"_a = 0, "cap"_a = 0.0f,
            "window: the last so many slots are attended to, 0 all of them; cap: of the scores, 0 none")
        .def(
            "silu_mul",
            [](PyProgram& p, Floats x, Rows out) {
                require(x.cols == 2 * out.a->k, "gate and up do not fit");
                p.program.gate_mul(x.p, out.a, false);
            },
            "x"_a, "out"_a)
        .def(
            "gelu_mul",
            [](PyProgram& p, Floats x, Rows out) {
                require(x.cols == 2 * out.a->k, "gate and up do not fit");
                p.program.gate_mul(x.p, out.a, true);
            },
            "x"_a, "out"_a)
        .def(
            "lm_head",
            [](PyProgram& p, nb::object weight, Rows x, float scale, float cap) {
                const Linear& w = nb::cast<const Linear&>(weight);
                require(w.w.k == x.a->k && readable(w.w, *x.a), "the head does not fit");
                p.keep_alive(weight);
                p.vocab_out = w.w.n;
                p.program.lm_head(&w.w, x.a, scale, cap);
            },
            "weight"_a, "x"_a, "scale"_a = 1.0f, "cap"_a = 0.0f)
        .def(
            "set_kv",
            [](PyProgram& p, nb::object pool, int n_blocks, int n_layers, int n_kv, int head_dim, int bits) {
                require(bits == 8 || bits == 16, "the cache has 8 or 16 bits");
                KvPool kv;
                kv.bits = bits;
                auto bytes = nb::cast<Out<uint8_t>>(pool);
                kv.base = bytes.data();
                kv.n_blocks = n_blocks, kv.n_layers = n_layers, kv.n_kv = n_kv, kv.head_dim = head_dim;
                require(n_blocks >= 0 && bytes.nbytes() >= kv.block_bytes() * n_blocks, "the pool is too small");
                p.pool_owner = pool;
                p.program.set_kv(kv);
            },
            "pool"_a, "n_blocks"_a, "n_layers"_a, "n_kv"_a, "head_dim"_a, "bits"_a = 16)
        .def(
            "move_slots",
            [](PyProgram& p, In<int32_t> blocks, In<int32_t> src, In<int32_t> dst) {
                const int n = slots_of_heads(p, blocks, src);
                require(slots_of_heads(p, blocks, dst) == n, "as many slots to as from");
                const int end = static_cast<int>(blocks.size()) * kBlockSlots;
                for (size_t i = 0; i < src.size(); i++)
                    require(src.data()[i] < end && dst.data()[i] < end && (src.data()[i] < 0 || dst.data()[i] >= 0),
                            "a slot is outside the block table");
                nb::gil_scoped_release release;
                p.program.move_slots(blocks.data(), src.data(), dst.data(), n);
            },
            "blocks"_a, "src"_a, "dst"_a)
        .def(
            "turn_keys",
            [](PyProgram& p, In<int32_t> blocks, std::vector<double> frequencies, In<int32_t> delta) {
                const int n = slots_of_heads(p, blocks, delta), half = static_cast<int>(frequencies.size());
                require(2 * half <= p.program.kv().head_dim, "more frequencies than the head has pairs");
                require(static_cast<size_t>(n) <= blocks.size() * kBlockSlots, "a slot is outside the block table");
                nb::gil_scoped_release release;
                p.program.turn_keys(blocks.data(), frequencies.data(), half, delta.data(), n);
            },
            "blocks"_a, "frequencies"_a, "delta"_a)
        .def(
            "value_spread",
            [](PyProgram& p, In<int32_t> blocks, In<float> weights, Out<float> out) {
                const int n = slots_of_heads(p, blocks, weights);
                require(static_cast<size_t>(n) <= blocks.size() * kBlockSlots, "a slot is outside the block table");
                require(out.size() == weights.size(), "as many results as weights");
                nb::gil_scoped_release release;
                p.program.value_spread(blocks.data(), weights.data(), out.data(), n);
            },
            "blocks"_a, "weights"_a, "out"_a)
        .def("run", &run_step, "ids"_a, "position"_a, "length"_a, "blocks"_a, "logits_from"_a, "logits"_a.none(),
             "greedy"_a.none(), "scores"_a.none() = nb::none(), "scored_rows"_a = 0)
        .def(
            "set_timing", [](PyProgram& p, bool on) { p.program.set_timing(on); }, "on"_a)
        .def(
            "timings", [](const PyProgram& p) { return p.program.timings(); },
            "(op, seconds) of the last step with timing on, barriers not included.");
}

}  // namespace

size_t kv_block_bytes(int n_layers, int n_kv, int head_dim, int bits) {
    KvPool kv;
    kv.bits = bits;
    kv.n_layers = n_layers, kv.n_kv = n_kv, kv.head_dim = head_dim;
    return kv.block_bytes();
}

NB_MODULE(_native, m) {
    m.doc() = "C++ SIMD kernels, thread pool and program executor.";
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (IsaKind isa : supported_isas()) names.emplace_back(isa_name(isa));
            return names;
        },
        "Instruction sets that this CPU runs, best first; ends with scalar.");
    m.def(
        "isa", [] { return std::string(isa_name(select_isa())); },
        "The instruction set in use: TINYCHAT_ISA, or the best. Raises RuntimeError if that one does not run here.");
    m.def("cores", &usable_cores, "Physical cores that affinity and the cgroup quota allow.");
    m.def("read_bandwidth", &read_bandwidth, nb::arg("threads"), nb::arg("bytes") = size_t{1} << 30,
          nb::arg("rounds") = 5, nb::call_guard<nb::gil_scoped_release>(),
          "Best of `rounds` plain multi-threaded reads, GB/s.");
    m.def("kv_block_bytes", &kv_block_bytes, "n_layers"_a, "n_kv"_a, "head_dim"_a, "bits"_a = 16,
          "Bytes of one block of 16 slots, all layers, in the pool that `set_kv` takes.");
    bind_packing(m);
    bind_program(m);
}
