#include "table_impl.h"
#include "vec_neon.h"

namespace tinychat {

const KernelTable& kernels_neon() { return make_table<Neon>("neon"); }

}  // namespace tinychat
