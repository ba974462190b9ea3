// Programs and their buffers, cache and steps, as Python sees them.
#include "bindings.h"

namespace tinychat {
namespace {

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

}  // namespace

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
    bind_ops(program);
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

}  // namespace tinychat
