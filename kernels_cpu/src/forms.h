// Forms of a weight as the kernels have them: codes, and what stands beside them. Any codes may have anything beside.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinychat {

constexpr int kTile = 16;    // output rows of one weight line: row r lives in 32-bit lane r
constexpr int kSuper = 256;  // inputs that share the number which integer scales are multiplied by

// Codes, or floats. The numbers are those of packs.
//   32 inputs are as many lines of 64 bytes as a code has bits. Their 8 byte-lines (16 rows × 4 inputs, the inputs in
//   the bytes of a lane) are cut into planes, which follow each other:
//     4 bits: 4 lines; byte-line 2l in the low nibbles of line l, 2l + 1 in the high ones
//     2 bits: 2 lines; byte-line b in bits 2 (b % 4) of line b / 4
//     1 bit:  1 line;  byte-line b in bit b
//   6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1, the upper bits last; 8-bit codes are byte-lines, signed
enum class WeightKind : int {
    kW4 = 0,
    kW8 = 1,
    kF32 = 2,
    kF16 = 3,
    kBF16 = 4,
    kW2 = 5,
    kW3 = 6,
    kW5 = 7,
    kW6 = 8,
    kIq4Nl = 9,    // 4 bits, through llama.cpp's table of 16 signed values
    kE2m1 = 10,    // 4 bits, floats of 4 bits: twice their values, so that they are integers
    kE4m3 = 11,    // 8 bits, floats; two inputs of the 16 rows are 32 bytes, a row's two side by side
    kNf4 = 12,     // 4 bits, through bitsandbytes' table of 16 floats
    kBytes = 13,   // opened codes, in memory only: byte-lines of unsigned values
    kSigned = 14,  // the same, signed
};
constexpr int kPackedKinds = 13;

constexpr bool is_dense(WeightKind k) {
    return k == WeightKind::kF32 || k == WeightKind::kF16 || k == WeightKind::kBF16;
}
constexpr bool has_float_codes(WeightKind k) { return k == WeightKind::kE4m3 || k == WeightKind::kNf4; }
constexpr int element_bytes(WeightKind k) { return k == WeightKind::kF32 ? 4 : is_dense(k) ? 2 : 1; }
constexpr int code_bits(WeightKind k) {
    switch (k) {
        case WeightKind::kW2:
            return 2;
        case WeightKind::kW3:
            return 3;
        case WeightKind::kW5:
            return 5;
        case WeightKind::kW6:
            return 6;
        case WeightKind::kW8:
        case WeightKind::kE4m3:
        case WeightKind::kBytes:
        case WeightKind::kSigned:
            return 8;
        default:
            return 4;
    }
}
// Codes whose byte-lines are signed numbers; those of all others are unsigned.
constexpr bool has_signed_bytes(WeightKind k) {
    return k == WeightKind::kW8 || k == WeightKind::kIq4Nl || k == WeightKind::kSigned;
}
// Largest byte of unsigned byte-lines.
constexpr int largest_byte(WeightKind k) {
    return k == WeightKind::kE2m1 ? 24 : k == WeightKind::kBytes ? 63 : (1 << code_bits(k)) - 1;
}
// What byte-lines are off by where nothing beside the codes says it: they are symmetric.
constexpr int off_by(WeightKind k) {
    return has_signed_bytes(k) || has_float_codes(k) ? 0 : k == WeightKind::kE2m1 ? 12 : 1 << (code_bits(k) - 1);
}

constexpr uint8_t kIq4NlBytes[16] = {
    129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113,  // the first eight are negative
};
constexpr uint8_t kE2m1Bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // 12 + 2 · value

// What kernels make of a code, times this, is its value.
constexpr float code_unit(WeightKind k) {
    return k == WeightKind::kE2m1 ? 0.5f : k == WeightKind::kE4m3 ? 256.0f : 1.0f;
}

constexpr float kNf4Values[16] = {-1.0f,         -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                                  -0.091050036f, 0.0f,        0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                                  0.44070983f,   0.562617f,   0.72295684f,  1.0f};

// What stands beside a group's codes, for each of the 16 rows of a tile. w = (q - zero) · scale, or q · scale + offset.
// Without zero and offset, zero is off_by. The numbers are those of packs.
//   Numbers that integers are multiplied by stand before the integers of their 256 inputs: those of the scales, those
//   of the offsets. Six bits are cut into four and two: of scales alone, two groups share 16 bytes of lower and four
//   groups 16 bytes of upper bits, the first group in the lowest; of pairs, the scale's lower four are below the
//   offset's, and two groups share 16 bytes of upper bits.
enum class Meta : int {
    kSym = 0,         // fp16 scale
    kZero4 = 1,       // fp16 scale, 4-bit zero 0…15 (row r: byte r % 8, low nibble for r < 8)
    kOffset16 = 2,    // fp16 scale, fp16 offset
    kFloat = 3,       // fp32 scale, fp32 offset: whatever does not fit the others exactly
    kNone = 4,        // dense
    kFloatScale = 5,  // fp32 scale
    kInt4Pair = 6,    // 4-bit scale in the low nibble, offset in the high one, each times an fp16
    kInt6 = 7,        // 6-bit scale 0…63 times fp16
    kSigned6 = 8,     // 6-bit scale -32…31 (stored 32 higher) times fp16
    kInt6Pair = 9,    // 6-bit scale and offset 0…63, each times an fp16
    kInt8 = 10,       // signed 8-bit scale times fp16
    kE8m0 = 11,       // power of two: 8 bits of exponent
    kE4m3 = 12,       // e4m3 scale, times an fp32 of the row; these stand before all groups
};
constexpr int kMetas = 13;

constexpr bool has_supers(Meta m) { return m >= Meta::kInt4Pair && m <= Meta::kInt8; }
constexpr bool has_offsets(Meta m) {
    return m == Meta::kOffset16 || m == Meta::kFloat || m == Meta::kInt4Pair || m == Meta::kInt6Pair;
}
// Bytes that stand before the groups: of 256 inputs where integers have such, else of the tile.
constexpr size_t head_bytes(Meta m) { return m == Meta::kE4m3 ? 64 : !has_supers(m) ? 0 : has_offsets(m) ? 64 : 32; }
// Bytes of some groups that follow each other.
constexpr size_t group_bytes(Meta m, size_t groups) {
    switch (m) {
        case Meta::kSym:
            return 32 * groups;
        case Meta::kZero4:
            return 40 * groups;
        case Meta::kOffset16:
        case Meta::kFloatScale:
            return 64 * groups;
        case Meta::kFloat:
            return 128 * groups;
        case Meta::kNone:
            return 0;
        case Meta::kInt6:
        case Meta::kSigned6:
            return 16 * ((groups + 1) / 2 + (groups + 3) / 4);
        case Meta::kInt6Pair:
            return 16 * (groups + (groups + 1) / 2);
        default:
            return 16 * groups;
    }
}
// Bytes of k inputs, with what stands before all; integers stand in whole 256 inputs.
constexpr size_t meta_bytes(Meta m, size_t k, size_t group) {
    if (has_supers(m)) return k / kSuper * (head_bytes(m) + group_bytes(m, kSuper / group));
    return head_bytes(m) + group_bytes(m, k / group);
}

}  // namespace tinychat
