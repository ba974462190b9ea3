"""How tokens are chosen, for this chat."""

from __future__ import annotations

from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Input, Label

from tinychat.base.errors import UsageError
from tinychat.tui.screens.panel import PanelScreen

NAMES = {
    "temperature": "0 is greedy; higher is bolder",
    "top_k": "only the k likeliest; 0 is off",
    "top_p": "the likeliest that make up p; 1 is off",
    "min_p": "at least this share of the likeliest; 0 is off",
    "repeat_penalty": "1 is off",
    "max_tokens": "of an answer; empty: no limit",
    "seed": "same seed, same text; empty: another each time",
}


class SamplingScreen(PanelScreen[dict]):
    """Gives {name: number or None}, or None."""

    def __init__(self, params: dict[str, Any], defaults: dict[str, Any]):
        super().__init__()
        self.params, self.defaults = params, defaults

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label("Sampling", classes="title")
            for name, what in NAMES.items():
                default = self.defaults.get(name)
                hint = f"{default} (the model's) · {what}" if default is not None else what
                value = self.params.get(name)
                with Horizontal(classes="row"):
                    yield Label(name)
                    yield Input("" if value is None else f"{value}", placeholder=hint, id=name, compact=True)
            yield Label(
                "enter: apply · empty: the model's own · esc: close", classes="foot", id="state", markup=False
            )

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Check and hand over."""
        from tinychat.tui.screens.actions import parse_setting

        changes = {}
        for name in NAMES:
            field = self.query_one(f"#{name}", Input)
            try:
                changes[name] = parse_setting(name, field.value.strip())
            except UsageError as e:
                self.query_one("#state", Label).update(f"{e.what} {e.todo}")
                field.focus()
                return
        self.dismiss(changes)
