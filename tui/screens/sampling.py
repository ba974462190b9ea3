"""How tokens are chosen, for this chat."""

from __future__ import annotations

from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Input, Label

from tinychat.base.errors import UsageError
from tinychat.base.sampling_params import SamplingParams
from tinychat.tui.screens.panel import PanelScreen


class SamplingScreen(PanelScreen[dict]):
    """Gives {name: number or None}, or None."""

    def __init__(self, params: dict[str, Any], defaults: dict[str, Any]):
        super().__init__()
        self.params, self.defaults = params, defaults

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label("Sampling", classes="title")
            for name, setting in SamplingParams.numbers().items():
                default, what = self.defaults.get(name), setting.hint
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
        changes = {}
        for name in SamplingParams.numbers():
            field = self.query_one(f"#{name}", Input)
            try:
                changes[name] = SamplingParams.parse(name, field.value.strip())
            except UsageError as e:
                self.query_one("#state", Label).update(f"{e.what} {e.todo}")
                field.focus()
                return
        self.dismiss(changes)
