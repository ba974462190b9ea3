// Memory and threads for compiled kernels (ptx.h), and what compute-sanitizer would look for. Threads are the fibers of
// src/host.h; nothing else is shared with the emulation, whose twins (device.cuh) this is a second opinion of.
//
//   memory   every access lies in an allocation and is aligned to its width
//   races    two threads touch a byte, one of them writes, and no barrier lies between (blocks have none): an error.
//            Shuffles and mma order nothing; bar.warp.sync orders a warp. What cp.async writes belongs to nobody from
//            its issue until the thread that asked for it has waited
//   shared   a byte is written before it is read
//   overlap  a kernel that may start early has every thread wait for those before it, and reads nothing but by
//            cp.async (weights) until then
// TINYCHAT_TEST_RACES=0 leaves those in global memory out (40 bytes are kept for each byte that a launch touches).
#include "ptx.h"

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "host.h"

namespace ptx {

constexpr int SHARED = 48 << 10;

void fail(const char* what, int line) {
    static std::string text;
    text = std::string(what) + " (PTX line " + std::to_string(line) + ", block " + std::to_string(blockIdx.x) + "," +
           std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ", thread " + std::to_string(threadIdx.x) +
           ")";
    host::fail(text.c_str());
}

static u32 along(const dim3& d, int axis) { return axis == 0 ? d.x : axis == 1 ? d.y : d.z; }
u32 tid(int axis) { return along(threadIdx, axis) - (axis ? 1 : 0); }  // a dim3 is 1 where nobody says otherwise
u32 ntid(int axis) { return along(blockDim, axis); }
u32 ctaid(int axis) { return along(blockIdx, axis); }
u32 nctaid(int axis) { return along(gridDim, axis); }

// ---- who touched a byte

// Threads are counted from 1: all zeros is that nobody has touched it, and costs no initialization.
struct Clock {
    unsigned block, barriers, syncs;
    int thread;
    int warp() const { return (thread - 1) / 32; }
};

struct Touched {
    Clock write, read;  // of several readers, the thread is SEVERAL, and so is their warp
    int reading_warp;
    bool several_blocks, atomic, pending;
    static constexpr int SEVERAL = -1;
};

struct Thread {
    bool waited;
    unsigned barriers = 0, syncs = 0, collectives = 0;
    int committed = 0;
    struct Copy {
        u32 to;
        u64 from;
        int bytes, group, line;
    };
    std::vector<Copy> copies;
};

struct Lanes {
    u32 words[2][32][8];
};

static std::vector<Thread> threads;
static std::vector<Lanes> lanes;
static unsigned block_number;
static bool races = !getenv("TINYCHAT_TEST_RACES") || strcmp(getenv("TINYCHAT_TEST_RACES"), "0");
alignas(16) static u8 shared[SHARED];
static Touched shared_touched[SHARED];

struct Page {
    unsigned launch;
    Touched bytes[4096];
};
static std::unordered_map<u64, std::unique_ptr<Page>> pages;
static unsigned launch_number;

static Find find_allocation;
static u64 known_begin, known_end;  // the allocation of the last access
static u64 own_begin, own_end;      // constants of the module

static Thread& me() { return threads[threadIdx.x]; }
static Clock now() { return {block_number, me().barriers, me().syncs, static_cast<int>(threadIdx.x) + 1}; }

// Whether what `a` did is over, and seen, before what `b` does.
static bool ordered(const Clock& a, const Clock& b) {
    if (!a.thread) return true;
    if (a.block != b.block) return false;
    if (a.barriers < b.barriers || a.thread == b.thread) return true;
    return a.warp() == b.warp() && a.syncs < b.syncs;
}

static void read_byte(Touched& t, const Clock& c, int line) {
    if (t.pending) fail("a byte is read that cp.async may be writing", line);
    if (!ordered(t.write, c)) fail("a byte is read that another thread wrote, with no barrier between", line);
    bool with_others = t.read.thread && t.read.block == c.block && t.read.barriers == c.barriers &&
                       !(t.reading_warp == c.warp() && t.read.syncs < c.syncs);
    if (t.read.thread && t.read.block != c.block) {
        t.several_blocks = true;
    } else if (!with_others) {
        t.read = c, t.reading_warp = c.warp();
    } else {
        if (t.read.thread != c.thread) t.read.thread = Touched::SEVERAL;
        if (t.reading_warp != c.warp()) t.reading_warp = Touched::SEVERAL;
    }
}

static void write_byte(Touched& t, const Clock& c, bool atomic, int line) {
    if (t.pending) fail("a byte is written that cp.async may be writing", line);
    if (!(atomic && t.atomic) && !ordered(t.write, c))
        fail("a byte is written that another thread wrote, with no barrier between", line);
    if (t.read.thread) {
        bool over = !t.several_blocks && t.read.block == c.block &&
                    (t.read.barriers < c.barriers || t.read.thread == c.thread ||
                     (t.reading_warp == c.warp() && t.read.syncs < c.syncs));
        if (!over) fail("a byte is written that another thread read, with no barrier between", line);
    }
    t.write = c;
    t.atomic = atomic;
    t.read.thread = 0;
}

static void touch(Touched& t, Access access, const Clock& c, int line) {
    if (access == Access::READ)
        read_byte(t, c, line);
    else
        write_byte(t, c, access == Access::ATOMIC, line);
}

static Touched* touched_page(u64 address) {
    static u64 last_key = ~u64(0);
    static Page* last = nullptr;
    u64 key = address / 4096;
    if (key != last_key || last->launch != launch_number) {
        auto& page = pages[key];
        if (!page) page = std::make_unique<Page>();
        if (page->launch != launch_number) memset(page.get(), 0, sizeof(Page)), page->launch = launch_number;
        last_key = key, last = page.get();
    }
    return last->bytes;
}

void wait_for_kernels() { me().waited = true; }

void end(int line) {
    if (!me().waited) fail("a thread ends that has not waited for the kernels before", line);
}

static u8* in_allocation(u64 address, unsigned bytes, Access access, int line) {
    if (address % bytes) fail("an address is not aligned", line);
    bool own = address >= own_begin && address + bytes <= own_end;
    if (!own && (address < known_begin || address + bytes > known_end)) {
        if (!find_allocation(address, &known_begin, &known_end) || address + bytes > known_end)
            fail("outside of what is allocated", line);
    }
    if (races && !own) {
        Clock c = now();
        for (unsigned i = 0; i < bytes; ++i) touch(touched_page(address + i)[(address + i) % 4096], access, c, line);
    }
    return reinterpret_cast<u8*>(address);
}

u8* global(u64 address, unsigned bytes, Access access, int line) {
    if (!me().waited) fail("memory is touched before the kernels before have ended", line);
    return in_allocation(address, bytes, access, line);
}

u8* in_shared(u64 address, unsigned bytes, Access access, int line) {
    if (address % bytes) fail("a shared address is not aligned", line);
    if (address + bytes > SHARED) fail("outside of shared memory", line);
    Clock c = now();
    for (unsigned i = 0; i < bytes; ++i) {
        Touched& t = shared_touched[address + i];
        if (access != Access::WRITE && !t.write.thread && !t.pending) fail("shared memory is read unwritten", line);
        touch(t, access, c, line);
    }
    return shared + address;
}

u32 atomic_add_shared(u64 address, u32 n, int line) {
    u8* p = in_shared(address, 4, Access::ATOMIC, line);
    u32 was;
    memcpy(&was, p, 4);
    n += was;
    memcpy(p, &n, 4);
    return was;
}

// ---- threads together

void barrier() {
    ++me().barriers;
    host::yield(host::State::AT_BLOCK);
}

void warp_barrier(u32 mask, int line) {
    if (mask != ~0u) fail("a barrier of some lanes", line);
    ++me().syncs;
    host::yield(host::State::AT_WARP);
}

static u32 (&exchange_place())[32][8] { return lanes[threadIdx.x / 32].words[me().collectives++ % 2]; }

u32 shuffle_xor(u32 x, u32 mask, u32 clamp, u32 members, int line) {
    if (members != ~0u || clamp != 31) fail("a shuffle of some lanes", line);
    auto& place = exchange_place();
    place[threadIdx.x % 32][0] = x;
    host::yield(host::State::AT_WARP);
    return place[threadIdx.x % 32 ^ mask][0];
}

// Figures "MMA .m16n8k16 fragment layout": of a, register i holds row g + 8 (i odd), columns 2t + 8 (i > 1) and the
// next; of b, column g, rows 2t + 8i and the next; of c and d, row g + 8 (i > 1), column 2t + (i odd).
void mma_m16n8k16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const f32 (&c)[4]) {
    auto& place = exchange_place();
    u32* mine = place[threadIdx.x % 32];
    for (int i = 0; i < 4; ++i) mine[i] = a[i];
    for (int i = 0; i < 2; ++i) mine[4 + i] = b[i];
    host::yield(host::State::AT_WARP);
    for (int i = 0; i < 4; ++i) {
        int row = threadIdx.x % 32 / 4 + (i >= 2 ? 8 : 0), column = threadIdx.x % 4 * 2 + i % 2;
        f64 sum = 0;  // exact: the order inside of an mma is nobody's to rely on
        for (int k = 0; k < 16; ++k) {
            int t = k % 8 / 2, register_a = (row >= 8) + 2 * (k >= 8), register_b = k >= 8;
            sum += static_cast<f64>(half_of(place[row % 8 * 4 + t][register_a], k % 2)) *
                   half_of(place[column * 4 + t][4 + register_b], k % 2);
        }
        d[i] = c[i] + static_cast<f32>(sum);
    }
}

void copy_async(u64 to, u64 from, int bytes, bool only_l2, int line) {
    if (bytes != 16 && (only_l2 || (bytes != 4 && bytes != 8))) fail("cp.async does not copy so much", line);
    in_allocation(from, bytes, Access::READ, line);
    in_shared(to, bytes, Access::WRITE, line);
    for (int i = 0; i < bytes; ++i) shared_touched[to + i].pending = true;
    me().copies.push_back({static_cast<u32>(to), from, bytes, me().committed, line});
}

void copy_commit() { ++me().committed; }

void copy_wait(int under_way) {
    auto& copies = me().copies;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < me().committed - under_way; ++n) {
        auto& copy = copies[n];
        for (int i = 0; i < copy.bytes; ++i) shared_touched[copy.to + i].pending = false;
        memcpy(in_shared(copy.to, copy.bytes, Access::WRITE, copy.line), reinterpret_cast<void*>(copy.from),
               copy.bytes);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<long>(n));
}

// A table of the module: memory that the driver has not handed out.
bool own_memory(const void* table, u64 bytes) {
    own_begin = reinterpret_cast<u64>(table);
    own_end = own_begin + bytes;
    return true;
}

void begin(int most_threads, bool overlaps) {
    if (static_cast<int>(blockDim.x) > most_threads) fail("more threads than the kernel is compiled for", 0);
    if (threads.size() < blockDim.x) threads.resize(blockDim.x), lanes.resize((blockDim.x + 31) / 32);
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    if (launch_number != host::launches || block_number != block) {  // its first thread
        launch_number = host::launches, block_number = block;
        for (auto& t : threads) t = Thread{};
        memset(shared_touched, 0, sizeof shared_touched);
        memset(shared, 0xff, sizeof shared);
    }
    me().waited = !overlaps;
}

}  // namespace ptx

extern "C" void host_memory(ptx::Find find) { ptx::find_allocation = find; }
