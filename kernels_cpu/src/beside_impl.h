// What stands beside codes → a scale and an offset in fp32 for each group and row: w = byte · scale + offset.
// Included by the ISA translation units only.
#pragma once

#include "layout.h"

namespace tinychat {
namespace {

constexpr int kMostGroups = 64;  // that are opened at once

// Of groups that follow each other. Where nothing is stored for offsets, they are zero · scale.
struct alignas(64) Beside {
    float scale[kMostGroups * kTile], offset[kMostGroups * kTile];
    float zero;
};

// Opens groups of one tile, first in `out`: scales, and offsets where the form stores them.
template <class S>
struct BesideOpener {
    using F = typename S::F;
    using I = typename S::I;
    float *scale, *offset;
    float unit;  // of the codes

    BesideOpener(const LinearWeights& w, Beside& out) : scale(out.scale), offset(out.offset), unit(code_unit(w.kind)) {
        out.zero = static_cast<float>(-off_by(w.kind));
    }

    void put(int g, int h, F s) { S::store(scale + g * kTile + h, unit == 1.0f ? s : S::mul(s, S::set1(unit))); }
    void put(int g, int h, F s, F o) {
        S::store(scale + g * kTile + h, s);
        S::store(offset + g * kTile + h, o);
    }

    // Groups that follow each other at p. rows: the start of the tile.
    template <Meta K>
    void plain(const uint8_t* p, int count, const uint8_t* rows) {
        for (int g = 0; g < count; g++, p += group_bytes(K, 1))
            for (int h = 0; h < kTile; h += S::kLanes) one<K>(g, h, p, rows);
    }
    template <Meta K>
    void one(int g, int h, const uint8_t* p, const uint8_t* rows) {
        const uint16_t* half = reinterpret_cast<const uint16_t*>(p) + h;
        const float* full = reinterpret_cast<const float*>(p) + h;
        if constexpr (K == Meta::kSym) put(g, h, S::load_f16(half));
        if constexpr (K == Meta::kZero4) {
            const F s = S::load_f16(half);
            put(g, h, s, S::mul(s, S::sub(S::zero(), S::to_float(S::zeros4(p + 32, h)))));
        }
        if constexpr (K == Meta::kOffset16) put(g, h, S::load_f16(half), S::load_f16(half + kTile));
        if constexpr (K == Meta::kFloat) put(g, h, S::load(full), S::load(full + kTile));
        if constexpr (K == Meta::kFloatScale) put(g, h, S::load(full));
        if constexpr (K == Meta::kE8m0)  // the exponent 0 is the denormal 2^-127
            put(g, h, S::max(S::as_float(S::template shift32<23>(S::load_u8(p + h))), S::set1(0x1p-127f)));
        if constexpr (K == Meta::kE4m3) {  // without denormals, which threads may take for 0
            const I code = S::load_u8(p + h), size = S::template shift32<20>(S::masked(code, 127));
            const F normal = S::as_float(S::addi(size, S::set1i(120 << 23)));
            const F small = S::mul(S::sub(normal, S::set1(0x1p-7f)), S::set1(2.0f));  // of exponent 0
            const F value = S::select_lt(normal, S::set1(0x1p-6f), small, normal);
            const I sign = S::template shift32<24>(S::masked(code, 128));
            const F row = S::load(reinterpret_cast<const float*>(rows) + h);
            put(g, h, S::mul(row, S::as_float(S::or_(S::bits(value), sign))));
        }
    }

    // Groups first … first + count - 1 are those of 256 inputs at p, numbers that integers are multiplied by first.
    template <Meta K>
    void super(const uint8_t* p, int first, int count) {
        const uint8_t* codes = p + head_bytes(K);
        for (int h = 0; h < kTile; h += S::kLanes) {
            const F d = S::load_f16(reinterpret_cast<const uint16_t*>(p) + h);
            if constexpr (K == Meta::kInt8) {
                for (int g = 0; g < count; g++)
                    put(first + g, h, S::mul(d, S::load_i8(reinterpret_cast<const int8_t*>(codes + g * 16 + h))));
            } else if constexpr (K == Meta::kInt6 || K == Meta::kSigned6) {
                const F least = S::mul(d, S::set1(K == Meta::kSigned6 ? -32.0f : 0.0f));
                for (int g = 0; g < count; g += 4) fours(codes + h, first + g, g, count, h, d, least);
            } else {
                const F dmin = S::load_f16(reinterpret_cast<const uint16_t*>(p) + kTile + h);
                for (int g = 0; g < count; g += 2) pairs<K>(codes + h, first + g, g, count, h, d, dmin);
            }
        }
    }
    void fours(const uint8_t* p, int to, int g, int count, int h, F d, F least) {
        const auto put_code = [&](int i, I low, I high) {
            if (g + i < count) put(to + i, h, S::fma(S::to_float(S::merge(low, high, 48)), d, least));
        };
        const I upper = S::load_u8(p + ((count + 1) / 2 + g / 4) * 16), a = S::load_u8(p + g / 2 * 16);
        put_code(0, S::masked(a, 15), S::template shift<4>(upper));
        put_code(1, S::template shift<-4>(a), S::template shift<2>(upper));
        if (g + 2 >= count) return;
        const I b = S::load_u8(p + (g / 2 + 1) * 16);
        put_code(2, S::masked(b, 15), upper);
        put_code(3, S::template shift<-4>(b), S::template shift<-2>(upper));
    }
    template <Meta K>
    void pairs(const uint8_t* p, int to, int g, int count, int h, F d, F dmin) {
        const auto put_codes = [&](int i, I s, I m) {
            put(to + i, h, S::mul(d, S::to_float(s)), S::mul(dmin, S::to_float(m)));
        };
        const I a = S::load_u8(p + g * 16), b = g + 1 < count ? S::load_u8(p + (g + 1) * 16) : a;
        I s0 = S::masked(a, 15), m0 = S::template shift<-4>(a), s1 = S::masked(b, 15), m1 = S::template shift<-4>(b);
        if constexpr (K == Meta::kInt6Pair) {
            const I upper = S::load_u8(p + (count + g / 2) * 16);
            s0 = S::merge(s0, S::template shift<4>(upper), 48), m0 = S::merge(m0, S::template shift<2>(upper), 48);
            s1 = S::merge(s1, upper, 48), m1 = S::merge(m1, S::template shift<-2>(upper), 48);
        }
        put_codes(0, s0, m0);
        if (g + 1 < count) put_codes(1, s1, m1);
    }
};

// Groups first … first + count - 1 of a tile; whole supers where the form has them. At most kMostGroups.
template <class S>
void open_beside(const LinearWeights& w, const uint8_t* tile, int first, int count, Beside& out) {
    BesideOpener<S> opener(w, out);
    const int groups = has_supers(w.meta) ? kSuper / w.group : 1;
    const uint8_t* p = tile + (has_supers(w.meta) ? meta_bytes(w.meta, static_cast<size_t>(first) * w.group, w.group)
                                                  : head_bytes(w.meta) + group_bytes(w.meta, 1) * first);
    switch (w.meta) {
#define TC_PLAIN(K) \
    case Meta::K:   \
        return opener.template plain<Meta::K>(p, count, tile)
#define TC_SUPER(K)                                                                        \
    case Meta::K:                                                                          \
        for (int g = 0; g < count; g += groups, p += meta_bytes(Meta::K, kSuper, w.group)) \
            opener.template super<Meta::K>(p, g, groups);                                  \
        return
        TC_PLAIN(kSym);
        TC_PLAIN(kZero4);
        TC_PLAIN(kOffset16);
        TC_PLAIN(kFloat);
        TC_PLAIN(kFloatScale);
        TC_PLAIN(kE8m0);
        TC_PLAIN(kE4m3);
        TC_SUPER(kInt4Pair);
        TC_SUPER(kInt6);
        TC_SUPER(kSigned6);
        TC_SUPER(kInt6Pair);
        TC_SUPER(kInt8);
#undef TC_PLAIN
#undef TC_SUPER
        case Meta::kNone:
            return;
    }
}

}  // namespace
}  // namespace tinychat
