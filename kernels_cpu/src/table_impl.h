// The kernels of one instruction set. Included last, after the vectors that they are made for.
#pragma once

#include "attention_impl.h"
#include "linear_impl.h"
#include "rows_impl.h"
#include "state_impl.h"

namespace tinychat {
namespace {

template <class S>
const KernelTable& make_table(const char* name) {
    static const KernelTable table = {
        name,          linear<S>,      rms_norm<S>,        quantize<S>,        norm_heads<S>,
        gate_mul<S>,   embed<S>,       rope_table<S>,      rope_kv<S>,         rotate<S>,
        pack_kv<S>,    attention<S>,   attention_merge<S>, attention_score<S>, move_slots<S>,
        open_block<S>, turn_keys<S>,   value_spread<S>,    argmax<S>,          finish_logits<S>,
        short_conv<S>, delta_gates<S>, delta_rule<S>,      mamba_gates<S>,     mamba<S>,
        gated_norm<S>, sigmoid_mul<S>};
    return table;
}

}  // namespace
}  // namespace tinychat
