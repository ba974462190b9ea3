#pragma once

#include <cstddef>
#include <cstdint>

namespace tinychat {

// Where a mapped file became shorter, or its disk fails, reading the map raises SIGBUS in the middle of a kernel. That
// cannot be undone, but it can be said: the handler writes the message of the map that holds the address to stderr and
// ends the process with code 1. Faults that no map explains go to whoever handled them before.

// Watch a map. Returns what `unwatch_map` takes, or -1 where too many are watched: they get a message without a name.
int watch_map(const void* begin, size_t size, const char* message);
void unwatch_map(int id);

}  // namespace tinychat
