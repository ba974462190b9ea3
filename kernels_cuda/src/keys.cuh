// Numbers with ids in an order: as 64-bit keys that compare like integers, the greater key first.
#pragma once

#include "device.cuh"

// A number's place among all: the larger before the smaller, the lowest id first among equals (0 and -0 are equal), NaN
// before all. 0 is no number's.
DEVICE u64 key_of(float x, int id) {
    u32 bits = bits_of(x + 0.0f), order = bits >> 31 ? ~bits : bits | 0x80000000;
    return static_cast<u64>(x == x ? order : ~0u) << 32 | ~static_cast<u32>(id);
}

DEVICE float value_of(u64 key) {
    u32 order = static_cast<u32>(key >> 32);
    return float_of(order >> 31 ? order & 0x7fffffff : ~order);
}

DEVICE int id_of(u64 key) { return static_cast<int>(~static_cast<u32>(key)); }
