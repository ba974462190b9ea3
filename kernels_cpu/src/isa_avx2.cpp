#include "table_impl.h"
#include "vec_avx2.h"

namespace tinychat {

const KernelTable& kernels_avx2() { return make_table<Avx2>("avx2"); }

}  // namespace tinychat
