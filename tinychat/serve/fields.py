"""Fields of a request's JSON, checked: what is wrong is said with the field's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tinychat.base import arguments
from tinychat.base.errors import UsageError
from tinychat.base.sampling_params import SamplingParams
from tinychat.serve.problems import ApiError, wrong

SEEDS = 1 << 63
# What other servers call a sampling parameter.
ALSO = {"max_completion_tokens": "max_tokens", "repetition_penalty": "repeat_penalty"} | {
    "thinking_token_budget": "think_budget"
}
NEUTRAL = {"best_of": 1}


class Fields:
    """A JSON object; null is as good as nothing, and unknown fields are never looked at."""

    def __init__(self, body: Any):
        if not isinstance(body, Mapping):
            raise ApiError(400, "The body is not a JSON object.", code="invalid_json")
        self.body = body

    def __contains__(self, name: str) -> bool:
        return self.body.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        return self.body.get(name)

    def need(self, name: str) -> Any:
        """The value of a field that must be there."""
        if name not in self:
            raise ApiError(400, f"{name} is missing.", param=name, code="missing_required_parameter")
        return self.body[name]

    def check(self, name: str, check: Callable[..., Any], *bounds: Any) -> Any:
        """A value that one of `arguments` finds right; None where there is none."""
        if name not in self:
            return None
        try:
            return check(name, self.body[name], *bounds)
        except UsageError as e:
            raise wrong(name, f"{e.what} {e.todo}") from e

    def flag(self, name: str) -> bool:
        """true or false; false where there is none."""
        return bool(self.check(name, arguments.flag))

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number."""
        return self.check(name, arguments.integer, low, high)

    def text(self, name: str) -> str | None:
        """A text of at least one character."""
        return self.check(name, arguments.text)

    def object(self, name: str) -> Fields:
        """An object; an empty one where there is none."""
        if name in self and not isinstance(self.body[name], Mapping):
            raise wrong(name, f"{name} is not an object.")
        return Fields(self.body.get(name) or {})

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters, by our names. Refuses what would be wrong to pass over: known parameters
        that the engine does not have.
        """
        for name, neutral in NEUTRAL.items():
            if name in self and self.body[name] != neutral:
                raise ApiError(
                    400, f"{name} is not supported. Leave it out.", param=name, code="unsupported_parameter"
                )
        out = {}
        for name in (*SamplingParams.SETTINGS, *ALSO):
            setting = SamplingParams.SETTINGS[ALSO.get(name, name)]
            value = self.body.get(name)
            if name == "seed" and type(value) is int:
                value %= SEEDS
            if value is None:
                continue
            try:
                out[ALSO.get(name, name)] = setting.check(name, value)
            except UsageError as e:
                raise wrong(name, f"{e.what} {e.todo}") from e
        return out
