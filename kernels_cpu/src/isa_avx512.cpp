#include <type_traits>

#include "vec_avx512.h"
// The templates come after the vectors they are made for.
#include "attention_impl.h"
#include "linear_impl.h"

namespace tinychat {
const KernelTable& kernels_avx512() { return make_table<Avx512>("avx512vnni"); }
}  // namespace tinychat
