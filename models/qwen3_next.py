"""Qwen3-Next: what became Qwen3.5 with experts (Qwen Team 2025). Its files hold what a delta rule reads in
two tensors, head of keys after head of keys: its query, key, values and their output gates in the one, the
gates of its values' change and decay in the other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tinychat.models import llama, qwen3_5, qwen3_5_moe
from tinychat.models.qwen3_5 import NORM_OFFSET, biases, norms
from tinychat.network import further, hf_config
from tinychat.network.config import DenseConfig, LayerConfig, ModelConfig
from tinychat.network.family import FromHF, Metadata, Part, Settings, Stack, WeightSource
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import DeltaConfig

__all__ = [
    "GGUF",
    "HF",
    "NORM_OFFSET",
    "biases",
    "forward",
    "linears",
    "load",
    "norms",
    "predict",
    "settings",
]


def _from_hf(c: Settings, stack: Stack) -> tuple[LayerConfig, ...]:
    some = hf_config.experts(c, c["moe_intermediate_size"], 512, bool(c["norm_topk_prob"]))
    some = replace(some, shared=c["shared_expert_intermediate_size"])
    dense, step = c["mlp_only_layers"] or (), c["decoder_sparse_step"]
    return tuple(
        layer if i in dense or (i + 1) % step else replace(layer, mlp=some)
        for i, layer in enumerate(qwen3_5.layers_from_hf(c, stack))
    )


def _from_gguf(m: Metadata, stack: Stack) -> tuple[LayerConfig, ...]:
    def in_file_order(layer: LayerConfig) -> LayerConfig:
        d = layer.mixer
        return replace(layer, mixer=replace(d, tiled=False)) if isinstance(d, DeltaConfig) else layer

    return tuple(map(in_file_order, qwen3_5_moe.layers_from_gguf(m, stack)))


def _rows(layer: LayerConfig, widths: tuple[int, ...], wanted: tuple[int, ...]) -> np.ndarray:
    """Rows of a tensor that has parts of these widths for each head of keys: int64 [out], one wanted part of
    all heads after the other.
    """
    assert isinstance(layer.mixer, DeltaConfig)
    each = np.arange(layer.mixer.n_keys * sum(widths)).reshape(layer.mixer.n_keys, -1)
    parts = np.split(each, np.cumsum(widths)[:-1], axis=1)
    return np.concatenate([parts[i].reshape(-1) for i in wanted])


def _projected(*wanted: int) -> Part:
    def rows(layer: LayerConfig) -> np.ndarray:
        d = layer.mixer
        assert isinstance(d, DeltaConfig)
        values = d.values // d.n_keys
        return _rows(layer, (d.key_dim, d.key_dim, values, values), wanted)

    return Part("linear_attn.in_proj_qkvz", rows)


def _gates(wanted: int) -> Part:
    def rows(layer: LayerConfig) -> np.ndarray:
        d = layer.mixer
        assert isinstance(d, DeltaConfig)
        each = d.n_values // d.n_keys
        return _rows(layer, (each, each), (wanted,))

    return Part("linear_attn.in_proj_ba", rows)


GATES = {"linear_attn.in_proj_b": _gates(0), "linear_attn.in_proj_a": _gates(1)}
HF = {
    "Qwen3NextForCausalLM": FromHF(
        qwen3_5.DEFAULTS
        | {
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        hf_config.EXPERTS,
        partial_rope=True,
        layers=_from_hf,
        mixers=("linear_attention",),
        vectors=qwen3_5.KEPT,
        tensors=(qwen3_5.OWN_NAMES,),
        parts=GATES
        | {"linear_attn.in_proj_qkv": _projected(0, 1, 2), "linear_attn.in_proj_z": _projected(3)},
    )
}
_MOE = qwen3_5_moe.GGUF["qwen35moe"]
GGUF = {
    "qwen3next": replace(
        _MOE, names={**_MOE.names, "linear_attn.in_proj_ba": "ssm_ba"}, layers=_from_gguf, parts=GATES
    )
}


def load_block(w: WeightSource, p: str, layer: LayerConfig) -> qwen3_5.Block | qwen3_5_moe.Block:
    """The block whose modules' names begin with `p`."""
    own = qwen3_5 if isinstance(layer.mlp, DenseConfig) else qwen3_5_moe
    return own.load_block(w, p, layer)


def load(w: WeightSource, cfg: ModelConfig) -> llama.Weights:
    """Ask the backend's loader `w` for every weight."""
    return llama.load(w, cfg, load_block)


def block(ops: Ops, cfg: ModelConfig, w: qwen3_5.Block | qwen3_5_moe.Block, x: Handle, layer: int) -> Handle:
    """One decoder block. x: [T, hidden]."""
    if isinstance(w, qwen3_5.Block):
        return qwen3_5.block(ops, cfg, w, x, layer)
    return qwen3_5_moe.block(ops, cfg, w, x, layer)


def forward(ops: Ops, cfg: ModelConfig, w: llama.Weights) -> Handle:
    """Token ids (the step's input) to logits."""
    return llama.forward(ops, cfg, w, block, qwen3_5.keep)


def predict(ops: Ops, cfg: ModelConfig, w: llama.Weights, few: bool = False) -> Handle:
    """Token ids, one of each sequence, to logits, by the layer that predicts further."""
    return further.predict(ops, cfg, w, block, few)


def linears(cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Names and [out, in] of a block's linears."""
    own = qwen3_5 if isinstance(cfg.layers[layer].mlp, DenseConfig) else qwen3_5_moe
    return own.linears(cfg, layer)


def settings(cfg: ModelConfig) -> Settings:
    """Entries of config.json for such a model."""
    mlps = [layer.mlp for layer in cfg.layers]
    some = next((m for m in mlps if not isinstance(m, DenseConfig)), None)
    mine: Settings = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "mlp_only_layers": [i for i, m in enumerate(mlps) if isinstance(m, DenseConfig)],
    }
    if some is not None:
        mine |= {"num_experts": some.n, "num_experts_per_tok": some.taken, "moe_intermediate_size": some.size}
        mine |= {"shared_expert_intermediate_size": some.shared, "norm_topk_prob": some.normalize}
    return qwen3_5.settings(cfg) | mine
