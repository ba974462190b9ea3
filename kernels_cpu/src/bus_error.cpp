#include "bus_error.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>

namespace tinychat {
namespace {

constexpr int kMaps = 512, kMessage = 512;
constexpr char kUnnamed[] =
    "Error: A file became shorter while it was read.\nWait until it is whole, then try again.\n";

// A slot is free while `size` is 0. The handler may run at any time, so `size` is written last and cleared first.
struct Map {
    std::atomic<uintptr_t> begin{0};
    std::atomic<size_t> size{0};
    char message[kMessage];
};

Map maps[kMaps];
std::mutex maps_mutex;
struct sigaction before;

void say_and_exit(const char* text) {
    for (size_t n = strlen(text); n;) {
        ssize_t written = write(2, text, n);
        if (written <= 0) break;
        text += written, n -= written;
    }
    _exit(1);
}

void handle(int signal, siginfo_t* info, void* context) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (const Map& m : maps) {
        const size_t size = m.size.load(std::memory_order_acquire);
        if (size && at - m.begin.load(std::memory_order_relaxed) < size) say_and_exit(m.message);
    }
    const bool theirs = before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN;
    if (!theirs && info->si_code == BUS_ADRERR) say_and_exit(kUnnamed);
    if (theirs && before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
    if (theirs) return before.sa_handler(signal);
    sigaction(signal, &before, nullptr);  // what follows is the same fault again, as if we had not been there
}

void install() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

}  // namespace

int watch_map(const void* begin, size_t size, const char* message) {
    std::lock_guard<std::mutex> lock(maps_mutex);
    static const bool installed = (install(), true);
    (void)installed;
    for (int i = 0; i < kMaps; i++) {
        Map& m = maps[i];
        if (m.size.load() || !size) continue;
        strncpy(m.message, message, kMessage - 1);
        m.begin.store(reinterpret_cast<uintptr_t>(begin), std::memory_order_relaxed);
        m.size.store(size, std::memory_order_release);
        return i;
    }
    return -1;
}

void unwatch_map(int id) {
    std::lock_guard<std::mutex> lock(maps_mutex);
    if (id >= 0 && id < kMaps) maps[id].size.store(0);
}

}  // namespace tinychat
