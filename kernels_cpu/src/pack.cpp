#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace tinychat {
namespace {

template <class T>
void put(uint8_t* out, const void* table, size_t i) {
    memcpy(out, static_cast<const uint8_t*>(table) + i * sizeof(T), sizeof(T));
}

int scale_bytes(Meta m) { return m == Meta::kFloat || m == Meta::kFloatScale ? 4 : m >= Meta::kInt4Pair ? 1 : 2; }

// Integers of one row's 256 inputs; p: where their codes begin. Bits of p are 0.
void pack_integers(Meta m, int groups, int r, const uint8_t* scales, const uint8_t* offsets, uint8_t* p) {
    for (int g = 0; g < groups; g++) {
        uint8_t s = scales[g];
        switch (m) {
            case Meta::kInt4Pair:
                p[16 * g + r] = static_cast<uint8_t>((s & 15) | (offsets[g] << 4));
                break;
            case Meta::kInt6Pair: {
                p[16 * g + r] = static_cast<uint8_t>((s & 15) | (offsets[g] << 4));
                const int upper = (s >> 4 & 3) | (offsets[g] >> 4 & 3) << 2;
                p[16 * (groups + g / 2) + r] |= static_cast<uint8_t>(upper << 4 * (g % 2));
                break;
            }
            case Meta::kInt8:
                p[16 * g + r] = s;
                break;
            default:
                if (m == Meta::kSigned6) s = static_cast<uint8_t>(s + 32);
                p[16 * (g / 2) + r] |= static_cast<uint8_t>((s & 15) << 4 * (g % 2));
                p[16 * ((groups + 1) / 2 + g / 4) + r] |= static_cast<uint8_t>((s >> 4 & 3) << 2 * (g % 4));
        }
    }
}

void pack_supers(const LinearWeights& w, size_t row, int r, const Canonical& a, uint8_t* out) {
    const int groups = kSuper / w.group, supers = w.k / kSuper;
    const auto* scales = static_cast<const uint8_t*>(a.scales) + row * w.groups();
    const auto* offsets = a.offsets ? static_cast<const uint8_t*>(a.offsets) + row * w.groups() : nullptr;
    for (int s = 0; s < supers; s++, out += meta_bytes(w.meta, kSuper, w.group)) {
        put<uint16_t>(out + 2 * r, a.times, row * supers + s);
        if (offsets) put<uint16_t>(out + 32 + 2 * r, a.offset_times, row * supers + s);
        pack_integers(w.meta, groups, r, scales + s * groups, offsets ? offsets + s * groups : nullptr,
                      out + head_bytes(w.meta));
    }
}

void pack_meta(const LinearWeights& w, size_t row, int r, const Canonical& a, uint8_t* out) {
    if (has_supers(w.meta)) return pack_supers(w, row, r, a, out);
    if (w.meta == Meta::kE4m3) put<float>(out + 4 * r, a.times, row);
    out += head_bytes(w.meta);
    for (int g = 0; g < w.groups(); g++, out += group_bytes(w.meta, 1)) {
        const size_t at = row * w.groups() + g;
        switch (scale_bytes(w.meta)) {
            case 1:
                put<uint8_t>(out + r, a.scales, at);
                break;
            case 2:
                put<uint16_t>(out + 2 * r, a.scales, at);
                break;
            default:
                put<float>(out + 4 * r, a.scales, at);
        }
        if (w.meta == Meta::kFloat) put<float>(out + 64 + 4 * r, a.offsets, at);
        if (w.meta == Meta::kOffset16) put<uint16_t>(out + 32 + 2 * r, a.offsets, at);
        if (w.meta == Meta::kZero4) {
            const uint8_t zero = static_cast<const uint8_t*>(a.offsets)[at] & 15;
            out[32 + r % 8] |= r < 8 ? zero : zero << 4;
        }
    }
}

// Codes of one row's 32 inputs, cut into planes; bits of p, the lines at that row, are 0.
void pack_codes(int bits, const uint8_t* q, uint8_t* p) {
    int shift = 0;
    for (int plane : {8, 4, 2, 1}) {
        if (!(bits & plane)) continue;
        // Byte-lines that share a line: their bits stand in its bytes from the lowest on.
        const int shared = 8 / plane, mask = (1 << plane) - 1;
        for (int b = 0; b < 8; b++)
            for (int j = 0; j < 4; j++)
                p[b / shared * 64 + j] |= static_cast<uint8_t>((q[4 * b + j] >> shift & mask) << plane * (b % shared));
        p += 64 * plane, shift += plane;
    }
}

void pack_tile(const LinearWeights& w, int tile, const Canonical& a, uint8_t* out) {
    const int rows = std::min(kTile, w.n - tile * kTile);
    memset(out, 0, w.tile_bytes());
    uint8_t* lines = out + w.tile_meta_bytes();
    for (int r = 0; r < rows; r++) {
        const size_t row = static_cast<size_t>(tile) * kTile + r, first = row * w.k;
        if (!w.dense()) {
            pack_meta(w, row, r, a, out);
            const int bits = code_bits(w.kind);
            const auto* codes = static_cast<const uint8_t*>(a.codes) + first;
            if (w.kind == WeightKind::kE4m3) {
                for (int k = 0; k < w.k; k++) lines[(k / 2 * kTile + r) * 2 + k % 2] = codes[k];
                continue;
            }
            for (int k = 0; k < w.k; k += 32)
                pack_codes(bits, static_cast<const uint8_t*>(a.codes) + first + k, lines + k / 32 * bits * 64 + r * 4);
        } else if (w.kind == WeightKind::kF32) {
            for (int k = 0; k < w.k; k++)
                put<float>(lines + (static_cast<size_t>(k) * kTile + r) * 4, a.codes, first + k);
        } else {
            for (int k = 0; k < w.k; k++)
                put<uint16_t>(lines + (static_cast<size_t>(k) * kTile + r) * 2, a.codes, first + k);
        }
    }
}

}  // namespace

CanonicalBytes::CanonicalBytes(const LinearWeights& w) {
    const size_t n = w.n;
    codes = n * w.k * element_bytes(w.kind);
    if (w.dense()) return;
    const bool pair = has_offsets(w.meta);
    scales = n * w.groups() * scale_bytes(w.meta);
    offsets = pair ? scales : w.meta == Meta::kZero4 ? n * w.groups() : 0;
    times = has_supers(w.meta) ? n * (w.k / kSuper) * 2 : w.meta == Meta::kE4m3 ? n * 4 : 0;
    offset_times = pair && has_supers(w.meta) ? times : 0;
}

void pack_linear(const LinearWeights& w, const Canonical& arrays, uint8_t* out, int threads) {
    std::atomic<int> next{0};
    auto work = [&] {
        for (int t; (t = next.fetch_add(1)) < w.tiles();) pack_tile(w, t, arrays, out + t * w.tile_bytes());
    };
    std::vector<std::thread> helpers;
    try {
        for (int i = 1; i < std::min(threads, w.tiles()); i++) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads: these and this one do the work.
    }
    work();
    for (auto& h : helpers) h.join();
}

}  // namespace tinychat
