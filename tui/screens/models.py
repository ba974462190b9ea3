"""Choice of the model to talk to: what is installed, its size, whether it fits; what can be downloaded."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, Label, OptionList
from textual.widgets.option_list import Option

from tinychat.base.errors import TinychatError
from tinychat.process.address import split_name
from tinychat.tui.host import Host
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import clean, shorten
from tinychat.tui.widgets.turn import human_size

PATIENCE = 5.0  # seconds that an engine which is busy with something else may take to answer


class ModelScreen(PanelScreen[str]):
    """Gives a name, or None. A repository, a folder or a file may be typed."""

    app: Host

    def __init__(self, current: str, trouble: str = ""):
        """trouble: why one has to choose."""
        super().__init__()
        self.current, self.trouble = current, trouble

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Label("Choose a model", classes="title")
            if self.trouble:
                yield Label(clean(self.trouble), classes="trouble", markup=False)
            yield OptionList(markup=False)
            yield Input(
                placeholder="or type a name, a Hugging Face repo, a folder, a .gguf file", compact=True
            )
            yield Label("asking the engine…", classes="foot", id="state", markup=False)

    async def on_mount(self) -> None:
        """Ask beside painting."""
        self.run_worker(self._fill())

    async def _fill(self) -> None:
        found = None
        with suppress(TinychatError, asyncio.TimeoutError):
            if self.app.engine.pid is None:
                await self.app.engine.start()
            found = await asyncio.wait_for(self.app.engine.models(), PATIENCE)
        state = self.query_one("#state", Label)
        if found is None:
            who = "server" if split_name(self.current)[1] else "engine"
            state.update(f"The {who} does not say which models it has; type a name.")
            self.query_one(Input).focus()
            return
        options = []
        name_width = max(16, min(34, self.app.size.width - 46))  # what a narrow panel leaves for it
        for m in found["installed"]:
            mark = "●" if m["name"] == self.current else " "
            name = shorten(clean(m.get("label", m["name"])), name_width)
            line = [f"{mark} {name:<{name_width}} ", *self._facts(m, found.get("memory"))]
            options.append(Option(Content.assemble(*line), m["name"]))
        for name in found["available"]:
            options.append(
                Option(
                    Content.assemble(
                        (f"  {shorten(clean(name), name_width):<{name_width}} download", "$text-muted")
                    ),
                    name,
                )
            )
        chooser = self.query_one(OptionList)
        chooser.add_options(options)
        chooser.highlighted = 0 if options else None
        chooser.focus()
        where = found.get("server") or f"{human_size(found['memory'])} of memory free"
        state.update(f"{where} · enter loads · esc closes")

    def _facts(self, m: dict[str, Any], memory: int | None) -> list[str | tuple[str, str]]:
        """What stands behind a name: a served model's context, or size, form and whether it fits."""
        if memory is None:
            return [f"{m['ctx']:,} tokens" if m.get("ctx") else ""]
        # Weights, and some room for the cache and everything else.
        fits = m["size"] * 1.2 + 3e8 < memory or m["name"] == self.current
        return [
            f"{human_size(m['size']):>8}  {clean(m['quantization']):<10}",
            ("" if fits else " does not fit", "$error"),
        ]

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Chosen."""
        self.dismiss(event.option_id)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Typed."""
        self.dismiss(event.value.strip() or None)
