// A compiler in place of NVRTC, whose file's name says what it is: libnvrtc.so.12.6 is one of CUDA 12.6; with "-mute"
// in the name it compiles nothing, with "-needy" only if builtins have been loaded before it.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

std::string own_name() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(own_name), &info);
    return strrchr(info.dli_fname, '/') + 1;
}

bool has(const char* word) { return own_name().find(word) != std::string::npos; }

int version(int which) {
    int n[2] = {};
    sscanf(own_name().c_str(), "libnvrtc.so.%d.%d", &n[0], &n[1]);
    return n[which];
}

bool works() {
    if (has("-mute")) return false;
    return !has("-needy") || dlopen("libnvrtc-builtins.so.99", RTLD_NOW | RTLD_NOLOAD);
}

std::string text;

}  // namespace

extern "C" {
int nvrtcVersion(int* major, int* minor) { return *major = version(0), *minor = version(1), 0; }
const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR"; }
int nvrtcGetNumSupportedArchs(int* n) { return *n = 2, 0; }
int nvrtcGetSupportedArchs(int* to) { return to[0] = 80, to[1] = 90, 0; }
int nvrtcCreateProgram(void** program, const char*, const char*, int, const char**, const char**) {
    return *program = &text, 0;
}
int nvrtcDestroyProgram(void**) { return 0; }
int nvrtcCompileProgram(void*, int, const char**) {
    char ptx[200];
    snprintf(ptx, sizeof ptx, "//\n// Cuda compilation tools, release %d.%d, V%d.%d.77\n", version(0), version(1),
             version(0), version(1));
    text = works() ? ptx : "nvrtc: error: failed to open libnvrtc-builtins";
    return works() ? 0 : 7;
}
int nvrtcGetProgramLogSize(void*, size_t* n) { return *n = text.size() + 1, 0; }
int nvrtcGetProgramLog(void*, char* to) { return strcpy(to, text.c_str()), 0; }
int nvrtcGetPTXSize(void*, size_t* n) { return *n = text.size() + 1, 0; }
int nvrtcGetPTX(void*, char* to) { return strcpy(to, text.c_str()), 0; }
}
