#include <type_traits>

#include "vec_scalar.h"
// The templates come after the vectors they are made for.
#include "attention_impl.h"
#include "linear_impl.h"

namespace tinychat {
const KernelTable& kernels_scalar() { return make_table<Scalar>("scalar"); }
}  // namespace tinychat
