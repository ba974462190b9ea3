// Byte-lines out of codes of any width: 16 rows × 4 inputs as bytes, the inputs of a row in its 32-bit lane.
// Included by the ISA translation units only.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "layout.h"

namespace tinychat {
namespace {

// f(0), f(1), … f(N - 1), each with a constant.
template <int N, class Fn, int... I>
inline __attribute__((always_inline)) void unroll_each(Fn& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class Fn>
inline __attribute__((always_inline)) void unroll(Fn f) {
    unroll_each<N>(f, std::make_integer_sequence<int, N>{});
}

// Byte-line B of 32 inputs; lines: the first line of these, at the first of the register's rows.
template <class S, WeightKind C, int B>
inline __attribute__((always_inline)) typename S::I byte_line(const uint8_t* lines) {
    using I = typename S::I;
    if constexpr (code_bits(C) == 8) return S::line(lines + B * 64);
    if constexpr (C == WeightKind::kW2)
        return S::masked(S::template shift<-2 * (B % 4)>(S::line(lines + B / 4 * 64)), 3);
    if constexpr (C == WeightKind::kW3) {
        const I low = S::masked(S::template shift<-2 * (B % 4)>(S::line(lines + B / 4 * 64)), 3);
        return S::merge(low, S::template shift<2 - B>(S::line(lines + 128)), 4);
    }
    const I two = S::line(lines + B / 2 * 64), low = B % 2 ? S::high(two) : S::low(two);
    if constexpr (C == WeightKind::kW5) return S::merge(low, S::template shift<4 - B>(S::line(lines + 256)), 16);
    if constexpr (C == WeightKind::kW6)
        return S::merge(low, S::template shift<4 - 2 * (B % 4)>(S::line(lines + 256 + B / 4 * 64)), 48);
    if constexpr (C == WeightKind::kIq4Nl) return S::lookup(low, kIq4NlBytes);
    if constexpr (C == WeightKind::kE2m1) return S::lookup(low, kE2m1Bytes);
    return low;
}

// The byte of one row and input, as a number. lines: of the tile.
inline int code_at(WeightKind kind, const uint8_t* lines, int row, int k) {
    lines += static_cast<size_t>(k / 32) * code_bits(kind) * 64 + row * 4 + k % 4;
    const int b = k % 32 / 4;
    if (kind == WeightKind::kW8) return static_cast<int8_t>(lines[b * 64]);
    const auto plane1 = [&](int at) { return lines[at] >> b & 1; };
    const auto plane2 = [&](int at) { return lines[at + b / 4 * 64] >> 2 * (b % 4) & 3; };
    const int plane4 = lines[code_bits(kind) < 4 ? 0 : b / 2 * 64] >> 4 * (b % 2) & 15;
    switch (kind) {
        case WeightKind::kW2:
            return plane2(0);
        case WeightKind::kW3:
            return plane2(0) | plane1(128) << 2;
        case WeightKind::kW5:
            return plane4 | plane1(256) << 4;
        case WeightKind::kW6:
            return plane4 | plane2(256) << 4;
        case WeightKind::kIq4Nl:
            return static_cast<int8_t>(kIq4NlBytes[plane4]);
        case WeightKind::kE2m1:
            return kE2m1Bytes[plane4];
        default:
            return plane4;
    }
}

// The value of one row and input, without code_unit. lines: of the tile.
inline float value_at(WeightKind kind, const uint8_t* lines, int row, int k) {
    if (kind == WeightKind::kNf4) return kNf4Values[code_at(kind, lines, row, k)];
    if (kind != WeightKind::kE4m3) return static_cast<float>(code_at(kind, lines, row, k));
    const uint8_t code = lines[(static_cast<size_t>(k) / 2 * kTile + row) * 2 + k % 2];
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 18) : std::ldexp(1.0f * mantissa, -17);
    return code & 128 ? -size : size;
}

// Codes of `parts` times 32 inputs → byte-lines.
template <class S, WeightKind C>
void open_codes(const uint8_t* lines, int parts, uint8_t* out) {
    for (; parts > 0; parts--, lines += code_bits(C) * 64, out += 512)
        unroll<8>([&](auto b) {
            for (int h = 0; h < kTile; h += S::kLanes)
                S::store_line(out + b * 64 + h * 4, byte_line<S, C, b>(lines + h * 4));
        });
}

}  // namespace
}  // namespace tinychat
