"""Models of known shapes with random weights in any form: what `tinychat bench --synthetic` measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.base.errors import UsageError
from tinychat.models import FAMILIES
from tinychat.network import further
from tinychat.network.config import (
    AttentionConfig,
    DenseConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)
from tinychat.network.family import outside
from tinychat.network.latent import LatentConfig
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig
from tinychat.network.weight_form import NUMBERS, ROW, SUPER, TABLES, Coded, Form, Numbers
from tinychat.network.weights import DenseLinear, Linear, QuantizedLinear

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer


def _shape(hidden, ffn, layers, heads, kv_heads, vocab, tied, bias=False, context=8192) -> ModelConfig:
    d = hidden // heads
    layer = LayerConfig(AttentionConfig(heads, kv_heads, d, RopeConfig(dim=d)), DenseConfig(ffn))
    return ModelConfig(
        family="llama",
        hidden_size=hidden,
        layers=(layer,) * layers,
        vocab_size=vocab,
        context_length=context,
        tie_embeddings=tied,
        attention_bias=bias,
    )


# The real dimensions; the weights are random, so nothing is downloaded.
SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, 151936, tied=True, bias=True),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "qwen2.5-7b": _shape(3584, 18944, 28, 28, 4, 152064, tied=False, bias=True),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000, tied=False),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256, tied=False),
}
SHAPES["qwen3-30b-a3b"] = replace(
    _shape(2048, 6144, 48, 32, 4, 151936, tied=False),
    family="qwen3_moe",
    layers=(LayerConfig(AttentionConfig(32, 4, 128, RopeConfig(dim=128)), ExpertsConfig(128, 8, 768)),) * 48,
)


def _lfm2(hidden: int, ffn: int, attending: tuple[int, ...], layers: int) -> ModelConfig:
    mlp, attention = DenseConfig(ffn), AttentionConfig(hidden // 64, 8, 64, RopeConfig(1e6, 64))
    mixers = [attention if i in attending else ConvConfig(hidden, 3) for i in range(layers)]
    shape = _shape(hidden, ffn, layers, hidden // 64, 8, 65536, tied=True)
    return replace(shape, family="lfm2", layers=tuple(LayerConfig(mixer, mlp) for mixer in mixers))


def _qwen35(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, values: int) -> ModelConfig:
    attention, delta = (
        AttentionConfig(heads, kv_heads, 256, RopeConfig(1e7, 64)),
        DeltaConfig(16, values, 128, 128, 4),
    )
    mixers = [delta if (i + 1) % 4 else attention for i in range(layers)]
    shape = _shape(hidden, ffn, layers, heads, kv_heads, 248320, tied=True)
    made = tuple(LayerConfig(mixer, DenseConfig(ffn)) for mixer in mixers)
    return replace(shape, family="qwen3_5", layers=made)


SHAPES["lfm2-1.2b"] = _lfm2(2048, 8192, (2, 5, 8, 10, 12, 14), 16)
SHAPES["qwen3.5-0.8b"] = _qwen35(1024, 3584, 24, 8, 2, 16)
SHAPES["qwen3.5-4b"] = _qwen35(2560, 9216, 32, 16, 4, 32)
_QWEN35_MOE = _qwen35(2048, 512, 40, 16, 2, 32)
SHAPES["qwen3.5-35b-a3b"] = replace(
    _QWEN35_MOE,
    family="qwen3_5_moe",
    tie_embeddings=False,
    layers=tuple(replace(x, mlp=ExpertsConfig(256, 8, 512, shared=512)) for x in _QWEN35_MOE.layers),
)


def _granite4(hidden: int, ffn: int, attending: tuple[int, ...], layers: int) -> ModelConfig:
    heads = hidden // 128
    attention = AttentionConfig(heads, 4, 128, scale=1 / 128)
    state = MambaConfig(hidden // 32, 64, 128, 1, 4)
    shape = replace(_shape(hidden, ffn, layers, heads, 4, 100352, tied=True), family="granitemoehybrid")
    mixers = [attention if i in attending else state for i in range(layers)]
    made = tuple(LayerConfig(mixer, DenseConfig(ffn)) for mixer in mixers)
    return replace(shape, layers=made, embed_scale=12.0, residual_scale=0.22, logit_scale=1 / 6)


SHAPES["granite-4-h-1b"] = _granite4(1536, 4096, (5, 15, 25, 35), 40)


def _gemma4(hidden: int, ffn: int, layers: int, kv_heads: int, shared: int) -> ModelConfig:
    near = AttentionConfig(8, kv_heads, 256, RopeConfig(dim=256), 512, scale=1.0)
    far = replace(near, head_dim=512, rope=RopeConfig(1e6, 512, "proportional", turned=64), window=0)
    own = layers - shared
    mixers = [near if (i + 1) % 6 else far for i in range(layers)]
    last = {mixer: i for i, mixer in enumerate(mixers[:own])}
    mixers[own:] = [replace(mixer, source=last[mixer]) for mixer in mixers[own:]]
    made = tuple(LayerConfig(mixer, DenseConfig(ffn)) for mixer in mixers)
    shape = replace(_shape(hidden, ffn, layers, 8, kv_heads, 262144, tied=True), family="gemma4", layers=made)
    # rows of the layers' embedding are looked up: a shorter one takes the same time
    return replace(shape, layer_inputs=256, layer_vocab=16384, logit_soft_cap=30.0, embed_scale=hidden**0.5)


SHAPES["gemma-4-e4b"] = _gemma4(2560, 10240, 42, 2, 18)

_NEAR = AttentionConfig(64, 8, 64, RopeConfig(theta=150000.0), window=128)
_GPT_OSS = ExpertsConfig(32, 4, 2880, limit=7.0, alpha=1.702)
SHAPES["gpt-oss-20b"] = replace(
    _shape(2880, 2880, 24, 45, 9, 201088, tied=False, bias=True),
    family="gpt_oss",
    layers=(LayerConfig(_NEAR, _GPT_OSS), LayerConfig(replace(_NEAR, window=0), _GPT_OSS)) * 12,
)

_LATENT = LatentConfig(512, 128, 64, 128)
_DEEPSEEK = AttentionConfig(16, 1, _LATENT.row, RopeConfig(dim=64), scale=192**-0.5, latent=_LATENT)
_DEEPSEEK_MOE = ExpertsConfig(64, 6, 1408, normalize=False, shared=2 * 1408)
SHAPES["deepseek-v2-lite"] = replace(
    _shape(2048, 10944, 27, 16, 16, 102400, tied=False),
    family="deepseek_v2",
    layers=(LayerConfig(_DEEPSEEK, DenseConfig(10944)), *[LayerConfig(_DEEPSEEK, _DEEPSEEK_MOE)] * 26),
)

DEFAULT = "int4"  # 4-bit with zero points as AWQ has it, in the largest group up to 128 that divides a width

# Forms of files that people have: llama.cpp's types, and those of checkpoint folders.
GGUF_FORMS: dict[str, Form] = {
    "q2_k": Form(2, "unsigned", 16, "int4", "int4"),
    "q3_k": Form(3, "signed", 16, "int6"),
    "q4_k": Form(4, "unsigned", 32, "int6", "int6"),
    "q5_k": Form(5, "unsigned", 32, "int6", "int6"),
    "q6_k": Form(6, "signed", 16, "int8"),
    "q4_0": Form(4, "signed", 32, "fp16"),
    "q4_1": Form(4, "unsigned", 32, "fp16", "fp16"),
    "q5_0": Form(5, "signed", 32, "fp16"),
    "q5_1": Form(5, "unsigned", 32, "fp16", "fp16"),
    "q8_0": Form(8, "signed", 32, "fp16"),
    "iq4_nl": Form(4, "iq4_nl", 32, "fp16"),
    "iq4_xs": Form(4, "iq4_nl", 32, "int6"),
    "mxfp4": Form(4, "e2m1", 32, "e8m0"),
}
FORMS: dict[str, Form] = {
    **GGUF_FORMS,
    "gptq2": Form(2, "unsigned", 128, "fp16", "zero"),
    "gptq3": Form(3, "unsigned", 128, "fp16", "zero"),
    "gptq8": Form(8, "unsigned", 128, "fp16", "zero"),
    "mlx4": Form(4, "unsigned", 64, "fp16", "fp16"),
    "nvfp4": Form(4, "e2m1", 16, "e4m3"),
    "nf4": Form(4, "nf4", 64, "fp32"),
    "fp8": Form(8, "e4m3", 128, "fp32", rows=128),
    "fp8-channel": Form(8, "e4m3", ROW, "fp32"),
    "int8-channel": Form(8, "signed", ROW, "fp32"),
}
HEAD = Form(8, "signed", 32, "fp16")  # what 16 bits become at load


def head_form(form: str, width: int) -> Form:
    """The form of the head, and of the embedding where they are one, in files whose body has `form`.

    llama.cpp leaves them at Q6_K (at Q8_0 where 256 does not divide the width, and in Q8_0 and MXFP4 files);
    checkpoint folders in 16 bits, which run as int8.
    """
    gguf = form in GGUF_FORMS and form not in ("q8_0", "mxfp4")
    return GGUF_FORMS["q6_k"] if gguf and width % SUPER == 0 else HEAD


class SyntheticCheckpoint:
    """A shape with random weights.

    shape    a name of `SHAPES`, or the dimensions of another one
    form     a name of `FORMS`, or "int4": AWQ-like, 4-bit, groups of 128 (64 or 32 where 128 does not
             divide), with an int8 head
    further  whether a layer that predicts further comes behind the others

    Every layer holds the same random numbers; they are separate bytes once packed, as in a real model.
    Raises UsageError for a shape or form that is not known, and where one does not divide the other.
    """

    def __init__(self, shape: str | ModelConfig, form: str = DEFAULT, further: bool = False):
        config = SHAPES.get(shape) if isinstance(shape, str) else shape
        if config is None:
            raise UsageError(f"The shape {shape!r} is not known.", f"Known: {', '.join(SHAPES)}.")
        if form != DEFAULT and form not in FORMS:
            raise UsageError(f"The form {form!r} is not known.", f"Known: {DEFAULT}, {', '.join(FORMS)}.")
        shape = shape if isinstance(shape, str) else "model"
        self.config, self.form = config, form
        if further:
            attends = [i for i in self.config.layers if isinstance(i.mixer, AttentionConfig)]
            self.config = replace(self.config, further=attends[-1])
        self.path = Path(f"synthetic-{shape}" if form == DEFAULT else f"synthetic-{shape}-{form}")
        self._made: dict[tuple, Linear] = {}
        self._linears, self._others = _modules(self.config)
        for name, (_, k) in self._linears.items():
            needed = 1 if form == DEFAULT else _divisor(FORMS[form])
            if not name.endswith("mlp.gate") and k % needed:
                raise UsageError(
                    f"{form} takes whole groups of {needed} inputs, and {shape} has linears of {k}.",
                    "Try --synthetic llama-3.2-1b.",
                )

    def has(self, name: str) -> bool:
        """Whether the module exists."""
        return name != "lm_head" or not self.config.tie_embeddings

    def linear(self, name: str) -> Linear:
        """Random codes; weights of about 1/sqrt(in), so that activations stay of order one."""
        c = self.config
        table, body = name in ("lm_head", "model.embed_tokens"), "embed_tokens" not in name
        body = body and not table
        if table:
            n, k = c.vocab_size, c.hidden_size
        elif name.endswith("mlp.gate") or name in self._others:
            shape = self._linears.get(name) or self._others[name]
            size = 1 if name.endswith("mlp.gate") else shape[-1] ** -0.5
            return DenseLinear(np.random.default_rng(0).normal(0, size, shape).astype(np.float32))
        else:
            n, k = self._linears[name]
        biased = FAMILIES[c.family].biases(c) if c.family == "gpt_oss" else ("q_proj", "k_proj", "v_proj")
        has_bias = body and c.attention_bias and name.endswith(biased)
        key = (n, k, body, has_bias)
        if key not in self._made:
            bias = np.zeros(n, np.float32) if has_bias else None
            form = self._body(k) if body else head_form(self.form, k)
            self._made[key] = random_linear(form, n, k, bias)
        return self._made[key]

    def stored(self, name: str) -> tuple[Form | str, int]:
        """The form of the random numbers, and their bytes."""
        w = self.linear(name)
        return w.form, w.form.n_bytes(*w.shape)

    def vector(self, name: str) -> np.ndarray:
        """Ones; of what decays, less a tenth: a state that forgets in some tokens."""
        shape = self._others.get(name, (self.config.hidden_size,))
        return np.full(shape, -0.1 if name.endswith("A_log") else 1, np.float32)

    def fingerprint(self, tell: Any = None) -> str:
        """The names of shape and form say it all."""
        return f"{self.path.name}-2"

    def weight_files(self) -> list:
        """There are none."""
        return []

    def check_unchanged(self) -> None:
        """Random numbers of a fixed seed do not change."""

    def tokenizer(self) -> Tokenizer:
        """One that knows no word: what is said has no text, and no end."""
        import tokenizers

        from tinychat.text.tokenizer import Tokenizer

        words = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
        words.decoder = tokenizers.decoders.ByteLevel()
        return Tokenizer(words, eos_ids=frozenset())

    def _body(self, k: int) -> Form:
        """Form of a linear of k inputs."""
        if self.form != DEFAULT:
            return FORMS[self.form]
        return Form(4, "unsigned", next(g for g in (128, 64, 32) if k % g == 0), "fp16", "zero")


def _modules(cfg: ModelConfig) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Linears of all layers and those beside them, and what else there is: shapes by name."""
    family = FAMILIES[cfg.family]
    linears: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for i in range(cfg.n_layers):
        linears |= family.linears(cfg, i)
        others |= family.norms(cfg, i)
    for name, own in outside(family, cfg).items():
        if len(own) == 2:
            linears[name] = (own[0], own[1])
        else:
            others[name] = own
    linears |= further.linears(family, cfg)
    others |= further.norms(family, cfg)
    return linears, others


def _divisor(form: Form) -> int:
    """Inputs that the form takes at once."""
    coded = any(NUMBERS.get(kind, (0, None))[1] == "fp16" for kind in (form.scale, form.offset))
    return SUPER if coded else form.group or 1


def random_linear(form: Form, n: int, k: int, bias: np.ndarray | None = None) -> QuantizedLinear:
    """n outputs of k inputs in codes of the form, with a mean near 0 and a deviation near 1/sqrt(k)."""
    rng = np.random.default_rng(n * 31 + k)
    codes: np.ndarray = np.frombuffer(rng.bytes(n * k), np.uint8).reshape(n, k)
    if form.decoding == "signed" and form.bits == 8:
        codes = codes.view(np.int8)
        values = np.arange(-128, 128, dtype=np.float32)
    elif form.decoding in TABLES:
        values = TABLES[form.decoding]
        codes = codes & np.uint8(len(values) - 1)
        codes[np.isnan(values[codes])] = 0
    else:
        codes = codes & np.uint8((1 << form.bits) - 1)
        values = np.arange(1 << form.bits, dtype=np.float32)
    step = 1 / (np.nanstd(values) * k**0.5)
    shape = (-(-n // (form.rows or n)), k // (form.group or k))
    zeros, offsets = None, None
    if form.offset == "zero":
        middle = 1 << (form.bits - 1)
        around = max(1, middle // 4)
        zeros = rng.integers(middle - around, middle + around, shape, dtype=np.uint8)
    elif form.offset != "none":
        offsets = _numbers(form.offset, shape, k, -step * values.mean(), rng)
    scales = _numbers(form.scale, shape, k, step, rng)
    table = form.decoding if form.decoding in TABLES else None
    return QuantizedLinear(
        codes, scales, zeros, offsets, bias, bits=form.bits, table=table, rows=form.rows or n
    )


def _numbers(kind: str, shape: tuple[int, int], k: int, size: float, rng: np.random.Generator) -> Numbers:
    """Scales or offsets of about `size`, stored so."""
    if kind in ("fp16", "fp32"):
        return (rng.uniform(0.8, 1.2, shape) * size).astype(np.float16 if kind == "fp16" else np.float32)
    if kind == "e8m0":
        nearest = 127 + round(np.log2(size))
        return Coded(kind, rng.integers(nearest - 1, nearest + 2, shape, dtype=np.uint8))
    if kind == "e4m3":
        ones = rng.integers(0x34, 0x3D, shape, dtype=np.uint8)  # 0.75…1.5
        return Coded(kind, ones, np.full((1, 1), size, np.float32))
    top = 1 << (NUMBERS[kind][0] - 1)  # a code that is the same signed and unsigned is below
    times = rng.uniform(0.8, 1.2, (shape[0], k // SUPER)) * size / (0.75 * top)
    return Coded(kind, rng.integers(top // 2, top, shape, dtype=np.uint8), times.astype(np.float16))
