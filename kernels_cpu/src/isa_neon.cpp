#include <type_traits>

#include "vec_neon.h"
// The templates come after the vectors they are made for.
#include "attention_impl.h"
#include "linear_impl.h"

namespace tinychat {
const KernelTable& kernels_neon() { return make_table<Neon>("neon"); }
}  // namespace tinychat
