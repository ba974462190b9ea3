// Tile registers, as AMX has them: eight of up to 16 rows of 64 bytes, and products of signed bytes whose sums are
// 32-bit integers. The same operations twice: the CPU's instructions, and plain loops that do what Intel's manual says
// of them, faults included, for tests on CPUs that lack them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace tinychat {
namespace {

// What LDTILECFG reads. A tile that is used has rows and bytes in a row; all others have neither.
struct alignas(64) TileConfig {
    static constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int n, int bytes) {
        rows[tile] = static_cast<uint8_t>(n), row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// The instructions. They are written as assembly, so no unit needs a flag for them, and every operand that is memory is
// seen to be read or written: gcc 12 drops stores to a configuration that _tile_loadconfig alone reads.
struct AmxTiles {
    static void configure(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory"); }
    static void release() { __asm__ volatile("tilerelease" ::: "memory"); }
    template <int T>
    static void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    // Row i from p + i · stride bytes.
    template <int T>
    static void load(const void* p, ptrdiff_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    static void store(void* p, ptrdiff_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    // c[m][n] += Σ_k Σ_i a[m][4k + i] · b[k][4n + i], i = 0…3: 32-bit sums that wrap, of signed bytes.
    template <int C, int A, int B>
    static void dot() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

// The same without the instructions, a set of tiles for each thread. What faults on a CPU aborts.
class PlainTiles {
  public:
    static void configure(const TileConfig& c) {
        State& s = state();
        s = State{};
        if (c.palette == 0) return;
        bool fits = c.palette == 1;
        for (uint8_t b : c.reserved) fits &= b == 0;
        for (int t = 0; t < 16; t++) {
            const int rows = c.rows[t], bytes = c.row_bytes[t];
            fits &= t < TileConfig::kTiles ? rows <= TileConfig::kMostRows && bytes <= TileConfig::kMostBytes
                                           : !rows && !bytes;
        }
        need(fits);
        s.config = c, s.configured = true;
    }
    static void release() { state() = State{}; }
    template <int T>
    static void zero() {
        memset(used(T), 0, sizeof(Tile));
    }
    template <int T>
    static void load(const void* p, ptrdiff_t stride) {
        const TileConfig& c = state().config;
        Tile& tile = *used(T);
        memset(tile, 0, sizeof tile);  // rows and bytes that the configuration does not have
        for (int i = 0; i < c.rows[T]; i++)
            memcpy(tile[i], static_cast<const uint8_t*>(p) + i * stride, c.row_bytes[T]);
    }
    template <int T>
    static void store(void* p, ptrdiff_t stride) {
        const TileConfig& c = state().config;
        const Tile& tile = *used(T);
        for (int i = 0; i < c.rows[T]; i++) memcpy(static_cast<uint8_t*>(p) + i * stride, tile[i], c.row_bytes[T]);
    }
    template <int C, int A, int B>
    static void dot() {
        const TileConfig& s = state().config;
        Tile &c = *used(C), &a = *used(A), &b = *used(B);
        const int rows = s.rows[C], depth = s.row_bytes[A] / 4, columns = s.row_bytes[C] / 4;
        need(C != A && C != B && A != B);
        need(s.row_bytes[A] % 4 == 0 && s.row_bytes[C] % 4 == 0);
        need(s.rows[A] == rows && s.rows[B] == depth && s.row_bytes[B] == s.row_bytes[C]);
        for (int m = 0; m < rows; m++)
            for (int k = 0; k < depth; k++)
                for (int n = 0; n < columns; n++) {
                    uint32_t sum;
                    memcpy(&sum, c[m] + 4 * n, 4);
                    for (int i = 0; i < 4; i++) {
                        const int product = static_cast<int8_t>(a[m][4 * k + i]) * static_cast<int8_t>(b[k][4 * n + i]);
                        sum += static_cast<uint32_t>(product);
                    }
                    memcpy(c[m] + 4 * n, &sum, 4);
                }
    }

  private:
    using Tile = uint8_t[TileConfig::kMostRows][TileConfig::kMostBytes];
    struct State {
        TileConfig config;
        bool configured = false;
        Tile tiles[TileConfig::kTiles] = {};
    };
    static State& state() {
        static thread_local State s;
        return s;
    }
    static void need(bool ok) {
        if (!ok) std::abort();
    }
    // A tile that the configuration has.
    static Tile* used(int t) {
        State& s = state();
        need(s.configured && t < TileConfig::kTiles && s.config.rows[t] && s.config.row_bytes[t]);
        need(s.config.start_row == 0);
        return &s.tiles[t];
    }
};

// How the kernels use tiles: 8 rows of activations times 16 outputs, of 32 inputs, or of 16 inputs each where two
// weight groups share 32. Tiles 0…3 are sums, 4 and 5 activations, 6 and 7 weights.
inline TileConfig product_tiles(int inputs) {
    TileConfig c;
    for (int t = 0; t < 4; t++) c.set(t, 8, 64);
    for (int t = 4; t < 6; t++) c.set(t, 8, inputs);
    for (int t = 6; t < 8; t++) c.set(t, inputs / 4, 64);
    return c;
}

// out[m][n] = Σ_i x[m][i] · w[n][i] over `Inputs` inputs, 8 rows m that stand 32 bytes apart and 16 outputs n in
// byte-lines. Slot: which of four sums that may be in flight.
template <class T, int Inputs, int Slot>
inline void tile_product(const int8_t* x, const uint8_t* lines, int32_t* out) {
    constexpr int kC = Slot, kA = 4 + Slot % 2, kB = 6 + Slot % 2;
    T::template zero<kC>();
    T::template load<kA>(x, 32);
    T::template load<kB>(lines, 64);
    T::template dot<kC, kA, kB>();
    T::template store<kC>(out, 64);
}

}  // namespace
}  // namespace tinychat
