"""A model that says what a test tells it to: its tokens are chosen by the script, all else is as always."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tinychat.engine.generation import Generation


def says(monkeypatch: pytest.MonkeyPatch, model, *answers: str) -> None:
    """Have the model give these answers, one after another; the last for ever. Each ends its turn."""
    if not model.tokenizer.eos_ids:  # of a model that never ends an answer by itself
        monkeypatch.setattr(
            model.tokenizer, "eos_ids", frozenset(model.tokenizer.encode("<|im_end|>", special=True))
        )
    scripts = [
        [*model.tokenizer.encode(a, special=True), *sorted(model.tokenizer.eos_ids)[:1]] for a in answers
    ]
    begun: list[Generation] = []

    def choose(self: Generation, row, drafted, q=None, before: Sequence[int] = (), guide=None) -> int:
        if self not in begun:
            begun.append(self)
        script = scripts[min(begun.index(self), len(scripts) - 1)]
        return script[len(self.context) - len(self.prompt) + len(before)]

    monkeypatch.setattr(Generation, "_choose", choose)
