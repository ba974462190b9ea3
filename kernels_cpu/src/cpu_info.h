// What this machine's CPU offers: instruction sets, and the cores that this process may use.
#pragma once

#include <string>
#include <vector>

namespace tinychat {

// Ordered by preference on each architecture; the names are what TINYCHAT_ISA takes.
enum class IsaKind { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kAmxEmulated, kNeon, kI8mm };

// Whether the 256-bit dot products have their own encoding here (AVX-VNNI), not only that of AVX-512.
bool has_avx_vnni();

const char* isa_name(IsaKind isa);

// The instruction sets that this CPU and operating system run, best first; always ends with scalar. AMX stands behind
// AVX-512 until it has been timed on a CPU that has it.
std::vector<IsaKind> supported_isas();

// The instruction set of that name, if it runs here. Beside the supported ones, "amx-emulated": AMX's kernels, with
// their tiles in plain loops, where AVX-512 runs; slow, and for comparing. Throws std::invalid_argument.
IsaKind isa_named(const std::string& name);

// TINYCHAT_ISA if set, else the best. Throws std::runtime_error (two lines) if it is unknown or not supported here.
IsaKind select_isa();

// Physical cores that affinity and the cgroup CPU quota allow; performance cores only on hybrid CPUs. At least 1.
int usable_cores();

}  // namespace tinychat
