// Canonical weights (codes as [out, in] bytes, scales and zeros beside them) into the tiles of layout.h.
#pragma once

#include "layout.h"

namespace tinychat {

// Arrays of a weight. Types and sizes are those that the form's enumerations name; what a form lacks is null.
//   codes    [n, k]: a byte each, or the elements of floats
//   scales   [n, k / group]: fp16, fp32 or a byte each
//   offsets  the same: zeros as bytes, or offsets
//   times, offset_times   what bytes are multiplied by: fp16 [n, k / 256], or fp32 [n]
struct Canonical {
    const void *codes, *scales, *offsets, *times, *offset_times;
};

// Bytes of each array, for n rows; 0 where the form has none.
struct CanonicalBytes {
    size_t codes = 0, scales = 0, offsets = 0, times = 0, offset_times = 0;
    explicit CanonicalBytes(const LinearWeights& w);
};

// w.data is ignored; out takes w.bytes().
void pack_linear(const LinearWeights& w, const Canonical& arrays, uint8_t* out, int threads);

}  // namespace tinychat
