#include "table_impl.h"
#include "vec_i8mm.h"

namespace tinychat {

const KernelTable& kernels_i8mm() { return make_table<NeonI8mm>("i8mm"); }

}  // namespace tinychat
