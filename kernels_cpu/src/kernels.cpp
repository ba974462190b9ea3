#include "kernels.h"

namespace tinychat {

const KernelTable& kernels_for(IsaKind isa) {
    switch (isa) {
#if defined(__x86_64__)
        case IsaKind::kAvx2:
            return kernels_avx2();
        case IsaKind::kAvxVnni:
            return kernels_avxvnni();
        case IsaKind::kAvx512Vnni:
            return kernels_avx512();
        case IsaKind::kAmx:
            return kernels_amx();
        case IsaKind::kAmxEmulated:
            return kernels_amx_emulated();
#elif defined(__aarch64__)
        case IsaKind::kNeon:
            return kernels_neon();
        case IsaKind::kI8mm:
            return kernels_i8mm();
#endif
        default:
            return kernels_scalar();
    }
}

}  // namespace tinychat
