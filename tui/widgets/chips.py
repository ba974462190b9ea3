"""What will be sent along with a message, in lines above the composer."""

from __future__ import annotations

from tinychat.tui.attachments import Attachment
from tinychat.tui.text import Line, clean, shorten
from tinychat.tui.widgets.lines import Lines
from tinychat.tui.widgets.turn import human_size


class Chips(Lines):
    """List of what will be sent along: names, sizes, tokens."""

    def __init__(self) -> None:
        super().__init__(id="chips")
        self.attachments: list[Attachment] = []
        self.context: int | None = None  # tokens that the model can read
        self.free: int | None = None  # tokens of them that a message may have now
        self.evicts: bool | None = None  # whether earlier words make room for more

    @property
    def allow_select(self) -> bool:
        return False

    def tell(self, context: int | None, free: int | None, evicts: bool | None) -> None:
        """The room that there is."""
        if (context, free, evicts) != (self.context, self.free, self.evicts):
            self.context, self.free, self.evicts = context, free, evicts
            self.refresh(layout=True)

    def show(self, attachments: list[Attachment]) -> None:
        """Show these."""
        self.attachments = attachments
        self.display = bool(attachments)
        self.refresh(layout=True)

    def layout_lines(self, width: int) -> list[Line]:
        out: list[Line] = []
        total = sum(a.tokens or 0 for a in self.attachments)
        large = self.context is not None and total > self.context
        much = self.free is not None and total > self.free
        of = "" if self.free is None else f" of {self.free:,}"
        for a in self.attachments:
            name = shorten(clean(a.name), max(8, width - 36))
            if a.problem:
                out.append([("✗ ", "bad"), (name, "strong"), (f"  {clean(a.problem)}", "bad")])
            else:
                tokens = "" if a.tokens is None else f", {a.tokens:,}{of} tokens"
                style = "bad" if large or (much and not self.evicts) else "notice" if much else "faint"
                out.append([("+ ", "marker"), (name, "strong"), (f"  {human_size(a.size)}{tokens}", style)])
        if large:
            out.append([(f"more than the context holds: {self.context} tokens", "bad")])
        elif much:
            then = "what matters least is given up" if self.evicts else "no answer has room"
            out.append([(f"more than is free: {then}", "notice" if self.evicts else "bad")])
        return out
