#pragma once

#include <cstddef>

namespace tinychat {

// Best of `rounds` plain sequential reads of `bytes` bytes spread over `threads` threads, in GB/s (1e9 bytes a second).
// This is the limit that decode is compared with; it must be measured in the same sitting.
double read_bandwidth(int threads, size_t bytes, int rounds);

}  // namespace tinychat
