// Programs and their buffers, cache and steps, as Python sees them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bindings.h"

namespace tinychat {
namespace {

constexpr int kMostMemories = 1 << 10;

// An array as it is; another type or order of its elements is refused rather than copied, since the copy would be gone
// before the step runs.
template <class Array>
Array exactly(nb::handle h, const char* what) {
    Array a;
    require(nb::try_cast<Array>(h, a, false), what);
    return a;
}

// Numbers from Python fit an int or are refused.
int number(nb::handle h) { return nb::cast<int>(h); }

// States of a span, checked: the slots behind its rows, and the one before them.
void add_states(const PyProgram& p, const nb::tuple& fields, int memory, int rows, SpanSlots& slots) {
    const auto kept = exactly<In<int32_t>>(fields[0], "slots of states are int32");
    const MemoryUse use = p.program.use(memory);
    const StatePool pool = p.program.states(memory);
    require(pool.floats >= use.layers * use.state, "the pool of states does not fit the ops");
    require(static_cast<long long>(kept.size()) >= rows, "each row has a slot for its state, or -1");
    for (int i = 0; i < rows; i++)
        require(kept.data()[i] >= -1 && kept.data()[i] < pool.n_slots, "a slot is outside the pool of states");
    slots.blocks = kept.data(), slots.length = number(fields[1]);
    require(slots.length >= -1 && slots.length < pool.n_slots, "a slot is outside the pool of states");
}

// What a span has in one memory, checked against what the recorded ops read of it.
void add_slots(const PyProgram& p, nb::handle given, int memory, int rows, SpanSlots& slots) {
    const auto fields = nb::cast<nb::tuple>(given);
    require(fields.size() == 4, "a memory of a span is blocks, length, scores and scored rows");
    const MemoryUse use = p.program.use(memory);
    if (use.state) return add_states(p, fields, memory, rows, slots);
    const auto blocks = exactly<In<int32_t>>(fields[0], "a block table is int32");
    const KvPool kv = p.program.kv(memory);
    slots.blocks = blocks.data(), slots.length = number(fields[1]);
    if (use.is_tail) return;  // `add_exact` looks at it, from where it belongs to
    require(!use.layers || (kv.bits == 4) == (use.tail >= 0), "a memory of 4 bits and its tail go together");
    require(slots.length >= 0, "position and length must not be negative");
    const long long end = static_cast<long long>(slots.length) + rows;
    if (use.layers) {
        require(
            kv.n_layers >= use.layers && kv.n_kv == use.n_kv && kv.head_dim == use.head_dim && kv.latent == use.latent,
            "the KV pool does not fit the ops");
        const long long need = (end + kBlockSlots - 1) / kBlockSlots;
        require(static_cast<long long>(blocks.size()) >= need, "the block table does not cover the step");
        for (long long i = std::max(0, slots.length + 1 - use.reach) / kBlockSlots; i < need; i++)
            require(blocks.data()[i] >= 0 && blocks.data()[i] < kv.n_blocks, "a block is outside the pool");
    }
    if (fields[2].is_none()) return;
    const auto scores = exactly<Out<float>>(fields[2], "scores are float32");
    slots.scored_rows = number(fields[3]);
    require(slots.scored_rows >= 1 && slots.scored_rows <= rows, "scored rows are rows of the step");
    require(scores.ndim() == 4 && (scores.shape(0) == 1 || static_cast<int>(scores.shape(0)) == slots.scored_rows) &&
                static_cast<int>(scores.shape(1)) == kv.n_layers && static_cast<int>(scores.shape(2)) == kv.n_kv &&
                static_cast<long long>(scores.shape(3)) >= end && scores.shape(3) <= INT32_MAX,
            "scores have the wrong shape");
    slots.scores = scores.data(), slots.sum_scores = scores.shape(0) == 1;
    slots.score_slots = static_cast<int>(scores.shape(3));
}

// Blocks of a tail, checked against the slots of the memory that it belongs to.
void add_exact(const PyProgram& p, nb::handle given, int memory, int rows, SpanSlots& slots) {
    const auto fields = nb::cast<nb::tuple>(given);
    require(fields.size() == 4, "a memory of a span is blocks, length, scores and scored rows");
    const auto blocks = exactly<In<int32_t>>(fields[0], "a block table is int32");
    const MemoryUse use = p.program.use(memory);
    const KvPool kv = p.program.kv(use.tail);
    require(kv.bits == 16 && kv.n_layers >= use.layers && kv.n_kv == use.n_kv && kv.head_dim == use.head_dim,
            "the pool of a tail does not fit");
    const long long end = static_cast<long long>(slots.length) + rows;
    const int n = static_cast<int>((end + kBlockSlots - 1) / kBlockSlots), wide = kStretchSlots / kBlockSlots;
    require(static_cast<long long>(blocks.size()) >= n, "the tail does not cover the step");
    const int begun = slots.length / kStretchSlots * wide;  // the first block of the stretch that the first row is in
    for (int i = begun; i < n; i++) {
        const int block = blocks.data()[i];
        require(block >= (i - begun < wide && slots.length % kStretchSlots ? 0 : -1) && block < kv.n_blocks,
                "a block is outside the pool");
        require((block < 0) == (blocks.data()[i / wide * wide] < 0), "a stretch is in the tail or is not");
    }
    if (use.reach == std::numeric_limits<int>::max() && slots.length)
        require(blocks.data()[0] >= 0 && blocks.data()[0] < kv.n_blocks, "the first block is in the tail");
    slots.exact = blocks.data();
}

// A span, behind those that the step has already: a wrong id or block is an exception, not a crash.
void add_span(const PyProgram& p, nb::handle given, StepState& s) {
    const auto fields = nb::cast<nb::tuple>(given);
    require(fields.size() == 4, "a span is ids, position, logits_from and memories");
    const auto ids = exactly<In<int32_t>>(fields[0], "token ids are int32");
    const long long position = nb::cast<long long>(fields[1]);
    const int rows = static_cast<int>(std::min<size_t>(ids.size(), INT32_MAX)), logits_from = number(fields[2]);
    require(rows >= 1 && rows <= p.program.max_rows() - s.rows, "a step has 1 to max_rows tokens");
    require(position >= 0 && position <= INT64_MAX - rows, "position and length must not be negative");
    require(logits_from >= 0 && logits_from <= rows, "logits_from is outside the step");
    for (int i = 0; p.vocab_in && i < rows; i++)
        require(ids.data()[i] >= 0 && ids.data()[i] < p.vocab_in, "a token id is outside the vocabulary");
    const auto memories = nb::cast<nb::tuple>(fields[3]);
    require(static_cast<int>(memories.size()) == s.memories, "a span has its slots in each memory of the program");
    s.add(ids.data(), rows, position, logits_from);
    const size_t i = s.spans.size() - 1;
    for (int m = 0; m < s.memories; m++) {
        add_slots(p, memories[m], m, rows, s.slots_of(i, m));
        if (const int tail = p.program.use(m).tail; tail >= 0) add_exact(p, memories[tail], m, rows, s.slots_of(i, m));
    }
}

// All step inputs are checked here once, so that kernels need not.
void run_step(PyProgram& p, nb::tuple spans, nb::object logits, nb::object greedy, int part) {
    require(part >= 0 && part < p.program.parts(), "the program has no such part");
    thread_local StepState s;
    s.clear(p.program.memories());
    require(spans.size() > 0, "a step has 1 to max_rows tokens");
    for (nb::handle span : spans) add_span(p, span, s);
    if (!logits.is_none()) {
        const auto out = exactly<Out<float>>(logits, "logits are float32");
        require(out.size() == static_cast<size_t>(s.logit_rows()) * p.vocab_out[part], "logits have the wrong size");
        s.logits = out.data();
    }
    if (!greedy.is_none()) {
        const auto out = exactly<Out<int32_t>>(greedy, "greedy ids are int32");
        require(out.size() == static_cast<size_t>(s.logit_rows()), "greedy ids have the wrong size");
        s.greedy = out.data();
    }
    require(s.logit_rows() == 0 || s.logits || s.greedy, "the step asks for logits and gives no place for them");
    nb::gil_scoped_release release;
    p.program.run(s, part);
}

// n of an array [layers, kv_heads, n] that goes with a block table of the pool.
template <class T>
int slots_of_heads(const PyProgram& p, int memory, const In<int32_t>& blocks, const In<T>& a) {
    require(memory >= 0 && memory < p.program.memories(), "there is no such memory");
    const KvPool kv = p.program.kv(memory);
    require(kv.base && a.ndim() == 3 && static_cast<int>(a.shape(0)) == kv.n_layers &&
                static_cast<int>(a.shape(1)) == kv.n_kv,
            "slots are given for each layer and KV head");
    for (size_t i = 0; i < blocks.size(); i++)
        require(blocks.data()[i] >= 0 && blocks.data()[i] < kv.n_blocks, "a block is outside the pool");
    return static_cast<int>(a.shape(2));
}

// Exact forms of the blocks of a table, checked; null: the memory has no tail.
const int32_t* exact_forms(const PyProgram& p, int memory, int slots, const In<int32_t>& exact) {
    if (p.program.kv(memory).bits != 4) return nullptr;
    const int tail = p.program.use(memory).tail, n = (slots + kBlockSlots - 1) / kBlockSlots;
    require(tail >= 0 && static_cast<int>(exact.size()) >= n, "a memory of 4 bits says what is in its tail");
    for (size_t i = 0; i < exact.size(); i++)
        require(exact.data()[i] >= -1 && exact.data()[i] < p.program.kv(tail).n_blocks,
                "a block is outside the tail's pool");
    require(slots % kBlockSlots == 0 || exact.data()[n - 1] >= 0, "an incomplete block is in the tail");
    return exact.data();
}

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<Routes>(m, "Routes", "Which experts the rows of a step take.").def_prop_ro("slots", [](const Routes& r) {
        return r.slots();
    });
    nb::class_<Attention>(m, "Attention", "A layer's attention: its heads, where its keys and values lie, its scores.")
        .def(
            "__init__",
            [](Attention* self, int n_heads, int n_kv, int head_dim, int memory, int layer, float scale, int window,
               float cap, int tail, nb::object sinks, double slope, double original, bool shared, int exact, int latent,
               int skipped) {
                require(n_kv > 0 && n_heads > 0 && n_heads <= 1024 && n_heads % n_kv == 0 && head_dim > 0 &&
                            head_dim <= 1024 && layer >= 0 && layer < 1 << 20,
                        "the heads do not fit");
                require(memory >= 0 && memory < kMostMemories && tail >= -1 && tail < kMostMemories && tail != memory,
                        "there is no such memory");
                require(window >= 0 && cap >= 0.0f && scale >= 0.0f, "a scale, window and cap are not negative");
                if (scale == 0.0f) scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
                require(slope >= 0.0 && original >= 1.0, "a slope is not negative, and contexts have tokens");
                require(exact >= 0 && exact < 1 << 10, "there are no such exact blocks");
                new (self) Attention{{n_heads, n_kv, head_dim, memory, layer, tail, scale, window, cap}, {}};
                self->at.slope = slope, self->at.original = original;
                self->at.shared = shared, self->at.exact = exact;
                require(latent >= 0 && latent < head_dim && (!latent || (tail < 0 && !shared)),
                        "latent values are a part of keys, in 8 or 16 bits");
                require(skipped >= 0 && skipped < kBlockSlots, "a block's slots are not all skipped");
                self->at.latent = latent, self->at.skipped = skipped;
                if (sinks.is_none()) return;
                const auto given = exactly<In<float>>(sinks, "sinks are float32");
                require(static_cast<int>(given.size()) == n_heads, "there is not one sink for each head");
                self->at.sinks = given.data(), self->owner = sinks;
            },
            "n_heads"_a, "n_kv"_a, "head_dim"_a, "memory"_a = 0, "layer"_a = 0, "scale"_a = 0.0f, "window"_a = 0,
            "cap"_a = 0.0f, "tail"_a = -1, "sinks"_a.none() = nb::none(), "slope"_a = 0.0, "original"_a = 1.0,
            "shared"_a = false, "exact"_a = 0, "latent"_a = 0, "skipped"_a = 0,
            "scale 0: 1 / sqrt(head_dim); window: a row attends to the last so many slots, 0 all; cap: of the scores, "
            "0 none; tail: the memory that has the newest blocks of one of 4 bits in 16; sinks: one more score of each "
            "head; slope and original: queries at p are multiplied by 1 + slope · log(1 + ⌊p / original⌋); shared: it "
            "has "
            "queries alone; exact: whose buffers of exact blocks, of a memory of 4 bits, 0 those of all in turn; "
            "skipped: first slots that no row attends to");
    nb::class_<Floats>(m, "Floats", "fp32 rows of a program.").def_ro("cols", &Floats::cols);
    nb::class_<Rows>(m, "Rows", "A value as linears read it: integers, fp32, or both.")
        .def_prop_ro("floats", [](const Rows& r) {
            require(r.a->f != nullptr, "these rows have no fp32 form");
            return Floats{r.a->f, r.a->k, r.rows};
        });
    nb::class_<PyProgram> program(m, "Program");
    bind_ops(program);
    bind_streams(program);
    bind_latent(program);
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
                const bool whole = group == kActGroup / 2 || (group > 0 && group % kActGroup == 0);
                require(!bits || (whole && k % group == 0 && k % kActGroup == 0),
                        "quantized rows need whole groups, of 16 or a multiple of 32 inputs");
                return Rows{p.program.activations(k, as_float, bits, group, rows), rows};
            },
            "k"_a, "as_float"_a, "bits"_a, "group"_a, "rows"_a = 0)
        .def(
            "set_kv",
            [](PyProgram& p, int memory, nb::object pool, int n_blocks, int n_layers, int n_kv, int head_dim, int bits,
               int latent) {
                require(memory >= 0 && memory < kMostMemories, "there is no such memory");
                require(bits == 4 || bits == 8 || bits == 16, "the cache has 4, 8 or 16 bits");
                require(latent >= 0 && latent < head_dim + (latent == 0) && (!latent || bits != 4),
                        "latent values are a part of keys, in 8 or 16 bits");
                KvPool kv;
                kv.bits = bits, kv.latent = latent;
                auto bytes = exactly<Out<uint8_t>>(pool, "a pool is uint8");
                kv.base = bytes.data();
                kv.n_blocks = n_blocks, kv.n_layers = n_layers, kv.n_kv = n_kv, kv.head_dim = head_dim;
                require(n_blocks >= 0 && bytes.nbytes() >= kv.block_bytes() * n_blocks, "the pool is too small");
                p.program.set_kv(memory, kv);
                p.pool_owners.resize(std::max(p.pool_owners.size(), static_cast<size_t>(memory) + 1));
                p.pool_owners[memory] = pool;
            },
            "memory"_a, "pool"_a, "n_blocks"_a, "n_layers"_a, "n_kv"_a, "head_dim"_a, "bits"_a = 16, "latent"_a = 0)
        .def(
            "set_states",
            [](PyProgram& p, int memory, nb::object pool, int n_slots, size_t floats) {
                require(memory >= 0 && memory < kMostMemories, "there is no such memory");
                auto bytes = exactly<Out<uint8_t>>(pool, "a pool is uint8");
                StatePool states{reinterpret_cast<float*>(bytes.data()), n_slots, floats};
                require(n_slots >= 0 && bytes.nbytes() / sizeof(float) >= floats * n_slots, "the pool is too small");
                require(reinterpret_cast<uintptr_t>(bytes.data()) % sizeof(float) == 0, "states are aligned");
                p.program.set_states(memory, states);
                p.pool_owners.resize(std::max(p.pool_owners.size(), static_cast<size_t>(memory) + 1));
                p.pool_owners[memory] = pool;
            },
            "memory"_a, "pool"_a, "n_slots"_a, "floats"_a, "floats: of one state, all layers together")
        .def(
            "open_blocks",
            [](PyProgram& p, int memory, In<int32_t> blocks, In<int32_t> exact) {
                require(memory >= 0 && memory < p.program.memories(), "there is no such memory");
                const KvPool kv = p.program.kv(memory);
                const int tail = p.program.use(memory).tail;
                require(kv.base && kv.bits == 4 && tail >= 0 && blocks.size() == exact.size(), "there is no tail");
                for (size_t i = 0; i < blocks.size(); i++) {
                    require(blocks.data()[i] >= 0 && blocks.data()[i] < kv.n_blocks, "a block is outside the pool");
                    require(exact.data()[i] >= 0 && exact.data()[i] < p.program.kv(tail).n_blocks,
                            "a block is outside the tail's pool");
                }
                nb::gil_scoped_release release;
                p.program.open_blocks(memory, blocks.data(), exact.data(), static_cast<int>(blocks.size()));
            },
            "memory"_a, "blocks"_a, "exact"_a)
        .def(
            "move_slots",
            [](PyProgram& p, int memory, In<int32_t> blocks, In<int32_t> src, In<int32_t> dst, int slots,
               In<int32_t> exact) {
                const int n = slots_of_heads(p, memory, blocks, src);
                const int32_t* forms = exact_forms(p, memory, slots, exact);
                require(p.program.kv(memory).bits != 4 ||
                            (slots >= n && slots <= static_cast<int>(blocks.size()) * kBlockSlots),
                        "the slots in use are in the block table");
                require(slots_of_heads(p, memory, blocks, dst) == n, "as many slots to as from");
                const int end = static_cast<int>(blocks.size()) * kBlockSlots;
                for (size_t i = 0; i < src.size(); i++)
                    require(src.data()[i] < end && dst.data()[i] < end && (src.data()[i] < 0 || dst.data()[i] >= 0),
                            "a slot is outside the block table");
                nb::gil_scoped_release release;
                p.program.move_slots(memory, blocks.data(), src.data(), dst.data(), n, slots, forms);
            },
            "memory"_a, "blocks"_a, "src"_a, "dst"_a, "slots"_a, "exact"_a)
        .def(
            "turn_keys",
            [](PyProgram& p, int memory, In<int32_t> blocks, std::vector<double> frequencies, In<int32_t> delta,
               In<int32_t> exact) {
                const int n = slots_of_heads(p, memory, blocks, delta), half = static_cast<int>(frequencies.size());
                require(2 * half <= p.program.kv(memory).head_dim, "more frequencies than the head has pairs");
                require(static_cast<size_t>(n) <= blocks.size() * kBlockSlots, "a slot is outside the block table");
                const int32_t* forms = exact_forms(p, memory, n, exact);
                nb::gil_scoped_release release;
                p.program.turn_keys(memory, blocks.data(), frequencies.data(), half, delta.data(), n, forms);
            },
            "memory"_a, "blocks"_a, "frequencies"_a, "delta"_a, "exact"_a)
        .def(
            "value_spread",
            [](PyProgram& p, int memory, In<int32_t> blocks, In<float> weights, Out<float> out, In<int32_t> exact) {
                const int n = slots_of_heads(p, memory, blocks, weights);
                const int32_t* forms = exact_forms(p, memory, n, exact);
                require(static_cast<size_t>(n) <= blocks.size() * kBlockSlots, "a slot is outside the block table");
                require(out.size() == weights.size(), "as many results as weights");
                nb::gil_scoped_release release;
                p.program.value_spread(memory, blocks.data(), weights.data(), out.data(), n, forms);
            },
            "memory"_a, "blocks"_a, "weights"_a, "out"_a, "exact"_a)
        .def("run", &run_step, "spans"_a, "logits"_a.none() = nb::none(), "greedy"_a.none() = nb::none(), "part"_a = 0,
             "spans: a tuple of (ids, position, logits_from, memories), and memories of (blocks, length, scores or "
             "None, scored rows)")
        .def(
            "set_timing", [](PyProgram& p, bool on) { p.program.set_timing(on); }, "on"_a)
        .def(
            "timings", [](const PyProgram& p) { return p.program.timings(); },
            "(op, seconds) of the last step with timing on, barriers not included.");
}

}  // namespace tinychat
