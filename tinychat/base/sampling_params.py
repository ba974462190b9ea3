"""How tokens are chosen, as one sets it: `tinychat.engine.sampling` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinychat.base.settings import Biases, Number, Settings, Texts, Whole, setting


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
    presence_penalty: float = setting(Number(
        0.0, -2, 2, hint="0 is off", help="Makes what the answer has said already less likely; 0 is off.",
        about="Taken from the logit of each token that the answer has already, as in OpenAI's API; 0 is off.",
    ))
    frequency_penalty: float = setting(Number(
        0.0, -2, 2, hint="0 is off", help="The same for each time that it was said; 0 is off.",
        about="Taken from the logit of a token for each time that the answer has it; 0 is off.",
    ))
    logit_bias: tuple[tuple[int, float], ...] = setting(Biases(
        (), metavar="ID=NUMBER", help="Add this to the logit of token ID; may be given several times.",
        about="Added to the logits of single tokens, {id: -100 … 100}; -100 bans a token.",
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
        """Whether logits change before anything is chosen."""
        on = self.repeat_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        return bool(on or self.logit_bias)

    @property
    def may_raise(self) -> bool:
        """Whether a logit may rise, and not only fall."""
        below = self.repeat_penalty < 1.0 or self.presence_penalty < 0 or self.frequency_penalty < 0
        return below or any(b > 0 for _, b in self.logit_bias)

    def without_penalties(self) -> SamplingParams:
        """The same settings for logits that are penalized already."""
        return self.but(repeat_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=())
