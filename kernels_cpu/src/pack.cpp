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

void pack_meta(const LinearWeights& w, int tile, int rows, const void* scales, const void* aux, uint8_t* out) {
    const int groups = w.k / w.group;
    for (int g = 0; g < groups; g++, out += meta_bytes(w.meta))
        for (int r = 0; r < rows; r++) {
            const size_t at = (static_cast<size_t>(tile) * kTile + r) * groups + g;
            if (w.meta == Meta::kFloat) {
                put<float>(out + 4 * r, scales, at);
                put<float>(out + 64 + 4 * r, aux, at);
                continue;
            }
            put<uint16_t>(out + 2 * r, scales, at);
            if (w.meta == Meta::kOffset16) put<uint16_t>(out + 32 + 2 * r, aux, at);
            if (w.meta == Meta::kZero4) {
                const uint8_t zero = static_cast<const uint8_t*>(aux)[at] & 15;
                out[32 + r % 8] |= r < 8 ? zero : zero << 4;
            }
        }
}

void pack_tile(const LinearWeights& w, int tile, const void* codes, const void* scales, const void* aux, uint8_t* out) {
    const int rows = std::min(kTile, w.n - tile * kTile);
    memset(out, 0, w.tile_bytes());
    if (w.quantized()) pack_meta(w, tile, rows, scales, aux, out);
    out += w.tile_meta_bytes();
    for (int r = 0; r < rows; r++) {
        const size_t row = (static_cast<size_t>(tile) * kTile + r) * w.k;
        if (w.kind == WeightKind::kW4) {
            const uint8_t* q = static_cast<const uint8_t*>(codes) + row;
            for (int k = 0; k < w.k; k += 8)
                for (int j = 0; j < 4; j++)
                    out[static_cast<size_t>(k) * 8 + r * 4 + j] =
                        static_cast<uint8_t>((q[k + j] & 15) | (q[k + 4 + j] << 4));
        } else if (w.kind == WeightKind::kW8) {
            const uint8_t* q = static_cast<const uint8_t*>(codes) + row;
            for (int k = 0; k < w.k; k += 4) memcpy(out + static_cast<size_t>(k) * 16 + r * 4, q + k, 4);
        } else if (w.kind == WeightKind::kF32) {
            for (int k = 0; k < w.k; k++) put<float>(out + (static_cast<size_t>(k) * kTile + r) * 4, codes, row + k);
        } else {
            for (int k = 0; k < w.k; k++) put<uint16_t>(out + (static_cast<size_t>(k) * kTile + r) * 2, codes, row + k);
        }
    }
}

}  // namespace

void pack_linear(const LinearWeights& w, const void* codes, const void* scales, const void* aux, uint8_t* out,
                 int threads) {
    std::atomic<int> next{0};
    auto work = [&] {
        for (int t; (t = next.fetch_add(1)) < w.tiles();) pack_tile(w, t, codes, scales, aux, out + t * w.tile_bytes());
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
