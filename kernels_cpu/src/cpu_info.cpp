#include "cpu_info.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#include "amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tinychat {
namespace {

#if defined(__x86_64__)
struct Cpuid {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    Cpuid(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int i) { return (word >> i) & 1; }

// Register state that the operating system saves: bits 1-2 SSE and AVX, 5-7 the AVX-512 registers.
unsigned long long saved_state() {
    if (!bit(Cpuid(1, 0).ecx, 27)) return 0;  // no OSXSAVE, so no xgetbv
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (static_cast<unsigned long long>(hi) << 32) | lo;
}

bool has_avx2() {
    Cpuid one(1, 0), seven(7, 0);
    bool fma = bit(one.ecx, 12), f16c = bit(one.ecx, 29), avx = bit(one.ecx, 28);
    return avx && fma && f16c && bit(seven.ebx, 5) && (saved_state() & 0x6) == 0x6;
}

bool has_avx512_vnni() {
    Cpuid seven(7, 0);
    bool f = bit(seven.ebx, 16), dq = bit(seven.ebx, 17), bw = bit(seven.ebx, 30), vl = bit(seven.ebx, 31);
    return has_avx2() && f && dq && bw && vl && bit(seven.ecx, 11) && (saved_state() & 0xe6) == 0xe6;
}
#endif

}  // namespace

#if defined(__x86_64__)
bool has_avx_vnni() { return has_avx2() && bit(Cpuid(7, 1).eax, 4); }
#endif

namespace {

bool supported(IsaKind isa) {
    switch (isa) {
        case IsaKind::kScalar:
            return true;
#if defined(__x86_64__)
        case IsaKind::kAvx2:
            return has_avx2();
        case IsaKind::kAvxVnni:
            return has_avx_vnni() || has_avx512_vnni();
        case IsaKind::kAvx512Vnni:
        case IsaKind::kAmxEmulated:
            return has_avx512_vnni();
        case IsaKind::kAmx:
            return has_avx512_vnni() && !amx_problem();
#elif defined(__aarch64__) && defined(__APPLE__)
        case IsaKind::kNeon:
            return true;  // every Apple arm64 has the dot product and fp16 conversions
        case IsaKind::kI8mm: {
            int has = 0;
            size_t size = sizeof has;
            return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
        }
#elif defined(__aarch64__)
        case IsaKind::kNeon:
            return (getauxval(AT_HWCAP) >> 20) & 1;  // HWCAP_ASIMDDP
        case IsaKind::kI8mm:
            return supported(IsaKind::kNeon) && ((getauxval(AT_HWCAP2) >> 13) & 1);  // HWCAP2_I8MM
#endif
        default:
            return false;
    }
}

#if defined(__linux__)
std::string first_line(const std::string& path) {
    std::ifstream f(path);
    std::string line;
    std::getline(f, line);
    return line;
}

std::vector<int> allowed_cpus() {
    // A machine may have more CPUs than a fixed cpu_set_t holds, so the mask grows until the kernel takes it.
    for (int n = CPU_SETSIZE; n <= (1 << 18); n *= 2) {
        cpu_set_t* set = CPU_ALLOC(n);
        size_t size = CPU_ALLOC_SIZE(n);
        CPU_ZERO_S(size, set);
        std::vector<int> cpus;
        bool ok = sched_getaffinity(0, size, set) == 0;
        for (int i = 0; ok && i < n; i++)
            if (CPU_ISSET_S(i, size, set)) cpus.push_back(i);
        CPU_FREE(set);
        if (ok && !cpus.empty()) return cpus;
    }
    return {0};
}

// Logical CPUs → one number for each physical core.
int physical_cores(const std::vector<int>& cpus) {
    std::set<std::pair<std::string, std::string>> cores;
    for (int cpu : cpus) {
        std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
        std::string core = first_line(topology + "core_id"), package = first_line(topology + "physical_package_id");
        if (core.empty()) return static_cast<int>(cpus.size());
        cores.insert({package, core});
    }
    return static_cast<int>(cores.size());
}

// Hybrid CPUs: a slow core would be waited for at every barrier. Intel lists the fast ones; Arm gives each a capacity.
std::vector<int> fast_cpus(const std::vector<int>& cpus) {
    std::vector<int> fast;
    std::string list = first_line("/sys/devices/cpu_core/cpus");
    std::stringstream ranges(list);
    std::set<int> performance;
    for (std::string range; std::getline(ranges, range, ',');) {
        int lo = 0, hi = 0;
        int n = std::sscanf(range.c_str(), "%d-%d", &lo, &hi);
        if (n < 1) continue;
        for (int i = lo; i <= (n == 2 ? hi : lo); i++) performance.insert(i);
    }
    int top = 0;
    std::vector<int> capacity;
    for (int cpu : cpus) {
        std::string line = first_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cpu_capacity");
        capacity.push_back(line.empty() ? 0 : std::atoi(line.c_str()));
        top = std::max(top, capacity.back());
    }
    for (size_t i = 0; i < cpus.size(); i++) {
        bool slow_intel = !performance.empty() && !performance.count(cpus[i]);
        bool slow_arm = capacity[i] > 0 && capacity[i] * 10 < top * 6;
        if (!slow_intel && !slow_arm) fast.push_back(cpus[i]);
    }
    return fast.empty() ? cpus : fast;
}

// CPUs' worth of time that the cgroup and every cgroup above it allow; infinity without a quota.
double cgroup_quota() {
    double quota = INFINITY;
    auto shrink = [&](double limit, double period) {
        if (limit > 0 && period > 0) quota = std::min(quota, limit / period);
    };
    std::ifstream f("/proc/self/cgroup");
    for (std::string line; std::getline(f, line);) {
        size_t a = line.find(':'), b = line.find(':', a + 1);
        if (a == std::string::npos || b == std::string::npos) continue;
        std::string controllers = line.substr(a + 1, b - a - 1), path = line.substr(b + 1);
        bool v2 = controllers.empty();
        if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
        std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
        // In a container the path may be the host's; its root is then what we see, so the walk ends there.
        for (std::string p = path;; p = p.substr(0, p.find_last_of('/'))) {
            std::string dir = root + (p == "/" ? "" : p);
            if (v2) {
                std::stringstream max(first_line(dir + "/cpu.max"));
                std::string limit;
                double period = 0;
                if (max >> limit >> period && limit != "max") shrink(std::atof(limit.c_str()), period);
            } else {
                shrink(std::atof(first_line(dir + "/cpu.cfs_quota_us").c_str()),
                       std::atof(first_line(dir + "/cpu.cfs_period_us").c_str()));
            }
            if (p.empty() || p.find('/') == std::string::npos) break;
        }
    }
    return quota;
}
#endif

}  // namespace

const char* isa_name(IsaKind isa) {
    switch (isa) {
        case IsaKind::kAvx2:
            return "avx2";
        case IsaKind::kAvxVnni:
            return "avxvnni";
        case IsaKind::kAvx512Vnni:
            return "avx512vnni";
        case IsaKind::kAmx:
            return "amx";
        case IsaKind::kAmxEmulated:
            return "amx-emulated";
        case IsaKind::kNeon:
            return "neon";
        case IsaKind::kI8mm:
            return "i8mm";
        default:
            return "scalar";
    }
}

std::vector<IsaKind> supported_isas() {
    std::vector<IsaKind> out;
    for (IsaKind isa : {IsaKind::kAvx512Vnni, IsaKind::kAmx, IsaKind::kAvxVnni, IsaKind::kAvx2, IsaKind::kI8mm,
                        IsaKind::kNeon, IsaKind::kScalar})
        if (supported(isa)) out.push_back(isa);
    return out;
}

IsaKind isa_named(const std::string& name) {
    for (IsaKind isa : supported_isas())
        if (name == isa_name(isa)) return isa;
    const IsaKind emulated = IsaKind::kAmxEmulated;
    if (name == isa_name(emulated) && supported(emulated)) return emulated;
    throw std::invalid_argument("this CPU does not run " + name);
}

IsaKind select_isa() {
    const char* wanted = std::getenv("TINYCHAT_ISA");
    if (!wanted || !*wanted) return supported_isas().front();
    try {
        return isa_named(wanted);
    } catch (const std::invalid_argument&) {
    }
    std::string names;
    for (IsaKind isa : supported_isas()) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    throw std::runtime_error("TINYCHAT_ISA=" + std::string(wanted) + " is unknown or this CPU does not run it.\n" +
                             "Unset it, or set it to one of: " + names + ".");
}

int usable_cores() {
    int n = 1;
#if defined(__linux__)
    n = physical_cores(fast_cpus(allowed_cpus()));
    double quota = cgroup_quota();
    if (std::isfinite(quota)) n = std::min(n, std::max(1, static_cast<int>(quota + 0.5)));
#elif defined(__APPLE__)
    size_t size = sizeof n;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &n, &size, nullptr, 0) != 0)
        n = static_cast<int>(std::thread::hardware_concurrency());
#endif
    return std::max(1, n);
}

}  // namespace tinychat
