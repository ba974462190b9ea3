// Python's view of the CPU kernels: tinychat.kernels_cpu._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bandwidth.h"
#include "cpu_info.h"

namespace nb = nanobind;
using namespace tinychat;

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
}
