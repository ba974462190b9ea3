"""One message of the conversation: what the user said, or an answer as it comes."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message as TextualMessage

from tinychat.chats.finding import Finder
from tinychat.conversation import Message
from tinychat.text.reasoning import split_thought
from tinychat.tui.excerpts import marked
from tinychat.tui.markdown import Document
from tinychat.tui.text import Line, Span, clean, fold, line_width, plain, shorten, width_of, wrap
from tinychat.tui.widgets import calls
from tinychat.tui.widgets.lines import Lines

SLICE = 0.02  # seconds of layout work at a time
FOLD_LINES = 14  # longer messages of the user are folded
REASONS = {
    "cancelled": ("stopped", "notice"),
    "length": ("cut: length limit", "notice"),
    "repeating": ("stopped: repeating (p: retry)", "notice"),
    "context_full": ("cut: context full", "bad"),
    "error": ("cut: the engine failed", "bad"),
    None: ("cut: the program ended", "bad"),
}


class Turn(Lines, can_focus=True):
    """A message. Focus it to act on it; the keys are the bindings below."""

    BINDING_GROUP_TITLE = "A message (↑ from the composer, or a click)"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "previous message", id="previous_message"),
        Binding("down,j", "move(1)", "next message", id="next_message"),
        Binding("home", "act('edge', -1)", "first message", id="first_message"),
        Binding("end,G", "act('edge', 1)", "last message", id="last_message"),
        Binding("ctrl+u", "act('half', -1)", "half a page up", id="half_page_up"),
        Binding("ctrl+d", "act('half', 1)", "half a page down", id="half_page_down"),
        Binding("c,y", "act('copy')", "copy", id="copy_message"),
        Binding("b", "act('copy_code', -1)", "copy last code block", id="copy_code"),
        Binding("s", "act('save_code', -1)", "save last code block", id="save_code"),
        Binding("e", "act('edit')", "edit as a new branch", id="edit_message"),
        Binding("r", "act('regenerate')", "answer again as a new branch", id="answer_again_here"),
        Binding("p", "act('penalize')", "answer again with a penalty on repeating", id="answer_with_penalty"),
        Binding("g", "act('continue')", "go on, where it was stopped or cut", id="go_on"),
        Binding("left,h", "switch(-1)", "previous branch", id="previous_branch"),
        Binding("right,l", "switch(1)", "next branch", id="next_branch"),
        Binding("t,enter", "unfold", "open or fold", id="unfold"),
        Binding("n", "act('found', 1)", "what was searched for: the next place", id="next_found"),
        Binding("N", "act('found', -1)", "the place before", id="previous_found"),
        Binding("escape,i", "act('leave')", "back to the composer", id="to_the_composer"),
    ]

    class Action(TextualMessage):
        """Action on a message: edit, regenerate, penalize, continue, copy, copy_code, save_code, switch,
        found, edge, half, leave or move.
        """

        def __init__(self, turn: Turn, action: str, argument: int = 0):
            super().__init__()
            self.turn, self.action, self.argument = turn, action, argument

    def __init__(self, node: int, message: Message, siblings: list[int]):
        """node: its place in the tree; siblings: those of the alternatives, its own among them."""
        super().__init__(classes=message.role)
        self.node, self.message, self.branches = node, message, siblings
        self.open = False
        self.given_up = (0, 0)  # how many of its tokens the model's memory has given up, and how many it has
        self.waiting = ""  # what an answer without text is waiting for
        self.running: dict[str, Any] | None = None  # tokens and rate of an answer in the making
        self.prompt_text = message.prompt_text
        self.document = Document()
        self.thought: str | None = None
        self.thought_tokens: int | None = message.stats.get("reasoning_tokens") or None
        self.thinking = False
        self._fed = ""
        self._width = 0
        self._sealed: list[Line] = []
        self._n_sealed = 0
        self._cache: list[Line] | None = None
        self._again = False
        self._finder: Finder | None = None  # words that are marked
        if message.role == "assistant":
            self._take()
            if message.finish_reason is not None:
                self.document.end()

    def on_mount(self) -> None:
        """Lay out what is there, a slice at a time."""
        self.advance()

    # Content

    @property
    def is_answer(self) -> bool:
        """Whether the model said it."""
        return self.message.role == "assistant"

    def _take(self) -> None:
        """Give the document what is new in the message's content."""
        self.thought, rest, closed = split_thought(self.message.content, self.prompt_text)
        self.thinking = not closed
        if not rest.startswith(self._fed):  # what was shown turned out to be reasoning
            self.reopen()
        self.document.append(rest[len(self._fed) :])
        self._fed = rest

    def mark_given_up(self, gone: int, tokens: int) -> None:
        """Say dimly how many of its tokens the model's memory has given up."""
        if (gone, tokens) != self.given_up:
            self.given_up = gone, tokens
            self.changed()

    def _loss(self) -> str:
        gone, tokens = self.given_up
        return f"{gone:,} of {tokens:,} tokens given up" if gone else ""

    def reopen(self) -> None:
        """More may come: the document is read again, since its end was taken for the end."""
        self.document, self._fed, self._sealed, self._n_sealed = Document(), "", [], 0

    def update(self) -> float:
        """The message has changed; shows it, and returns the seconds that took."""
        began = time.perf_counter()
        self._take()
        if self.message.finish_reason is not None:
            self.document.end()
        self.advance()
        return time.perf_counter() - began

    def advance(self) -> None:
        """Work on the layout; come back when it takes longer than a slice."""
        self._again = False
        done = self.document.advance(SLICE)
        self.changed()
        if not done:
            self._come_back()

    def _come_back(self) -> None:
        if not self._again:
            self._again = True
            self.set_timer(0.01, self.advance)

    def changed(self) -> None:
        """Paint again, and make room if it is higher now."""
        before, self._cache = self._cache, None
        if not self._width:
            self.refresh(layout=True)
            return
        after = self.layout_lines(self._width)
        if len(after) != self.content_size.height:
            self.refresh(layout=True)
        elif before is not None and len(before) == len(after):
            self.repaint(before, after)
        else:
            self.refresh()

    def code(self, index: int) -> str | None:
        """A code block of the answer, as it is written there; -1 is the last one."""
        try:
            return self.document.codes[index]
        except IndexError:
            return None

    # Lines

    def layout_lines(self, width: int) -> list[Line]:
        if width != self._width:
            self._width, self._sealed, self._n_sealed, self._cache = width, [], 0, None
        if self._cache is None:
            if self.message.role == "tool":
                self._cache = calls.result_lines(self.message.content, self.open, width)
            else:
                self._cache = self._answer_lines(width) if self.is_answer else self._user_lines(width)
            if self._finder is not None:
                spans = self._finder.spans
                self._cache = [
                    marked(line, at) if (at := spans(plain(line))) else line for line in self._cache
                ]
        return self._cache

    # What was searched for

    def mark(self, finder: Finder | None) -> None:
        """Have those words seen; None: none."""
        if finder != self._finder:
            self._finder = finder
            self.changed()

    def marks(self, finder: Finder) -> list[int]:
        """The lines that have one of the words; what is folded is opened where no other has."""
        for _ in range(2):
            lines = self.layout_lines(self._width) if self._width else []
            found = [y for y, line in enumerate(lines) if finder.any_in(plain(line))]
            if found or self.open:
                break
            self.action_unfold()
        return found

    @property
    def whole(self) -> bool:
        """Whether all of it is laid out, which takes several slices where it is long."""
        return bool(self._width) and not self._again and self._n_sealed == len(self.document.sealed)

    def _answer_lines(self, width: int) -> list[Line]:
        until = time.perf_counter() + SLICE
        while more := self._n_sealed < len(self.document.sealed):
            self._sealed += self.document.sealed[self._n_sealed].lines(width)
            self._n_sealed += 1
            if time.perf_counter() > until:
                self._come_back()
                break
        out = self._thought_lines(width) + self._sealed
        for leaf in self.document.live if not more else ():
            out += leaf.lines(width)
        for call in self.message.tool_calls:
            out += calls.call_lines(call, self._where(call), self.open, width)
        if self.waiting:
            out.append([(self.waiting, "faint")])
        if footer := self._footer():
            out += [[], *wrap(footer, width)] if out and out[-1] else wrap(footer, width)
        return out

    def _where(self, call: dict[str, Any]) -> str:
        """The server and the tool of a call, while that server is there; else what the model called."""
        toolbox = getattr(self.app, "toolbox", None)
        tool = toolbox.find(call) if toolbox is not None else None
        return call["function"]["name"] if tool is None else f"{tool.server} · {tool.name}"

    def _thought_lines(self, width: int) -> list[Line]:
        if self.thought is None:
            return []
        n = self.thought_tokens
        count = "" if n is None else f" {'for ' if not self.thinking else ''}{n} token{'s' * (n != 1)}"
        verb = "thinking" if self.thinking and self.running is not None else "thought"
        head: Line = [(f"{'▾' if self.open else '▸'} {verb}{count}", "thought @unfold")]
        out = [head]
        if self.open:
            for line in clean(self.thought).split("\n"):
                out += [[("  ", ""), *piece] for piece in wrap([(line, "thought")], width - 2)]
        return [*out, []]

    def _footer(self) -> Line:
        parts: list[tuple[str, str]] = []
        m = self.message
        if self.running is not None:
            rate, tokens = self.running.get("rate"), self.running.get("tokens", 0)
            if tokens:
                parts.append((f"● {tokens} tokens" + (f" · {rate:.1f} tok/s" if rate else ""), "faint"))
        else:
            if m.stats.get("generated_tokens") is not None:
                parts.append((describe(m.stats), "faint"))
            if m.finish_reason in REASONS:
                parts.append(REASONS[m.finish_reason])
        if loss := self._loss():
            parts.append((loss, "faint"))
        parts += self._branches()
        out: Line = []
        for i, part in enumerate(parts):
            if i and not part[1].endswith(("(-1)", "(1)")) and part[0] != self._count():
                out.append((" · ", "faint"))
            elif i:
                out.append((" ", ""))
            out.append(part)
        return out

    def _count(self) -> str:
        return f"{self.branches.index(self.node) + 1}/{len(self.branches)}"

    def _branches(self) -> Line:
        if len(self.branches) < 2:
            return []
        return [("‹", "marker @switch(-1)"), (self._count(), "faint"), ("›", "marker @switch(1)")]

    def _user_lines(self, width: int) -> list[Line]:
        bar = ("▌ ", "userbar")
        pieces: list[Line] = []
        for a in self.message.attachments:
            size = human_size(len(a["text"].encode("utf-8", "replace")))
            label = [
                ("+ ", "marker"),
                (shorten(clean(a["name"]), max(4, width - 16)), "user"),
                (f"  {size}", "faint"),
            ]
            pieces.append(label)
        if pieces and not self.message.content:
            return self._barred(pieces, bar, width)
        text = clean(self.message.content).expandtabs(4)
        limit = 1 << 30 if self.open else FOLD_LINES
        source = text.split("\n")
        for i, line in enumerate(source):
            # A folded message is not laid out beyond what shows.
            line = line if self.open else line[: width * FOLD_LINES]
            pieces += (
                wrap([(line, "user")], width - 2) if len(line) < 5000 else fold([(line, "user")], width - 2)
            )
            if len(pieces) > limit:
                left = len(source) - i
                pieces = pieces[: limit - 4]
                pieces.append(
                    [(f"▸ {left}+ more lines ({human_size(len(self.message.content))})", "faint @unfold")]
                )
                break
        return self._barred(pieces, bar, width)

    def _barred(self, pieces: list[Line], bar: Span, width: int) -> list[Line]:
        out: list[Line] = [[bar, *piece] for piece in pieces]
        if loss := self._loss():
            out.append([bar, (shorten(loss, max(4, width - 12)), "faint")])
        branches = self._branches()
        if branches:
            spaced = [branches[0], (" ", ""), branches[1], (" ", ""), branches[2]]
            if out and line_width(out[-1]) + 9 < width:
                gap = width - line_width(out[-1]) - sum(width_of(t) for t, _ in spaced)
                out[-1] = [*out[-1], (" " * gap, ""), *spaced]
            else:
                out.append([bar, *spaced])
        return out

    # Actions

    def action_unfold(self) -> None:
        """Open or fold reasoning, calls, or a long message."""
        self.open = not self.open
        self.changed()

    def action_act(self, action: str, argument: int = 0) -> None:
        """Leave it to the screen."""
        self.post_message(self.Action(self, action, argument))

    def action_move(self, step: int) -> None:
        """Focus a neighbour."""
        self.post_message(self.Action(self, "move", step))

    def action_switch(self, step: int) -> None:
        """Go to a neighbouring branch."""
        if len(self.branches) > 1:
            self.post_message(self.Action(self, "switch", step))

    def action_copy_code(self, index: int) -> None:
        """A click on a code block's heading."""
        self.post_message(self.Action(self, "copy_code", index))

    def action_save_code(self, index: int) -> None:
        """A click on a code block's heading."""
        self.post_message(self.Action(self, "save_code", index))


def describe(stats: dict[str, Any]) -> str:
    """The timings of an answer."""
    n = stats.get("generated_tokens", 0)
    parts = []
    if stats.get("decode_tps"):
        parts.append(f"{stats['decode_tps']:.1f} tok/s")
    if stats.get("ttft_s"):
        parts.append(f"first token {seconds(stats['ttft_s'])}")
    parts.append(f"{n} token{'s' * (n != 1)}")
    if stats.get("drafted_tokens"):
        parts.append(f"drafts {stats.get('accepted_tokens', 0) / stats['drafted_tokens']:.0%}")
    return " · ".join(parts)


def seconds(s: float) -> str:
    """0.312 → '312 ms', 12.3 → '12.3 s'."""
    return f"{s * 1000:.0f} ms" if s < 1 else f"{s:.1f} s"


def duration(s: float) -> str:
    """98.2 → '1 min 38 s', 7,300 → '2 h 1 min'."""
    s = round(s)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


def human_size(n: float) -> str:
    """12345 → '12.3 kB'."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"
