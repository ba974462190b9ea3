// How fast linears of each form run where their weights lie in the cache, on one thread: what is left of memory's rate
// is up to memory. The best of 400 runs, so that other programs matter little.
//   c++ -std=c++17 -O1 -I kernels_cpu/src kernels_cpu/test/speed.cpp build/*/kernels_cpu/libtinychat_kernels.a -pthread
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "pack.h"

using namespace tinychat;

namespace {

constexpr int kOutputs = 256, kInputs = 2048, kMostRows = 64;

struct Form {
    const char* name;
    WeightKind kind;
    Meta meta;
    int group;
};

const Form kForms[] = {
    {"int4", WeightKind::kW4, Meta::kZero4, 128},       {"q4_k", WeightKind::kW4, Meta::kInt6Pair, 32},
    {"q5_k", WeightKind::kW5, Meta::kInt6Pair, 32},     {"q6_k", WeightKind::kW6, Meta::kInt8, 16},
    {"q3_k", WeightKind::kW3, Meta::kSigned6, 16},      {"q2_k", WeightKind::kW2, Meta::kInt4Pair, 16},
    {"q5_0", WeightKind::kW5, Meta::kSym, 32},          {"q8_0", WeightKind::kW8, Meta::kSym, 32},
    {"iq4_xs", WeightKind::kIq4Nl, Meta::kSigned6, 32}, {"mxfp4", WeightKind::kE2m1, Meta::kE8m0, 32},
    {"nvfp4", WeightKind::kE2m1, Meta::kE4m3, 16},      {"gptq3", WeightKind::kW3, Meta::kZero4, 128},
    {"fp8", WeightKind::kE4m3, Meta::kFloatScale, 128}, {"nf4", WeightKind::kNf4, Meta::kFloatScale, 64},
};

// Bytes below 32: small scales of every kind, and codes that are cut to their bits.
std::vector<uint8_t> random_bytes(size_t n) {
    static std::mt19937 rng(1);
    std::vector<uint8_t> a(n);
    for (auto& b : a) b = static_cast<uint8_t>(rng() % 32);
    return a;
}

void measure(const KernelTable& table, const Form& form) {
    LinearWeights w;
    w.kind = form.kind, w.meta = form.meta, w.n = kOutputs, w.k = kInputs, w.group = form.group;
    const CanonicalBytes size(w);
    auto codes = random_bytes(size.codes);
    if (code_bits(w.kind) < 8)
        for (auto& c : codes) c &= (1 << code_bits(w.kind)) - 1;
    const auto scales = random_bytes(size.scales), offsets = random_bytes(size.offsets),
               times = random_bytes(size.times), offset_times = random_bytes(size.offset_times);
    void* data = nullptr;
    if (posix_memalign(&data, 64, w.bytes())) std::abort();
    pack_linear(w, {codes.data(), scales.data(), offsets.data(), times.data(), offset_times.data()},
                static_cast<uint8_t*>(data), 1);
    w.data = static_cast<uint8_t*>(data);
    std::vector<float> x(kMostRows * kInputs, 0.5f), beside(kMostRows * kInputs, 0.01f), y(kMostRows * kOutputs);
    std::vector<int8_t> integers(kMostRows * kInputs, 3);
    std::vector<int32_t> sums(kMostRows * kInputs);
    Activations a;
    a.f = x.data(), a.q = integers.data(), a.scale = a.gsum = beside.data(), a.nsum = sums.data();
    a.k = kInputs, a.group = w.group;
    std::printf("%-10s %-6s %.3f bits:", table.name, form.name, 8.0 * w.bytes() / kOutputs / kInputs);
    for (int rows : {1, 5, kMostRows}) {
        double best = 1e9;
        for (int i = 0; i < 400; i++) {
            const auto began = std::chrono::steady_clock::now();
            table.linear({&w, &a, rows, y.data(), kOutputs, nullptr, 0, 0, w.tiles()});
            best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
        }
        std::printf("  %2d rows %5.1f GB/s, %3.0f GMAC/s", rows, w.bytes() / best / 1e9,
                    1e-9 * kOutputs * kInputs * rows / best);
    }
    std::printf("\n");
    std::free(data);
}

}  // namespace

int main() {
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040);  // denormals are zeros, as in the program's threads
#endif
    for (IsaKind isa : supported_isas())
        if (isa != supported_isas().back())
            for (const Form& form : kForms) measure(kernels_for(isa), form);
}
