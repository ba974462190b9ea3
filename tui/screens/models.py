"""Choice of the model to talk to: what is here, what can be downloaded, its speed here, whether it fits."""

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
from tinychat.tui.screens import fitting
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import clean

PATIENCE = 5.0  # seconds that an engine which is busy with something else may take to answer
LOW = 24  # lines
AROUND = 10  # cells of a panel beside its list: border, padding, scrollbar


class Choice(PanelScreen[str]):
    """A choice among models; gives a name, or None."""

    app: Host

    async def found(self) -> dict[str, Any] | None:
        """What the engine tells of models; None if it does not."""
        with suppress(TinychatError, asyncio.TimeoutError):
            if self.app.engine.pid is None:
                await self.app.engine.start()
            return await asyncio.wait_for(self.app.engine.models(), PATIENCE)
        return None

    def on_resize(self) -> None:
        """A low terminal has no room for empty lines."""
        self.set_class(self.app.size.height < LOW, "low")

    @property
    def room(self) -> int:
        """Cells that a line of the list has."""
        return min(80, self.app.size.width * 96 // 100) - AROUND


class ModelScreen(Choice):
    """Gives a name, or None. A repository, a folder or a file may be typed."""

    def __init__(self, current: str, trouble: str = ""):
        """trouble: why one has to choose."""
        super().__init__()
        self.current, self.trouble = current, trouble
        self._models: dict[str, dict[str, Any]] = {}  # by name

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="troubled" if self.trouble else ""):
            yield Label("Choose a model", classes="title")
            if self.trouble:
                yield Label(clean(self.trouble), classes="trouble", markup=False)
            yield OptionList(markup=False)
            yield Label("", id="facts", markup=False)
            yield Input(
                placeholder="or type a name, a Hugging Face repo, a folder, a .gguf file", compact=True
            )
            yield Label("asking the engine…", classes="foot", id="state", markup=False)

    async def on_mount(self) -> None:
        """Ask beside painting."""
        self.query_one("#facts", Label).display = False
        self.run_worker(self._fill())

    async def _fill(self) -> None:
        found = await self.found()
        state = self.query_one("#state", Label)
        if found is None:
            who = "server" if split_name(self.current)[1] else "engine"
            state.update(f"The {who} does not say which models it has; type a name.")
            self.query_one(Input).focus()
            return
        served = "server" in found
        options = []
        for m in found["installed"]:
            options.append(Option(self._served(m) if served else self._row(m, True), m["name"]))
        if found["available"]:
            options.append(Option(Content.assemble(("to download:", "dim")), disabled=True))
        for m in found["available"]:
            options.append(Option(self._row(m, False), m["name"]))
        chooser = self.query_one(OptionList)
        chooser.add_options(options)
        chooser.action_first()
        chooser.focus()
        self.query_one("#facts", Label).display = not served
        offline = " · offline: nothing can be downloaded" if found.get("offline") else ""
        where = found["server"] if served else fitting.machine(found) + offline
        between = " · " if served else "\n"
        state.update(f"{where}{between}enter loads · esc closes")

    def _row(self, m: dict[str, Any], here: bool) -> Content:
        self._models[m["name"]] = m
        return fitting.row(m, self.room, self.current, here)

    def _served(self, m: dict[str, Any]) -> Content:
        mark = "●" if m["name"] == self.current else " "
        width = max(16, min(34, self.room - 16))
        context = f"{m['ctx']:,} tokens" if m.get("ctx") else ""
        return Content(f"{mark} {fitting.padded(m.get('label', m['name']), width)} {context}")

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """All that is known of it."""
        if event.option_id in self._models:
            m = self._models[event.option_id]
            self.query_one("#facts", Label).update(f"{fitting.facts(m)}\n{fitting.verdict(m)}")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Chosen."""
        self.dismiss(event.option_id)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Typed."""
        self.dismiss(event.value.strip() or None)
