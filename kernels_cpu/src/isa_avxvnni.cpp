#include "cpu_info.h"
#include "table_impl.h"
#include "vec_avxvnni.h"

namespace tinychat {

const KernelTable& kernels_avxvnni() {
    return has_avx_vnni() ? make_table<AvxVnni<false>>("avxvnni") : make_table<AvxVnni<true>>("avxvnni");
}

}  // namespace tinychat
