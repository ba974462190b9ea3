#include "table_impl.h"
#include "vec_scalar.h"

namespace tinychat {

const KernelTable& kernels_scalar() { return make_table<Scalar>("scalar"); }

}  // namespace tinychat
