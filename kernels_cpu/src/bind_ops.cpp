// The verbs that write a program, as Python calls them.
#include <cmath>

#include "bindings.h"

namespace tinychat {
namespace {

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

const float* vector_of(PyProgram& p, nb::handle given, size_t n) {
    const auto v = nb::cast<In<float>>(given);
    require(v.size() == n, "a vector does not fit");
    p.keep_alive(given);
    return v.data();
}

// silu_mul or gelu_mul.
auto gate_mul(GateKind kind) {
    return [kind](PyProgram& p, Floats x, Rows out) {
        require(x.cols == 2 * out.a->k, "gate and up do not fit");
        p.program.gate_mul(x.p, out.a, {kind});
    };
}

void expert_gate_mul(PyProgram& p, const Routes& routes, const Floats& x, const Rows& out, const GateFunction& f) {
    require(x.cols == 2 * out.a->k, "gate and up do not fit");
    require(x.rows >= routes.slots() && out.rows >= routes.slots(), "there are too few slots");
    p.program.gate_mul(x.p, out.a, f, routes.r);
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
            [](PyProgram& p, Floats scores, Routes routes, bool normalize, bool sigmoid, nb::object bias, float scale,
               nb::object each, std::pair<int, int> groups) {
                require(scores.cols == routes.r->n_experts, "there is not one score for each expert");
                const auto [all, taken] = groups;
                require(taken >= 1 && taken <= all && scores.cols % all == 0 &&
                            routes.r->taken <= scores.cols / all * taken,
                        "the groups of experts do not fit");
                const size_t n = scores.cols;
                const float* added = bias.is_none() ? nullptr : vector_of(p, bias, n);
                const float* times = each.is_none() ? nullptr : vector_of(p, each, n);
                p.program.route(scores.p, routes.r, {normalize, sigmoid, added, scale, times, all, taken});
            },
            "scores"_a, "routes"_a, "normalize"_a, "sigmoid"_a = false, "bias"_a = nb::none(), "scale"_a = 1.0f,
            "each"_a = nb::none(), "groups"_a = std::make_pair(1, 1))
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
            [](PyProgram& p, Routes routes, Floats x, Rows out) { expert_gate_mul(p, routes, x, out, {}); }, "routes"_a,
            "x"_a, "out"_a)
        .def(
            "expert_gelu_mul",
            [](PyProgram& p, Routes routes, Floats x, Rows out) {
                expert_gate_mul(p, routes, x, out, {GateKind::kGelu});
            },
            "routes"_a, "x"_a, "out"_a)
        .def(
            "expert_clamped_mul",
            [](PyProgram& p, Routes routes, Floats x, Rows out, float limit, float alpha) {
                require(limit > 0.0f && alpha > 0.0f, "limit and alpha are positive");
                expert_gate_mul(p, routes, x, out, {GateKind::kClamped, limit, alpha});
            },
            "routes"_a, "x"_a, "out"_a, "limit"_a, "alpha"_a)
        .def(
            "expert_sum",
            [](PyProgram& p, Routes routes, Floats x, Floats y, bool add) {
                require(x.cols == y.cols && x.rows >= routes.slots(), "the experts' outputs do not fit");
                p.program.expert_sum(routes.r, x.p, y.p, y.cols, add);
            },
            "routes"_a, "x"_a, "y"_a, "add"_a = true, "y += the experts' outputs, weighted; or is that alone");
}

// One layer's state; all layers of a memory are alike.
StateLayer state_layer(const PyProgram& p, int memory, int layer, size_t floats) {
    require(memory >= 0 && memory < 1 << 10 && layer >= 0 && layer < 1 << 20 && floats < size_t{1} << 30,
            "there is no such state");
    const MemoryUse use = p.program.use(memory);
    require(use.layers == 0 || use.state == floats, "a memory's layers differ");
    return {memory, layer, floats};
}

void bind_states(nb::class_<PyProgram>& program) {
    program
        .def(
            "short_conv",
            [](PyProgram& p, int memory, int layer, Floats x, nb::object weight, int width, Floats out) {
                require(width >= 2 && width <= kMostTaps && x.cols == 3 * out.cols, "the convolution does not fit");
                const size_t taps = static_cast<size_t>(out.cols) * width;
                const StateLayer at = state_layer(p, memory, layer, taps - out.cols);
                p.program.short_conv(at, x.p, vector_of(p, weight, taps), out.cols, width, out.p);
            },
            "memory"_a, "layer"_a, "x"_a, "weight"_a, "width"_a, "out"_a, "weight: [width, channels]")
        .def(
            "delta_rule",
            [](PyProgram& p, int memory, int layer, std::vector<int> heads, bool tiled, std::vector<Floats> in,
               std::vector<nb::object> weights, int width, Floats qkv, Floats gates, Floats out) {
                require(heads.size() == 4 && in.size() == 3 && weights.size() == 3, "the delta rule does not fit");
                for (int n : heads) require(n >= 1 && n <= 1024, "the heads do not fit");
                const DeltaLayer at{heads[0], heads[1], heads[2], heads[3], tiled};
                require(at.n_values % at.n_keys == 0 && at.values() <= 1 << 15, "the heads do not fit");
                require(width >= 2 && width <= kMostTaps, "the convolution does not fit");
                require(in[0].cols == at.channels() && in[1].cols == at.n_values && in[2].cols == at.n_values &&
                            qkv.cols == at.channels() && gates.cols == 2 * at.n_values && out.cols == at.values(),
                        "the shapes of the delta rule differ");
                const size_t n = at.n_values, taps = static_cast<size_t>(at.channels()) * width;
                const size_t floats = static_cast<size_t>(at.values()) * at.key_dim + taps - at.channels();
                const float* conv = vector_of(p, weights[0], taps);
                const DeltaGateArgs args{
                    at,      qkv.p, in[1].p, in[2].p, vector_of(p, weights[1], n), vector_of(p, weights[2], n),
                    gates.p, 0,     0};
                p.program.delta_rule(state_layer(p, memory, layer, floats), at, in[0].p, conv, width, args, out.p);
            },
            "memory"_a, "layer"_a, "heads"_a, "tiled"_a, "inputs"_a, "weights"_a, "width"_a, "qkv"_a, "gates"_a,
            "out"_a,
            "heads: keys, values, key_dim, value_dim; inputs: qkv, beta, alpha; weights: conv [width, channels], "
            "decay, "
            "dt; qkv and gates: to be used")
        .def(
            "mamba",
            [](PyProgram& p, int memory, int layer, std::vector<int> heads, Floats x, std::vector<nb::object> weights,
               int width, std::vector<float> limits, Floats xbc, Floats gates, Floats out) {
                require(heads.size() == 4 && weights.size() == 5 && limits.size() == 2, "the layer does not fit");
                for (int n : heads) require(n >= 1 && n <= 1024, "the heads do not fit");
                const MambaLayer at{heads[0], heads[1], heads[2], heads[3]};
                require(at.n_heads % at.groups == 0 && at.values() <= 1 << 16, "the heads do not fit");
                require(width >= 2 && width <= kMostTaps, "the convolution does not fit");
                const int channels = at.channels(), values = at.values();
                require(x.cols == values + channels + at.n_heads && xbc.cols == channels && out.cols == values &&
                            gates.cols == 2 * at.n_heads,
                        "the shapes of the layer differ");
                const size_t n = at.n_heads, taps = static_cast<size_t>(channels) * width, ld = x.cols;
                const size_t floats = static_cast<size_t>(values) * at.state + taps - channels;
                ConvArgs conv{};
                conv.x = x.p + values, conv.ld = ld, conv.weight = vector_of(p, weights[0], taps);
                conv.bias = weights[1].is_none() ? nullptr : vector_of(p, weights[1], channels);
                conv.width = width, conv.y = xbc.p;
                MambaGateArgs steps{};
                steps.at = at, steps.steps = x.p + values + channels, steps.ld = ld, steps.gates = gates.p;
                steps.decay = vector_of(p, weights[2], n), steps.dt = vector_of(p, weights[3], n);
                steps.least = limits[0], steps.most = limits[1];
                MambaArgs args{};
                args.at = at, args.xbc = xbc.p, args.gates = gates.p, args.y = out.p;
                args.skip = vector_of(p, weights[4], n);
                p.program.mamba(state_layer(p, memory, layer, floats), args, conv, steps);
            },
            "memory"_a, "layer"_a, "heads"_a, "x"_a, "weights"_a, "width"_a, "limits"_a, "xbc"_a, "gates"_a, "out"_a,
            "heads: how many, their dim, state, groups; x: gate, x, B, C, steps; weights: conv [width, channels], its "
            "bias or None, decay, dt, skip; xbc and gates: to be used")
        .def(
            "norm_gated",
            [](PyProgram& p, Floats x, nb::object weight, Floats gate, float eps, int width, bool gated) {
                require(gate.cols >= x.cols && (gated || !weight.is_none()), "the norm's shapes differ");
                GatedNormArgs args{x.p, gate.p, static_cast<size_t>(gate.cols), nullptr, 0, x.cols, width, eps, gated,
                                   0,   0};
                if (!weight.is_none()) {
                    const auto w = nb::cast<In<float>>(weight);
                    const int n = static_cast<int>(w.size());
                    if (!width) args.width = n;
                    require(args.width > 0 && x.cols % args.width == 0 && (n == args.width || n == x.cols),
                            "the norm's shapes differ");
                    args.weight = w.data(), args.step = n == args.width ? 0 : args.width;
                    p.keep_alive(weight);
                }
                p.program.gated_norm(args);
            },
            "x"_a, "weight"_a.none(), "gate"_a, "eps"_a, "width"_a = 0, "gated"_a = false,
            "x = norm(x) * silu(gate); gated: norm(x * silu(gate)); without weight: not normed")
        .def(
            "sigmoid_mul",
            [](PyProgram& p, Floats x, Floats gate) {
                require(gate.cols > 0 && x.cols % gate.cols == 0, "the gates do not fit");
                p.program.sigmoid_mul({x.p, gate.p, gate.cols, x.cols / gate.cols, 0, 0});
            },
            "x"_a, "gate"_a, "x = x * sigmoid(gate)")
        .def(
            "split_gates",
            [](PyProgram& p, Floats x, int dim, Floats qkv, Floats gates) {
                const int rest = qkv.cols - gates.cols;
                require(dim > 0 && gates.cols % dim == 0 && rest >= 0 && x.cols == 2 * gates.cols + rest,
                        "the gates do not fit");
                p.program.split_gates(x.p, gates.cols / dim, dim, rest, qkv.p, gates.p);
            },
            "x"_a, "dim"_a, "qkv"_a, "gates"_a)
        .def(
            "carry",
            [](PyProgram& p, int memory, int layer, nb::object x, nb::object y) {
                require(!x.is_none() || !y.is_none(), "a row is carried from somewhere to somewhere");
                const Floats a = nb::cast<Floats>(x.is_none() ? y : x), b = nb::cast<Floats>(y.is_none() ? x : y);
                require(a.cols == b.cols, "the rows differ");
                const StateLayer at = state_layer(p, memory, layer, a.cols);
                p.program.carry(at, x.is_none() ? nullptr : a.p, y.is_none() ? nullptr : b.p);
            },
            "memory"_a, "layer"_a, "x"_a.none(), "y"_a.none(), "the state is a row: x's become it, y gets it")
        .def(
            "join",
            [](PyProgram& p, Floats a, Floats b, Floats out) {
                require(a.cols + b.cols == out.cols, "the rows do not fit");
                p.program.join(a.p, a.cols, b.p, b.cols, out.p);
            },
            "a"_a, "b"_a, "out"_a, "rows side by side")
        .def("next_part", [](PyProgram& p) { p.program.next_part(), p.vocab_out.push_back(0); });
}

}  // namespace

void bind_ops(nb::class_<PyProgram>& program) {
    bind_experts(program);
    bind_states(program);
    program
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
            "embed_onto",
            [](PyProgram& p, Floats x, nb::object weight, Floats out, float scale, float factor) {
                const Linear& w = nb::cast<const Linear&>(weight);
                require(w.w.k == out.cols && x.cols == out.cols, "the embedding does not fit its output");
                p.keep_alive(weight);
                p.program.embed(&w.w, out.p, scale, x.p, factor);
            },
            "x"_a, "weight"_a, "out"_a, "scale"_a, "factor"_a, "factor * (x + scale * rows); too large ids: row 0")
        .def(
            "repeat_columns",
            [](PyProgram& p, Floats x, Floats out) {
                require(out.cols > x.cols && out.cols <= 2 * x.cols, "the columns do not fit");
                p.program.repeat_columns(x.p, x.cols, out.cols - x.cols, out.p);
            },
            "x"_a, "out"_a, "x, and its last columns again")
        .def(
            "scale_rows",
            [](PyProgram& p, Floats x, nb::object by) { p.program.scale_rows(x.p, x.cols, vector_of(p, by, 1)); },
            "x"_a, "by"_a, "x = x * by, one number")
        .def(
            "gelu_columns",
            [](PyProgram& p, Floats gate, Floats x, int first, Rows out) {
                require(gate.cols == out.a->k && first >= 0 && first + gate.cols <= x.cols, "gate and up do not fit");
                p.program.gate_mul(gate.p, out.a, {GateKind::kGelu}, nullptr, x.p + first, x.cols);
            },
            "gate"_a, "x"_a, "first"_a, "out"_a, "gelu(gate) * the columns of x from `first` on")
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
            "rms_norm_rows",
            [](PyProgram& p, Floats x, nb::object weight, float eps) {
                auto w = nb::cast<In<float>>(weight);
                require(static_cast<int>(w.size()) == x.cols, "the norm's shapes differ");
                p.keep_alive(weight);
                p.program.rms_norm_rows(x.p, w.data(), eps, x.cols);
            },
            "x"_a, "weight"_a, "eps"_a, "x = norm(x)")
        .def(
            "norm_heads",
            [](PyProgram& p, Floats qkv, nb::object q_weight, nb::object k_weight, int q_cols, int k_cols, float eps,
               int first) {
                auto q = nb::cast<In<float>>(q_weight), k = nb::cast<In<float>>(k_weight);
                const int q_width = static_cast<int>(q.size()), k_width = static_cast<int>(k.size());
                require(q_width > 0 && k_width > 0 && q_cols % q_width == 0 && k_cols % k_width == 0 && q_cols >= 0 &&
                            k_cols >= 0 && first >= 0 && first + q_cols + k_cols <= qkv.cols,
                        "the heads' norms do not fit");
                p.keep_alive(q_weight), p.keep_alive(k_weight);
                p.program.norm_heads({qkv.p + first, static_cast<size_t>(qkv.cols), q_cols, k_cols, q_width, k_width,
                                      q.data(), k.data(), eps, 0, 0});
            },
            "qkv"_a, "q_weight"_a, "k_weight"_a, "q_cols"_a, "k_cols"_a, "eps"_a, "first"_a = 0,
            "of queries, from the column `first` on, and of the keys behind them")
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
            "rotate",
            [](PyProgram& p, Attention attention, Floats qkv, Floats table) {
                const AttentionLayer& at = attention.at;
                require(qkv.cols == at.cols() && table.cols <= at.head_dim, "the heads do not fit");
                p.program.rotate({qkv.p, static_cast<size_t>(qkv.cols), at.n_heads + at.n_kv, at.head_dim, table.p,
                                  table.cols / 2, 0, 0});
            },
            "attention"_a, "qkv"_a, "table"_a, "queries and keys, in place")
        .def(
            "rope_kv",
            [](PyProgram& p, Attention attention, Floats qkv, Floats table) {
                const AttentionLayer& at = attention.at;
                require(qkv.cols == at.cols() && table.cols <= at.head_dim, "the heads do not fit");
                p.check_memory(at);
                p.program.rope_kv(at, qkv.p, table.p, table.cols / 2);
            },
            "attention"_a, "qkv"_a, "table"_a)
        .def(
            "attention",
            [](PyProgram& p, Attention attention, Floats qkv, Floats out) {
                const AttentionLayer& at = attention.at;
                require(qkv.cols == at.cols() && out.cols == at.n_heads * at.value_dim(), "the heads do not fit");
                p.check_memory(at);
                if (at.sinks) p.keep_alive(attention.owner);
                p.program.attention(at, qkv.p, out.p);
            },
            "attention"_a, "qkv"_a, "out"_a)
        .def("silu_mul", gate_mul(GateKind::kSilu), "x"_a, "out"_a)
        .def("gelu_mul", gate_mul(GateKind::kGelu), "x"_a, "out"_a)
        .def(
            "relu_square",
            [](PyProgram& p, Floats x, Rows out, nb::object routes) {
                const Routing* r = routes.is_none() ? nullptr : nb::cast<Routes>(routes).r;
                require(x.cols == out.a->k, "the columns do not fit");
                require(
                    !r || (x.rows >= nb::cast<Routes>(routes).slots() && out.rows >= nb::cast<Routes>(routes).slots()),
                    "there are too few slots");
                p.program.gate_mul(x.p, out.a, {GateKind::kRelu}, r, x.p, x.cols);
            },
            "x"_a, "out"_a, "routes"_a.none() = nb::none(), "max(x, 0)^2")
        .def(
            "clamped_mul",
            [](PyProgram& p, Floats x, Rows out, float limit, float alpha) {
                require(x.cols == 2 * out.a->k, "gate and up do not fit");
                require(limit > 0.0f && alpha > 0.0f, "limit and alpha are positive");
                p.program.gate_mul(x.p, out.a, {GateKind::kClamped, limit, alpha});
            },
            "x"_a, "out"_a, "limit"_a, "alpha"_a)
        .def(
            "lm_head",
            [](PyProgram& p, nb::object weight, Rows x, float scale, float cap) {
                const Linear& w = nb::cast<const Linear&>(weight);
                require(w.w.k == x.a->k && readable(w.w, *x.a), "the head does not fit");
                p.keep_alive(weight);
                p.vocab_out.back() = w.w.n;
                p.program.lm_head(&w.w, x.a, scale, cap);
            },
            "weight"_a, "x"_a, "scale"_a = 1.0f, "cap"_a = 0.0f);
}

}  // namespace tinychat
