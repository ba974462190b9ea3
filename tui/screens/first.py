"""The first minute: no model is here yet, so three that fit this machine are offered, and the demo."""

from __future__ import annotations

from typing import Any

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Label, OptionList
from textual.widgets.option_list import Option

from tinychat.tui.screens import fitting
from tinychat.tui.screens.models import Choice
from tinychat.tui.text import clean

OTHER = " other"  # no model's name: another one is wanted
OFFLINE = "tinychat is offline (TINYCHAT_OFFLINE or HF_HUB_OFFLINE is set): nothing can be downloaded."


class FirstScreen(Choice):
    """Gives a name, OTHER, or None."""

    def __init__(self, trouble: str = "", tried: str = ""):
        """trouble: why the model `tried` did not come."""
        super().__init__()
        self.trouble, self.tried = trouble, tried

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="first"):
            yield Label("Which model to begin with?", classes="title")
            yield Label(clean(self.trouble), classes="trouble", id="trouble", markup=False)
            yield OptionList(markup=False)
            yield Label("looking at this machine…", classes="foot", id="state", markup=False)

    def on_mount(self) -> None:
        """Look beside painting."""
        self.query_one("#trouble").display = bool(self.trouble)
        self.run_worker(self._fill())

    async def _fill(self) -> None:
        found = await self.found()
        state, chooser = self.query_one("#state", Label), self.query_one(OptionList)
        options = [] if found is None else self._options(found)
        more = (
            "A file, a folder, a repository…"
            if found and found["offline"]
            else "All models, or one of yours…"
        )
        chooser.add_options([*options, Option(more, OTHER)])
        chooser.highlighted = 0
        chooser.focus()
        if found is None:
            state.update("The engine does not say what this machine can run.")
            return
        if found["offline"]:
            self.query_one("#trouble", Label).update(OFFLINE)
            self.query_one("#trouble").display = True
        downloads = not found["offline"] and found["offered"]
        troubled = self.query_one("#trouble").display
        self.query_one("#panel").set_class(troubled, "troubled")
        enter = "enter downloads it" if downloads and not found["cached"] else "enter takes it"
        estimate = downloads and found["bandwidth"] and not troubled
        said = [fitting.machine(found), "tok/s: an estimate by the memory's speed" if estimate else ""]
        state.update("\n".join(filter(None, [*said, f"{enter} · esc: none yet"])))

    def _options(self, found: dict[str, Any]) -> list[Option]:
        cached = [
            Option(Content.assemble((clean(name), "bold"), "  is here, in Hugging Face's cache"), name)
            for name in found["cached"]
        ]
        known = {m["name"]: m for m in found["available"]}
        names = [] if found["offline"] else list(found["offered"])
        if self.tried in known and not found["offline"]:  # what was begun goes on
            names = [self.tried, *(name for name in names if name != self.tried)]
        return cached + [Option(self._lines(known[name]), name) for name in names if name in known]

    def _lines(self, m: dict[str, Any]) -> Content:
        """A name with what it is good for, and its facts below."""
        held = f" ({fitting.begun(m)})" if fitting.begun(m) else ""
        return Content.assemble(
            (clean(m["name"]), "bold"),
            f"  {clean(m['good_for'])}{held}\n",
            (f"  {fitting.facts(m)}", "dim"),
        )

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Chosen."""
        self.dismiss(event.option_id)
