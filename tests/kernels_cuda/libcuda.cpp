// A CUDA driver without a GPU: the functions of libcuda.so that kernels_cuda/driver.py calls, over host memory, for
// modules that are shared libraries of kernels under kernels_cuda/src/host.h.
//
// Memory begins as NaN bytes and ends at a page that may not be touched. A captured launch runs when its graph is
// replayed. `fake_fail(function, code)` makes the next call of that function fail, `fake_lose(code)` every call until
// `fake_lose(0)`; `fake_device(...)` says what there is; `fake_listen(true)` begins to write down what is called.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr int INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, LAUNCH_FAILED = 719;

struct Function {
    void (*launcher)(void**);
    const int* sizes;
    const char* (*launch)(void (*)(void**), void**, const unsigned*, const unsigned*);
};

struct Module {
    void* library;
    std::map<std::string, Function> functions;
};

using Work = std::function<int()>;
using Graph = std::vector<Work>;

struct Allocation {
    void* base;
    size_t mapped, size;
};

std::map<uint64_t, Allocation> allocations;
std::unique_ptr<Graph> capturing;
std::string failing;
int failing_code = 0, lost = 0;
int version = 12060, devices = 1, capability = 86, integrated = 0;
size_t total = size_t(8) << 30, used = 0;
size_t host_total = size_t(8) << 30, host_used = 0;  // pinned
int launches = 0, overlaps = 0;
void* current = nullptr;  // context
std::vector<void*> before;
std::string said;  // names of the functions that were called, one a line
bool listening = false;
bool after_kernel = false;  // whether a kernel was the last thing put on the stream

bool fails(const char* function) {
    if (listening) said += std::string(function) + "\n";
    if (lost) return (failing_code = lost);
    if (failing != function) return false;
    failing.clear();
    return true;
}

int submit(Work work, bool kernel = false) {
    after_kernel = kernel;
    if (capturing) {
        capturing->push_back(std::move(work));
        return 0;
    }
    return work();
}

const size_t PAGE = sysconf(_SC_PAGESIZE);

// The allocation that an address lies in: for modules that check theirs.
bool find_allocation(uint64_t address, uint64_t* begin, uint64_t* end) {
    auto it = allocations.upper_bound(address);
    if (it == allocations.begin()) return false;
    --it;
    *begin = it->first, *end = it->first + it->second.size;
    return address < *end;
}

}  // namespace

#define CALL(name, ...)                \
    extern "C" int name(__VA_ARGS__) { \
        if (fails(#name)) return failing_code;

CALL(cuInit, unsigned)
return devices ? 0 : 100;
}
CALL(cuDriverGetVersion, int* v)
*v = version;
return 0;
}
CALL(cuDeviceGetCount, int* n)
*n = devices;
return 0;
}
CALL(cuDeviceGet, int* device, int i)
*device = i;
return 0;
}
CALL(cuDeviceGetName, char* name, int n, int)
snprintf(name, n, "Emulated GPU");
return 0;
}
CALL(cuDeviceGetAttribute, int* value, int which, int)
std::map<int, int> known = {{75, capability / 10}, {76, capability % 10}, {16, 4}, {18, integrated}, {39, 1536}};
if (!known.count(which)) return INVALID;
*value = known[which];
return 0;
}
CALL(cuDevicePrimaryCtxRetain, void** context, int)
*context = &devices;
return 0;
}
CALL(cuDevicePrimaryCtxRelease_v2, int)
return 0;
}
CALL(cuCtxSetCurrent, void* context)
current = context;
return 0;
}
CALL(cuCtxPushCurrent_v2, void* context)
before.push_back(current);
current = context;
return 0;
}
CALL(cuCtxPopCurrent_v2, void** context)
*context = current;
current = before.back();
before.pop_back();
return 0;
}
CALL(cuStreamCreate, void** stream, unsigned)
*stream = &launches;
return 0;
}
CALL(cuStreamDestroy_v2, void*)
return 0;
}
CALL(cuStreamSynchronize, void*)
return capturing ? 900 : 0;  // not permitted while capturing
}
CALL(cuMemGetInfo_v2, size_t* free, size_t* all)
*free = total < used ? 0 : total - used;
*all = total;
return 0;
}
CALL(cuMemAlloc_v2, uint64_t* address, size_t size)
if (capturing) return 900;
if (used + size > total) return OUT_OF_MEMORY;
size_t pages = (size + 15) / 16 * 16, mapped = (pages + PAGE - 1) / PAGE * PAGE + PAGE;
auto* base = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
if (base == MAP_FAILED) return OUT_OF_MEMORY;
mprotect(base + mapped - PAGE, PAGE, PROT_NONE);
memset(base, 0xff, mapped - PAGE);
*address = reinterpret_cast<uint64_t>(base + mapped - PAGE - pages);
allocations[*address] = {base, mapped, size};
used += size;
return 0;
}
CALL(cuMemFree_v2, uint64_t address)
auto it = allocations.find(address);
if (it == allocations.end()) return INVALID;
used -= it->second.size;
munmap(it->second.base, it->second.mapped);
allocations.erase(it);
return 0;
}
CALL(cuMemHostAlloc, void** address, size_t size, unsigned)
if (host_used + size > host_total) return OUT_OF_MEMORY;
*address = aligned_alloc(256, (size + 255) / 256 * 256);
allocations[reinterpret_cast<uint64_t>(*address)] = {*address, 0, size};  // kernels may read it too
host_used += size;
return 0;
}
CALL(cuMemFreeHost, void* address)
auto it = allocations.find(reinterpret_cast<uint64_t>(address));
if (it == allocations.end()) return INVALID;
host_used -= it->second.size;
allocations.erase(it);
free(address);
return 0;
}
CALL(cuMemcpyHtoDAsync_v2, uint64_t to, const void* from, size_t n, void*)
return submit([=] { return memcpy(reinterpret_cast<void*>(to), from, n), 0; });
}
CALL(cuMemcpyDtoHAsync_v2, void* to, uint64_t from, size_t n, void*)
return submit([=] { return memcpy(to, reinterpret_cast<void*>(from), n), 0; });
}
CALL(cuMemcpyDtoDAsync_v2, uint64_t to, uint64_t from, size_t n, void*)
return submit([=] { return memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), n), 0; });
}
CALL(cuMemsetD8Async, uint64_t to, unsigned char value, size_t n, void*)
return submit([=] { return memset(reinterpret_cast<void*>(to), value, n), 0; });
}
CALL(cuModuleLoadData, void** module, const char* image)
auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
if (memcmp(image, ELFMAG, SELFMAG)) return 200;  // invalid image
size_t size = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
int file = memfd_create("kernels", 0);
if (write(file, image, size) != static_cast<ssize_t>(size)) return INVALID;
void* library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 200;
}
using Find = bool (*)(uint64_t, uint64_t*, uint64_t*);
if (auto tell = reinterpret_cast<void (*)(Find)>(dlsym(library, "host_memory"))) tell(find_allocation);
*module = new Module{library, {}};  // the file stays open: the loader tells libraries apart by their names
return 0;
}
CALL(cuModuleGetFunction, Function** function, Module* module, const char* name)
auto symbol = [&](const std::string& s) { return dlsym(module->library, s.c_str()); };
void* launcher = symbol(std::string("host_") + name);
if (!launcher) return NOT_FOUND;
auto sizes = reinterpret_cast<const int* (*)()>(symbol(std::string("host_") + name + "_sizes"));
Function f{reinterpret_cast<void (*)(void**)>(launcher), sizes(),
           reinterpret_cast<decltype(Function::launch)>(symbol("host_launch"))};
*function = &(module->functions[name] = f);
return 0;
}
// As in cuda.h: an attribute is 8 bytes of id and 64 of value.
struct Attribute {
    int id, pad, value, rest[15];
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
    const Attribute* attributes;
    unsigned n_attributes;
};

CALL(cuLaunchKernelEx, const LaunchConfig* config, Function* f, void** arguments, void**)
unsigned gx = config->grid[0], gy = config->grid[1], gz = config->grid[2];
unsigned bx = config->block[0], by = config->block[1], bz = config->block[2];
if (!gx || !gy || !gz || gy > 65535 || gz > 65535) return INVALID;
// The one attribute that is known lets a kernel overlap the one before: of newer GPUs, and there has to be one.
for (unsigned i = 0; i < config->n_attributes; ++i, ++overlaps)
    if (config->attributes[i].id != 6 || config->attributes[i].value != 1 || capability < 90 || version < 12030 ||
        !after_kernel)
        return INVALID;
++launches;
std::vector<std::vector<char>> values;
for (int i = 0; f->sizes[i]; ++i) {
    auto* p = static_cast<char*>(arguments[i]);
    values.emplace_back(p, p + f->sizes[i]);
}
return submit(
    [=] {
        std::vector<void*> pointers;
        for (auto& v : values) pointers.push_back(const_cast<char*>(v.data()));
        const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
        const char* why = f->launch(f->launcher, pointers.data(), grid, block);
        if (why) fprintf(stderr, "launch failed: %s\n", why);
        return why ? LAUNCH_FAILED : 0;
    },
    true);
}
CALL(cuStreamBeginCapture_v2, void*, int)
if (capturing) return 900;
capturing = std::make_unique<Graph>();
after_kernel = false;
return 0;
}
extern "C" int cuStreamEndCapture(void*, Graph** graph) {
    std::unique_ptr<Graph> captured = std::move(capturing);  // it ends, whatever comes
    after_kernel = false;
    if (fails("cuStreamEndCapture")) return failing_code;
    if (!captured) return 901;
    *graph = captured.release();
    return 0;
}
CALL(cuGraphInstantiateWithFlags, Graph** executable, Graph* graph, unsigned long long)
*executable = new Graph(*graph);
return 0;
}
CALL(cuGraphDestroy, Graph* graph)
delete graph;
return 0;
}
CALL(cuGraphExecDestroy, Graph* graph)
delete graph;
return 0;
}
CALL(cuGraphLaunch, Graph* graph, void*)
after_kernel = false;
for (auto& work : *graph)
    if (int code = work()) return code;
return 0;
}
CALL(cuEventCreate, double** event, unsigned)
*event = new double(0);
return 0;
}
CALL(cuEventRecord, double* event, void*)
timespec t;
clock_gettime(CLOCK_MONOTONIC, &t);
*event = 1e3 * t.tv_sec + 1e-6 * t.tv_nsec;
return 0;
}
CALL(cuEventSynchronize, double*)
return 0;
}
CALL(cuEventElapsedTime, float* milliseconds, double* begin, double* end)
*milliseconds = static_cast<float>(*end - *begin);
return 0;
}
CALL(cuEventDestroy_v2, double* event)
delete event;
return 0;
}
extern "C" int cuGetErrorName(int code, const char** name) {
    static const std::map<int, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                     {100, "CUDA_ERROR_NO_DEVICE"},   {200, "CUDA_ERROR_INVALID_IMAGE"},
                                                     {500, "CUDA_ERROR_NOT_FOUND"},   {719, "CUDA_ERROR_LAUNCH_FAILED"},
                                                     {999, "CUDA_ERROR_UNKNOWN"}};
    auto it = names.find(code);
    *name = it == names.end() ? nullptr : it->second;
    return 0;
}

extern "C" void fake_fail(const char* function, int code) {
    failing = function;
    failing_code = code;
}
extern "C" void fake_device(int driver_version, int n, int compute_capability, size_t bytes) {
    version = driver_version;
    devices = n;
    capability = compute_capability;
    total = bytes;
}
extern "C" void fake_lose(int code) { lost = code; }
extern "C" int fake_launches() { return launches; }
extern "C" int fake_overlaps() { return overlaps; }
extern "C" size_t fake_used() { return used; }
extern "C" size_t fake_host_used() { return host_used; }
extern "C" void fake_host(size_t bytes) { host_total = bytes; }
extern "C" void* fake_current() { return current; }
extern "C" void fake_be_current(void* context) { current = context; }
extern "C" void fake_listen(bool on) {
    listening = on;
    if (on) said.clear();
}
extern "C" const char* fake_said() { return said.c_str(); }
