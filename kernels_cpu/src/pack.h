// Canonical weights (codes as [out, in] bytes, scales and zeros beside them) into the tiles of layout.h.
#pragma once

#include "layout.h"

namespace tinychat {

// w.data is ignored; out takes w.bytes(). codes: 4-bit one byte each, 8-bit int8, dense the elements; [n, k].
// scales and aux are [n, k / group], in the types that w.meta stores: kSym fp16 and none, kZero4 fp16 and uint8,
// kOffset16 fp16 and fp16, kFloat fp32 and fp32.
void pack_linear(const LinearWeights& w, const void* codes, const void* scales, const void* aux, uint8_t* out,
                 int threads);

}  // namespace tinychat
