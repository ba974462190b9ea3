"""How a server is asked to choose tokens: the sampling parameters, by the names that servers know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Settings, setting

# What others call a parameter; it is sent under both names.
ALSO = {"repeat_penalty": "repetition_penalty", "think_budget": "thinking_token_budget"}


def _unset(name: str) -> Any:
    return setting(replace(SamplingParams.SETTINGS[name], default=None))


@dataclass(frozen=True)
class ServerParams(Settings):
    """How a server shall choose tokens. None, the default of all: as the server does it by itself."""

    WHAT: ClassVar[str] = SamplingParams.WHAT

    temperature: float | None = _unset("temperature")
    top_k: int | None = _unset("top_k")
    top_p: float | None = _unset("top_p")
    min_p: float | None = _unset("min_p")
    repeat_penalty: float | None = _unset("repeat_penalty")
    presence_penalty: float | None = _unset("presence_penalty")
    frequency_penalty: float | None = _unset("frequency_penalty")
    logit_bias: tuple[tuple[int, float], ...] = setting(SamplingParams.SETTINGS["logit_bias"])
    max_tokens: int | None = setting(SamplingParams.SETTINGS["max_tokens"])
    think_budget: int | None = setting(SamplingParams.SETTINGS["think_budget"])
    seed: int | None = setting(SamplingParams.SETTINGS["seed"])
    stop: tuple[str, ...] = setting(SamplingParams.SETTINGS["stop"])

    def fields(self) -> dict[str, Any]:
        """Fields of a request: those that are set, by the names that servers know."""
        out = {k: v for k, v in vars(self).items() if v not in (None, ())}
        out |= {also: out[name] for name, also in ALSO.items() if name in out}
        if "stop" in out:
            out["stop"] = list(out["stop"])
        if "logit_bias" in out:
            out["logit_bias"] = {str(id): bias for id, bias in out["logit_bias"]}
        return out
