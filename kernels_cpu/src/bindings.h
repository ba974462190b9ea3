// What the parts of the Python module share: arrays that come in, and what Python holds of a program. Every pointer and
// size that Python gives is checked here or where it is bound, so that kernels need not.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "cpu_info.h"
#include "program.h"

namespace tinychat {

namespace nb = nanobind;
using namespace nb::literals;

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

inline LinearWeights describe(int kind, int meta, int n, int k, int group) {
    LinearWeights w;
    require(kind >= 0 && kind < kPackedKinds && meta >= 0 && meta < kMetas && n > 0 && k > 0, "not a linear");
    w.kind = static_cast<WeightKind>(kind);
    w.meta = static_cast<Meta>(meta);
    w.n = n, w.k = k, w.group = group;
    if (w.dense()) {
        require(w.meta == Meta::kNone, "a dense linear has no scales");
        return w;
    }
    require(w.meta != Meta::kNone, "a quantized linear needs scales");
    const bool half = group == kActGroup / 2 && !has_signed_bytes(w.kind) && !has_float_codes(w.kind);
    require(group > 0 && k % kActGroup == 0 && k % group == 0 && (half || group % kActGroup == 0),
            "the group must be 16 or a multiple of 32 and divide k");
    require(!has_supers(w.meta) || (k % kSuper == 0 && kSuper % group == 0),
            "integer scales stand beside whole 256 inputs");
    const bool table = w.kind == WeightKind::kIq4Nl || w.kind == WeightKind::kE2m1 || has_float_codes(w.kind);
    require(!table || !(has_offsets(w.meta) || w.meta == Meta::kZero4), "codes of a table have no offsets");
    return w;
}

inline bool readable(const LinearWeights& w, const Activations& x) {
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
struct Attention {
    AttentionLayer at;
    nb::object owner;  // of the sinks
};
struct Routes {
    Routing* r;
    int slots() const { return static_cast<int>(r->row_of.size()); }
};

// A program and what its pointers lead to.
struct PyProgram {
    Program program;
    std::vector<nb::object> keep;
    std::vector<nb::object> pool_owners;
    std::vector<LinearWeights> heads;
    int vocab_in = 0;
    std::vector<int> vocab_out{0};  // of each part
    bool closed = false;

    PyProgram(const std::string& isa, int threads, int max_rows) : program(isa_named(isa), threads, max_rows) {
        require(threads >= 1 && threads <= 1024 && max_rows >= 1, "threads 1…1024, at least one row");
    }
    // With room behind the last row of a view, kernels would still write only what was asked for.
    void keep_alive(nb::handle h) { keep.push_back(nb::borrow(h)); }
    // All layers of a memory have the same heads.
    void check_memory(const AttentionLayer& at) const {
        const MemoryUse use = program.use(at.memory);
        require(!use.layers || (use.n_kv == at.n_kv && use.head_dim == at.head_dim && use.latent == at.latent),
                "a memory's layers differ");
    }
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

void bind_ops(nb::class_<PyProgram>& program);
void bind_streams(nb::class_<PyProgram>& program);
void bind_latent(nb::class_<PyProgram>& program);
void bind_program(nb::module_& m);

}  // namespace tinychat
