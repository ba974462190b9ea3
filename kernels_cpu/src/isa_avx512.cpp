#include "table_impl.h"
#include "vec_avx512.h"

namespace tinychat {

const KernelTable& kernels_avx512() { return make_table<Avx512>("avx512vnni"); }

}  // namespace tinychat
