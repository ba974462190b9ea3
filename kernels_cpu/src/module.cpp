// Python's view of the CPU kernels: tinychat.kernels_cpu._native.
#include "amx.h"
#include "bandwidth.h"
#include "bindings.h"
#include "bus_error.h"
#include "checksum.h"
#include "cpu_info.h"
#include "pack.h"

using namespace tinychat;

namespace {

void bind_packing(nb::module_& m) {
    m.def(
        "packed_bytes",
        [](int kind, int meta, int n, int k, int group) { return describe(kind, meta, n, k, group).bytes(); }, "kind"_a,
        "meta"_a, "n"_a, "k"_a, "group"_a, "Bytes of a packed linear.");
    m.def(
        "pack",
        [](int kind, int meta, int n, int k, int group, AnyArray codes, nb::object scales, nb::object offsets,
           nb::object times, nb::object offset_times, Out<uint8_t> out, int threads) {
            LinearWeights w = describe(kind, meta, n, k, group);
            const CanonicalBytes bytes(w);
            std::vector<AnyArray> keep;
            auto pointer = [&](const nb::object& array, size_t size) -> const void* {
                require(array.is_none() == (size == 0), "the form has other arrays");
                if (!size) return nullptr;
                keep.push_back(nb::cast<AnyArray>(array));
                require(keep.back().nbytes() == size, "scales, zeros or offsets have the wrong size");
                return keep.back().data();
            };
            require(codes.nbytes() == bytes.codes, "codes have the wrong size");
            require(out.nbytes() == w.bytes(), "the output has the wrong size");
            const Canonical arrays = {codes.data(), pointer(scales, bytes.scales), pointer(offsets, bytes.offsets),
                                      pointer(times, bytes.times), pointer(offset_times, bytes.offset_times)};
            nb::gil_scoped_release release;
            pack_linear(w, arrays, out.data(), threads);
        },
        "kind"_a, "meta"_a, "n"_a, "k"_a, "group"_a, "codes"_a, "scales"_a.none(), "offsets"_a.none(), "times"_a.none(),
        "offset_times"_a.none(), "out"_a, "threads"_a, "Canonical weights into tiles.");
    nb::class_<Linear>(m, "Linear")
        .def(nb::init<int, int, int, int, int, Bytes, nb::object>(), "kind"_a, "meta"_a, "n"_a, "k"_a, "group"_a,
             "data"_a, "bias"_a.none())
        .def_prop_ro("bytes", [](const Linear& l) { return l.w.bytes(); })
        .def_prop_ro("shape", [](const Linear& l) { return std::make_pair(l.w.n, l.w.k); })
        .def_prop_ro("group", [](const Linear& l) { return l.w.group; })
        .def_prop_ro("quantized", [](const Linear& l) { return l.w.quantized(); });
}

}  // namespace

size_t kv_block_bytes(int n_layers, int n_kv, int head_dim, int bits, int latent) {
    KvPool kv;
    kv.bits = bits, kv.latent = latent;
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
    m.def(
        "amx_problem", [] { return amx_problem(); },
        "Why AMX is not used although this CPU has it; empty if it has none, None if it is used.");
    m.def("cores", &usable_cores, "Physical cores that affinity and the cgroup quota allow.");
    m.def("read_bandwidth", &read_bandwidth, nb::arg("threads"), nb::arg("bytes") = size_t{1} << 30,
          nb::arg("rounds") = 5, nb::call_guard<nb::gil_scoped_release>(),
          "Best of `rounds` plain multi-threaded reads, GB/s.");
    m.def("kv_block_bytes", &kv_block_bytes, "n_layers"_a, "n_kv"_a, "head_dim"_a, "bits"_a = 16, "latent"_a = 0,
          "Bytes of one block of 16 slots, all layers, in the pool that `set_kv` takes.");
    m.def(
        "checksum",
        [](Bytes bytes) {
            nb::gil_scoped_release release;
            return checksum(bytes.data(), bytes.nbytes());
        },
        "bytes"_a, "64-bit checksum of uint8 [n]: finds rot.");
    m.def(
        "watch_map", [](Bytes bytes, const char* message) { return watch_map(bytes.data(), bytes.nbytes(), message); },
        "bytes"_a, "message"_a,
        "Say `message` and exit with code 1 where reading this map raises SIGBUS. Returns an id for unwatch_map.");
    m.def("unwatch_map", &unwatch_map, "id"_a, "Forget a map that is watched.");
    bind_packing(m);
    bind_program(m);
}
