#pragma once

#include <cstddef>
#include <cstdint>

namespace tinychat {

// A 64-bit checksum of n bytes that finds every change within one 8-byte word, and others but for one in 2^64.
// It is against rot, not against an adversary. Reads at the speed of one core (`benchmarks/checksum.py`).
uint64_t checksum(const uint8_t* p, size_t n);

}  // namespace tinychat
