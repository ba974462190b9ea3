"""How a model is loaded, as one sets it: `tinychat.loading` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tinychat.base.errors import UsageError
from tinychat.base.settings import Choice, Flag, Gigabytes, Settings, Text, Whole, setting

ENGINE, CONTEXT, ANSWER = "engine", "context", "answer"  # groups: a draft model inherits those of ENGINE


@dataclass(frozen=True)
class LoadOptions(Settings):
    """How a model is loaded and what its conversations begin with."""

    WHAT: ClassVar[str] = "load option"

    # fmt: off
    ctx: int | None = setting(Whole(
        None, 1, unit="tokens", group=CONTEXT, help="Tokens the context holds.",
        about="The context; default: the smaller of the trained context, 8192 and what fits in memory.",
    ))
    kv_budget: int | None = setting(Whole(
        None, 1, unit="tokens", group=CONTEXT, help="Tokens kept in the cache; others are given up.",
        about="What a conversation keeps in the cache; beyond it `kv_policy` gives some up.",
    ))
    kv_policy: str | None = setting(Choice(
        None, ("h2o", "window", "none"), ("random",), group=CONTEXT,
        help="What is given up: what is attended to least, the oldest, or nothing.",
        about="What is given up: the tokens that the model attends to least, the oldest, or nothing (the "
        'answer ends). Default: "h2o" where there is a budget, and for conversations when their context is '
        "full.",
    ))
    kv_disk_budget: int = setting(Whole(
        4_000_000_000, unit="bytes", group=CONTEXT,
        help="What the caches of stored chats may take on disk, such as 500MB; default 4GB, 0: nothing.",
        about="What the KV caches of stored chats may take on disk together; 0: none.",
    ))
    kv_bits: int = setting(Choice(
        16, (16, 8, 4), group=ENGINE, help="Bits of the KV cache.", about="How keys and values are cached.",
    ))
    device: str = setting(Choice(
        "auto", ("auto", "cpu", "cuda", "reference"), group=ENGINE, help="What computes.",
        about='"auto" is the CPU, until the CUDA engine has been run on a GPU; "reference" is torch in fp32: '
        "slow, the truth.",
    ))
    gpu_memory: float | Literal["auto"] = setting(Gigabytes(
        "auto", group=ENGINE, metavar="auto|GB", help="What a model may take of the GPU; the rest is in RAM.",
        about="What a model may take of the GPU's memory, cache and all, in GB; weights that do not fit "
        'stay in RAM. "auto": what is free.',
    ))
    threads: int | None = setting(Whole(
        None, 1, 1024, group=ENGINE, help="CPU threads.",
        about="CPU threads; default: the cores that this process may use.",
    ))
    act_bits: int | None = setting(Choice(
        None, (16, 8), group=ENGINE, help="Activation bits of the CPU kernels.",
        about="The precision of activations in the CPU kernels.",
    ))
    head_bits: int = setting(Choice(
        8, (8, 16), group=ENGINE, help="Output head bits.",
        about="How an embedding and output head stored in 16 bits run.",
    ))
    quantize: str = setting(Choice(
        "auto", ("auto", "rtn", "none"), group=ENGINE, help="How weights stored in 16 bits run.",
        about="How weights stored in 16 or 32 bits run (`weight_policy.WeightPolicy`).",
    ))
    offline: bool = setting(Flag(False, group=ENGINE, help="Never use the network."))
    draft: str | None = setting(Text(
        None, group=ANSWER, metavar="MODEL|mtp|ngram|auto|none", help="Who drafts; the text stays the same.",
        about="Who drafts tokens for verification: \"mtp\" (the model's own layer that predicts further), "
        '"ngram", a smaller model of the same family, or an EAGLE-3 head; the text is the same. Default: '
        '"mtp" where the model has it, else "ngram", where the backend\'s rows are independent of each '
        "other.",
    ))
    draft_tokens: int | None = setting(Whole(
        None, 0, 15, group=ANSWER, help="Draft this many, always.",
        about="How many are drafted, always; default: as many as pay.",
    ))
    think: bool | None = setting(Flag(
        None, group=ANSWER, help="Whether the model reasons before it answers.",
        about="Whether the model reasons before it answers, where its chat template has a switch for that.",
    ))
    effort: str | None = setting(Choice(
        None, ("low", "medium", "high"), ("none", "minimal", "xhigh", "max"), group=ANSWER,
        help="How much the model reasons before it answers.",
        about="How much the model reasons before it answers, where its chat template has levels for that.",
    ))
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_budget is not None and self.kv_policy == "none":
            raise UsageError("A KV budget needs a policy that keeps it.", "Leave out --kv-policy none.")

    def inherited(self) -> LoadOptions:
        """Options that a draft model takes over from the model that it drafts for."""
        return LoadOptions(**{k: getattr(self, k) for k in self.group(ENGINE)}, draft="none")
