"""EAGLE-3 heads: folders in the layout of SGLang and vLLM, which draft for one model each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.base.files import MappedFile
from tinychat.base.identity import Tell, content_hash
from tinychat.formats.hf import FLOAT_FORMS
from tinychat.formats.tensors import PULL_AGAIN, Tensor, Tensors, read_json
from tinychat.models import UNTAPPED
from tinychat.network import eagle
from tinychat.network.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig
from tinychat.network.head_config import HeadConfig
from tinychat.network.hf_rope import rope_config
from tinychat.network.weight_form import Form
from tinychat.network.weights import DenseLinear
from tinychat.text.tokenizer import Tokenizer

HEADS = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
OTHERS = {  # heads of other kinds
    "LlamaForCausalLMEagle": "EAGLE-1 or EAGLE-2",
    "EagleLlamaForCausalLM": "EAGLE-1 or EAGLE-2",
    "EagleLlamaModel": "EAGLE-1 or EAGLE-2",
    "EagleSpeculator": "EAGLE-1 or EAGLE-2",
    "EAGLEModel": "EAGLE-1 or EAGLE-2",
    "Qwen2ForCausalLMEagle": "EAGLE-1 or EAGLE-2",
    "MedusaModel": "Medusa",
}
SUPPORTED = (
    "Supported are EAGLE-3 heads of one Llama layer (LlamaForCausalLMEagle3); see docs/speculation.md."
)
# Settings that change what a head computes, and the values that do not.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "bias": (None, False),
    "draft_vocab_pruning": (None, False),
    "fc_norm": (None, False),
    "hidden_act": (None, "silu"),
    "logit_scale": (None, 1, 1.0),
    "mlp_bias": (None, False),
    "norm_before_fc": (None, False),
    "norm_output": (None, False),
    "num_hidden_layers": (None, 1),
    "parallel_drafting": (None, False),
    "qkv_bias": (None, False),
    "use_aux_hidden_state": (None, True),
    "use_input_layernorm_in_first_layer": (None, True),
    "use_last_layernorm": (None, True),
    "use_mtp_layernorm": (None, False),
}
_LAYER = "layers.0."  # what others call the layer


def is_head(settings: dict[str, Any]) -> bool:
    """Whether config.json is that of an EAGLE-3 head, or of a head of another kind."""
    named = _architecture(settings)
    return named in HEADS or named in OTHERS or _speculator(settings) or "draft_vocab_size" in settings


def head_in(folder: Path) -> EagleHead | None:
    """The head that lies in a folder; None: something else does. Raises as `EagleHead` does."""
    if not folder.is_dir():
        return None
    settings = read_json(folder / "config.json")
    return EagleHead(folder, settings) if settings is not None and is_head(settings) else None


def refuse(name: str) -> UnsupportedModelError:
    """Error for who takes a head for a model."""
    return UnsupportedModelError(
        f"{name} is a head that drafts for another model, and no model.",
        "Load the model that it was trained for, with --draft and the head's name.",
    )


def check_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a head, those of a nested layer beside the others.

    Raises UnsupportedModelError for a head of another kind and for an option, by name.
    """
    named = _architecture(given)
    if named in OTHERS:
        raise UnsupportedModelError(
            f"A head of the kind {OTHERS[named]} ({named}) is not supported.", SUPPORTED
        )
    if _speculator(given) and given["speculators_model_type"] != "eagle3":
        kind = given["speculators_model_type"]
        raise UnsupportedModelError(f"A head of the kind {kind!r} is not supported.", SUPPORTED)
    layer, own = given.get("transformer_layer_config"), given.get("eagle_config")
    cfg = {**(layer if isinstance(layer, dict) else {}), **given}
    cfg |= {name: value for name, value in (own if isinstance(own, dict) else {}).items() if name in OPTIONS}
    for option, harmless in OPTIONS.items():
        if cfg.get(option) not in harmless:
            raise UnsupportedModelError(
                f"The option {option} = {cfg[option]!r} of an EAGLE-3 head is not supported.", SUPPORTED
            )
    window = cfg.get("sliding_window") if cfg.get("use_sliding_window", True) else None
    if window is not None or "sliding_attention" in (cfg.get("layer_types") or ()):
        raise UnsupportedModelError("An EAGLE-3 head with a sliding window is not supported.", SUPPORTED)
    if cfg.get("quantization_config") is not None:
        raise UnsupportedModelError("An EAGLE-3 head with quantized weights is not supported.", SUPPORTED)
    return cfg


class EagleHead:
    """Implements `Checkpoint`, but for the tokenizer, which is the model's: a head once `onto` has said of
    which model. `ids`: the model's ids of the tokens that it knows, int64; None: they are all.

    Opening reads the settings, the weights' headers and the map of tokens. Raises CheckpointError for a
    damaged folder, UnsupportedModelError for what is not supported.
    """

    config: ModelConfig  # of the model, with the head behind its layers

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path, self.json = Path(folder), settings
        self._cfg = check_settings(settings)
        self._tensors = Tensors(self.path, _by_module)
        self.ids = self._ids()

    def onto(self, model: ModelConfig) -> ModelConfig:
        """The config of a model with this head behind its layers, which becomes the head's too.

        Raises UnsupportedModelError where the head is not for such a model, CheckpointError where its tensors
        are missing or of other shapes.
        """
        try:
            head, layer = self._head(model), self._layer()
        except (LookupError, TypeError, ValueError, ArithmeticError) as e:
            raise CheckpointError(
                f"config.json of {self.path.name} does not describe an EAGLE-3 head: {type(e).__name__} {e}.",
                PULL_AGAIN,
            ) from e
        self._check_model(model, head, layer.attention)
        onto = replace(model, further=layer, head=head)
        self._check_tensors(onto)
        self.config = replace(onto, tie_embeddings=False)  # its own tables are two
        return onto

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self._tensors or name.startswith("fc.")

    def linear(self, name: str) -> DenseLinear:
        """A linear, the embedding, or a part of `fc`."""
        module, _, part = name.partition(".") if name.startswith("fc.") else (name, "", "")
        weight = self._tensors[f"{module}.weight"]
        array = self._tensors.array(f"{module}.weight")
        if part:
            n = self.config.hidden_size
            array = np.ascontiguousarray(array[:, int(part) * n : (int(part) + 1) * n])
        return DenseLinear(array, None, bf16=weight.dtype == "BF16")

    def vector(self, name: str) -> np.ndarray:
        values = self._tensors.float32(f"{name}.weight")
        if not np.isfinite(values).all():
            raise CheckpointError(f"The weights of {name} hold NaN or infinity.", PULL_AGAIN)
        return values

    def stored(self, name: str) -> tuple[Form | str, int]:
        dtype = self._tensors[f"{name.partition('.')[0] if name.startswith('fc.') else name}.weight"].dtype
        n, k = eagle.linears(self.config)[name]
        form = FLOAT_FORMS[dtype]
        return form, form.n_bytes(n, k)

    def tokenizer(self) -> Tokenizer:
        """There is none. Raises UnsupportedModelError."""
        raise refuse(self.path.name)

    @property
    def n_weights(self) -> int:
        """Numbers in its linears."""
        return sum(n * k for n, k in eagle.linears(self.config).values())

    def fingerprint(self, tell: Tell | None = None) -> str:
        """A hash of config.json and of the files that hold the weights."""
        facts = [self.json, [content_hash(f, tell) for f in self._tensors.files]]
        return f"head:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"

    def weight_files(self) -> list[MappedFile]:
        """The files that hold the weights."""
        return self._tensors.files

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file with weights was written since it was opened."""
        for f in self._tensors.files:
            f.check_unchanged()

    def _head(self, model: ModelConfig) -> HeadConfig:
        cfg = self._cfg
        hidden, vocab = cfg["hidden_size"], cfg["vocab_size"]
        n = cfg.get("draft_vocab_size") or vocab
        if (cfg.get("target_hidden_size") or hidden) != model.hidden_size:
            raise self._other_model("hidden size", cfg.get("target_hidden_size") or hidden, model.hidden_size)
        if (cfg.get("target_vocab_size") or vocab) != model.vocab_size:
            raise self._other_model("vocabulary", cfg.get("target_vocab_size") or vocab, model.vocab_size)
        return HeadConfig(
            hidden,
            n,
            self._taps(model.n_layers),
            float(cfg.get("rms_norm_eps", 1e-6)),
            bool(cfg.get("norm_before_residual", False)),
            self.has("embed_tokens"),
            self.has("lm_head"),
        )

    def _taps(self, n: int) -> tuple[int, ...]:
        """Layers of a model of n whose input the head sees.

        Both servers take 2, n / 2 and n - 3 where config.json names none. SGLang's list, inside of
        `eagle_config`, names layers by what they give; vLLM's, beside the other settings, by what they get.
        """
        own, given = self._cfg.get("eagle_config"), self._cfg.get("eagle_aux_hidden_state_layer_ids")
        nested = own.get("eagle_aux_hidden_state_layer_ids") if isinstance(own, dict) else None
        taps = list(given) if given else [i + 1 for i in nested] if nested else [2, n // 2, n - 3]
        if len(taps) != 3 or not all(type(i) is int and 0 <= i <= n for i in taps):
            raise UnsupportedModelError(
                f"{self.path.name} sees the layers {taps}, and the model has {n}.",
                "Use a head that was trained for this very model.",
            )
        return tuple(taps)

    def _layer(self) -> LayerConfig:
        cfg = self._cfg
        heads, hidden = cfg["num_attention_heads"], cfg["hidden_size"]
        dim = cfg.get("head_dim") or hidden // heads
        rope = rope_config(cfg, dim)
        if rope.kind in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"An EAGLE-3 head with the rope scaling {rope.kind!r} is not supported.", SUPPORTED
            )
        kv = cfg.get("num_key_value_heads") or heads
        return LayerConfig(
            AttentionConfig(heads, kv, dim, rope, skipped=1), DenseConfig(cfg["intermediate_size"])
        )

    def _check_model(self, model: ModelConfig, head: HeadConfig, layer: AttentionConfig) -> None:
        if model.family in UNTAPPED:
            raise UnsupportedModelError(
                f"Models of the family {model.family} are not drafted for by EAGLE-3 heads.",
                "Use --draft ngram, or a draft model.",
            )
        whole = {(a.n_kv_heads, a.head_dim) for a in model.attentions if not a.window and not a.latent}
        if (layer.n_kv_heads, layer.head_dim) not in whole:
            raise UnsupportedModelError(
                f"{self.path.name} has {layer.n_kv_heads} KV heads of {layer.head_dim}, and no layer of the"
                " model that sees everything has such; its keys would need a cache of their own.",
                "Use a head whose KV heads are the model's.",
            )
        if not head.own_embedding and head.hidden_size != model.hidden_size:
            raise CheckpointError(
                f"{self.path.name} has no embed_tokens, and the model's has another size.", PULL_AGAIN
            )
        if not head.own_head and (head.vocab_size, head.hidden_size) != (model.vocab_size, model.hidden_size):
            raise CheckpointError(f"{self.path.name} has no tensor lm_head.weight.", PULL_AGAIN)
        if self.ids is None and head.vocab_size != model.vocab_size:
            raise CheckpointError(f"{self.path.name} has no tensor d2t.", PULL_AGAIN)
        if self.ids is None:
            return
        if len(self.ids) != head.vocab_size:
            raise CheckpointError(
                f"d2t of {self.path.name} names {len(self.ids)} tokens; config.json says {head.vocab_size}.",
                PULL_AGAIN,
            )
        if (
            self.ids.min() < 0
            or self.ids.max() >= model.vocab_size
            or len(np.unique(self.ids)) < len(self.ids)
        ):
            raise CheckpointError(
                f"d2t of {self.path.name} names tokens that the model does not have, or one twice.",
                PULL_AGAIN,
            )

    def _check_tensors(self, cfg: ModelConfig) -> None:
        assert cfg.head is not None
        h = cfg.head.hidden_size
        shapes: dict[str, tuple[int, ...]] = {**eagle.linears(cfg), **dict.fromkeys(eagle.NORMS, (h,))}
        parts = eagle.fuse_names(cfg.head.taps)
        shapes["fc"] = (h, cfg.hidden_size * len(parts))
        for name, shape in shapes.items():
            if name not in parts:
                self._tensors.check(f"{name}.weight", shape)
        known = {f"{name}.weight" for name in shapes} | {"d2t", "t2d"}
        for name in self._tensors:
            if name not in known and not name.endswith("rotary_emb.inv_freq"):
                raise UnsupportedModelError(
                    f"The head has a tensor {name}, unknown in an EAGLE-3 head.", SUPPORTED
                )

    def _ids(self) -> np.ndarray | None:
        """The model's ids of the tokens that the head knows, int64 [draft vocabulary]; None: they are all."""
        if "d2t" not in self._tensors:
            return None
        t = self._tensors["d2t"]
        if t.dtype not in ("I64", "I32") or len(t.shape) != 1 or not t.shape[0]:
            raise CheckpointError(f"d2t of {self.path.name} is no list of whole numbers.", PULL_AGAIN)
        away = self._tensors.array("d2t").astype(np.int64)
        if np.abs(away).max() >= 1 << 32:
            raise CheckpointError(f"d2t of {self.path.name} is damaged.", PULL_AGAIN)
        return away + np.arange(len(away))

    def _other_model(self, what: str, here: Any, there: int) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path.name} is for a model with the {what} {here!r}, and this one has {there}.",
            "Use a head that was trained for this very model.",
        )


def _architecture(settings: dict[str, Any]) -> str:
    named = settings.get("architectures") or ""
    return str(named[0] if isinstance(named, list) else named)


def _speculator(settings: dict[str, Any]) -> bool:
    return isinstance(settings.get("speculators_model_type"), str)


def _by_module(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by SGLang's names: vLLM has the layer as `layers.0`, either may begin with `model.`."""
    out = {}
    for name, tensor in found.items():
        name = name.removeprefix("model.")
        out[eagle.LAYER + name.removeprefix(_LAYER) if name.startswith(_LAYER) else name] = tensor
    return out
