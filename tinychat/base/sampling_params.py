"""How tokens are chosen, as one sets it: `tinychat.engine.sampling` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinychat.base.settings import Number, Settings, Texts, Whole, setting


@dataclass(frozen=True)
class SamplingParams(Settings):
    """How tokens are chosen. Temperature 0 is argmax (the lowest id on a tie)."""

    WHAT: ClassVar[str] = "sampling parameter"

    # fmt: off
    temperature: float = setting(Number(
        0.7, 0, 100, flag="--temp", help="Temperature; 0 is greedy.", hint="0 is greedy; higher is bolder",
    ))
    top_k: int = setting(Whole(40, 0, 1 << 31, hint="only the k likeliest; 0 is off"))
    top_p: float = setting(Number(0.95, 0, 1, hint="the likeliest that make up p; 1 is off"))
    min_p: float = setting(Number(0.05, 0, 1, hint="at least this share of the likeliest; 0 is off"))
    repeat_penalty: float = setting(Number(
        1.0, 0.01, 100, hint="1 is off", help="Makes what was said before less likely; 1 is off.",
        about="As in CTRL (Keskar et al. 2019), over the whole context; 1 is off.",
    ))
    max_tokens: int | None = setting(Whole(
        None, help="Tokens of the answer, at most.", hint="of an answer; empty: no limit",
    ))
    think_budget: int | None = setting(Whole(
        None, unit="tokens", help="Tokens of a thought, at most.",
        hint="of a thought, which is closed then; empty: no limit",
        about="Tokens of reasoning, at most: then the thought is closed as the chat template closes it, and "
        "the answer begins.",
    ))
    seed: int | None = setting(Whole(
        None, help="Same seed, same text.", hint="same seed, same text; empty: another each time",
    ))
    stop: tuple[str, ...] = setting(Texts(
        (), help="End the answer at this text; may be given several times.",
        about="Texts at which the answer ends; they are no part of it.",
    ))
    # fmt: on

    @property
    def greedy(self) -> bool:
        """Whether the next token is a plain argmax of the logits."""
        return self.temperature == 0 and not self.penalizes

    @property
    def penalizes(self) -> bool:
        """Whether the logits of tokens that occurred before change."""
        return self.repeat_penalty != 1.0

    @property
    def may_raise(self) -> bool:
        """Whether a penalty may raise a logit instead of lowering it."""
        return self.repeat_penalty < 1.0

    def without_penalties(self) -> SamplingParams:
        """The same settings for logits that are penalized already."""
        return self.but(repeat_penalty=1.0)
