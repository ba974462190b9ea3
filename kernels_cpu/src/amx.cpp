#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tiles.h"

namespace tinychat {
namespace {

constexpr int kSums = 8 * 16;

// A product in tiles; of bytes that have the largest sums, and of others.
template <class T, int Inputs, int Slot>
void multiply(int32_t (&out)[kSums]) {
    alignas(64) int8_t x[8 * 32];
    alignas(64) uint8_t lines[32 * 16];
    for (int i = 0; i < 8 * 32; i++) x[i] = static_cast<int8_t>(i < 32 ? -127 : i * 37 % 255 - 127);
    for (int i = 0; i < 32 * 16; i++) lines[i] = static_cast<uint8_t>(i % 64 < 4 ? 128 : i * 101 + 7);
    T::configure(product_tiles(Inputs));
    tile_product<T, Inputs, Slot>(x, lines, out);
    T::release();
}

template <int Inputs, int Slot>
bool agree() {
    alignas(64) int32_t tiles[kSums], plain[kSums];
    multiply<AmxTiles, Inputs, Slot>(tiles);
    multiply<PlainTiles, Inputs, Slot>(plain);
    return memcmp(tiles, plain, sizeof tiles) == 0;
}

const char* find_problem() {
    constexpr int kOsxsave = 27, kTile = 24, kInt8 = 25;  // bits of cpuid
    constexpr unsigned kTileState = 3u << 17;             // of XCR0
    constexpr long kRequest = 0x1023, kTileData = 18;     // ARCH_REQ_XCOMP_PERM
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> kTile & 1) || !(d >> kInt8 & 1)) return "";
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> kOsxsave & 1)) return "the operating system does not save registers";
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    if ((a & kTileState) != kTileState) return "the operating system does not save tiles";
    if (syscall(SYS_arch_prctl, kRequest, kTileData)) return "the kernel does not give this process tiles";
    const bool right = agree<32, 0>() && agree<32, 1>() && agree<32, 2>() && agree<32, 3>() && agree<16, 0>() &&
                       agree<16, 1>() && agree<16, 2>() && agree<16, 3>();
    return right ? nullptr : "products came out wrong";
}

}  // namespace

const char* amx_problem() {
    static const char* const problem = find_problem();
    return problem;
}

}  // namespace tinychat
#else
namespace tinychat {
const char* amx_problem() { return ""; }
}  // namespace tinychat
#endif
