#include "checksum.h"

#include <cstring>

namespace tinychat {
namespace {

constexpr uint64_t kOdd = 0x9E3779B97F4A7C15ull;
constexpr int kLanes = 8;  // independent chains: a multiplication takes several cycles and one can begin in each

uint64_t turned(uint64_t x) { return x << 29 | x >> 35; }

// One to one in `state` for each word and the other way round, so that a changed word always changes the state. The
// turn brings high bits down, where the multiplication carries them on.
uint64_t mixed(uint64_t state, uint64_t word) { return turned(state ^ word) * kOdd; }

}  // namespace

uint64_t checksum(const uint8_t* p, size_t n) {
    uint64_t lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = kOdd * (i + 1);
    size_t at = 0;
    for (; at + 8 * kLanes <= n; at += 8 * kLanes) {
        uint64_t words[kLanes];
        memcpy(words, p + at, sizeof words);
        for (int i = 0; i < kLanes; i++) lanes[i] = mixed(lanes[i], words[i]);
    }
    uint64_t sum = mixed(kOdd, n);
    for (int i = 0; i < kLanes; i++) sum = mixed(sum, lanes[i]);
    for (; at < n; at += 8) {
        uint64_t word = 0;
        memcpy(&word, p + at, n - at < 8 ? n - at : 8);
        sum = mixed(sum, word);
    }
    return mixed(sum, sum >> 32);
}

}  // namespace tinychat
