// AVX-512's kernels, with the linears of many rows on AMX's tiles. Tiles make the integer sums of 32 inputs; what
// follows is AVX-512's code, so every bit is that of its kernels, and rows of prefill equal rows of decoding.
#include "amx_tiles.h"
#include "linear_impl.h"
#include "vec_avx512.h"

namespace tinychat {
namespace {

// Rows from which tiles are used: two whole blocks. By counting, for 16 outputs and 32 inputs on a core with two
// 512-bit ports that loads two lines a cycle: vectors take 46 cycles for each 8 rows; tiles take 10 to open the codes,
// whatever the rows, and at least 16 for each block of 8 or less (32 loads; 8 lines stored and 16 vector instructions
// overlap), and come with a latency of a hundred or more. So 9 rows are 57 cycles or 42 and a latency, 16 rows 92
// or 42. What stands beside the tile instructions, without these (lines stored by vectors), is as fast as all of the
// vector kernel at 9 rows of 4 bits and 1.5 × at 16; of Q6_K, which has two sums in 32 inputs, 0.75 × and 1.1 × (AMD
// EPYC, Zen 4).
constexpr int kTileRows = 16;

using Sums = int32_t[kOpenInputs / kActGroup][2][kRowBlock][kTile];

// Sums of `parts` times 32 inputs: of all of them, or of each half.
template <class T, bool Half>
void sum_parts(const int8_t* x, const uint8_t* lines, int parts, Sums& out) {
    const auto part = [&](auto slot, int i) {
        const int8_t* a = x + i * kRowBlock * kActGroup;
        const uint8_t* b = lines + i * kActGroup * kTile;
        tile_product<T, Half ? 16 : 32, slot>(a, b, out[i][0][0]);
        if constexpr (Half) tile_product<T, 16, (slot + 1) % 4>(a + 16, b + 16 * kTile, out[i][1][0]);
    };
    constexpr int kStep = Half ? 2 : 1;
    int i = 0;
    for (; i + 4 / kStep <= parts; i += 4 / kStep)
        unroll<4 / kStep>([&](auto s) { part(std::integral_constant<int, s * kStep>{}, i + s); });
    for (; i < parts; i++) part(std::integral_constant<int, 0>{}, i);
}

// opened_quantized with tiles. All 8 rows of the block are computed, whether the step has them or not: `out` has room.
// The sums of 256 inputs are made while those of the 256 before are scaled.
template <class T, WeightKind C, bool Half>
void tiled_quantized(const LinearWeights& w, const OpenedTile& t, const Activations& x, int m0, int k, int groups,
                     float* out) {
    using S = Avx512;
    Totals<S, kRowBlock> total;
    for (int m = 0; m < kRowBlock; m++) total[0][m] = S::load(out + m * kTile);
    const int run = w.group < kSuper ? kSuper / w.group : 1;
    alignas(64) Sums sums[2];
    const auto inputs = [&](int g) { return stretch_at<8>(t.lines + g * w.group * kTile, x, m0, k + g * w.group); };
    const auto make = [&](int g) {
        const Stretch<int8_t> at = inputs(g);
        sum_parts<T, Half>(at.x, at.lines, imin(run, groups - g) * w.group / kActGroup, sums[g / run % 2]);
    };
    make(0);
    for (int g = 0; g < groups; g += run) {
        if (g + run < groups) make(g + run);
        const Stretch<int8_t> at = inputs(g);
        const Stretch<int32_t> summed = {at.lines, sums[g / run % 2][0][0][0], at.xscale, at.nsum, at.gsum};
        add_any_groups<S, kRowBlock, C, kSummed, Half>(summed, w, g, imin(g + run, groups), t.beside, total);
    }
    for (int m = 0; m < kRowBlock; m++) S::store(out + m * kTile, total[0][m]);
}

template <class T>
void linear_tiled(const LinearArgs& a) {
    const LinearWeights& w = *a.w;
    if (a.rows < kTileRows || !w.quantized() || a.x->bits != 8 || w.group > kOpenInputs)
        return kernels_avx512().linear(a);
    const bool half = w.group < kActGroup;
    T::configure(product_tiles(half ? 16 : 32));
    linear_opened<Avx512>(a, [&](int) -> OpenedFn {
        if (has_signed_bytes(w.kind)) return tiled_quantized<T, WeightKind::kSigned, false>;
        return half ? tiled_quantized<T, WeightKind::kBytes, true> : tiled_quantized<T, WeightKind::kBytes, false>;
    });
    T::release();  // tiles in use would be saved at every switch of threads
}

template <class T>
KernelTable with_tiles(const char* name) {
    KernelTable table = kernels_avx512();
    table.name = name, table.linear = linear_tiled<T>;
    return table;
}

}  // namespace

const KernelTable& kernels_amx() {
    static const KernelTable table = with_tiles<AmxTiles>("amx");
    return table;
}
const KernelTable& kernels_amx_emulated() {
    static const KernelTable table = with_tiles<PlainTiles>("amx-emulated");
    return table;
}

}  // namespace tinychat
