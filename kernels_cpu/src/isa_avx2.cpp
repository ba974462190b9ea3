#include <type_traits>

#include "vec_avx2.h"
// The templates come after the vectors they are made for.
#include "attention_impl.h"
#include "linear_impl.h"

namespace tinychat {
const KernelTable& kernels_avx2() { return make_table<Avx2>("avx2"); }
}  // namespace tinychat
