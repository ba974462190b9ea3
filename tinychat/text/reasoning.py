"""Telling what a model thinks from what it answers: in a stream, and in a text as a whole.

Families mark it differently: tags (`<think>…</think>`, `[THINK]…[/THINK]`), phrases (Granite 3.2), channels
(gpt-oss). The text that a model wrote, markers included, is what conversations keep (`written`); reasoning
and answer are read from it. Markers count at the beginning only: an answer may speak of `<think>`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Set
from typing import Literal, NamedTuple


class Tags(NamedTuple):
    """Reasoning stands between `start` and `end`; some families also put the answer into tags."""

    start: str
    end: str
    answer_start: str = ""
    answer_end: str = ""
    phrase: bool = False  # plain words, which count only where the family is known to use them


TAGS = (
    Tags(
        "<think>", "</think>", "<response>", "</response>"
    ),  # DeepSeek, Qwen, GLM and most others; Granite 3.3
    Tags("[THINK]", "[/THINK]"),  # Mistral
    Tags("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command
    Tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    Tags("<mm:think>", "</mm:think>"),  # MiniMax-M3
    Tags("<longcat_think>", "</longcat_think>"),
    Tags("<thinking>", "</thinking>"),  # Apriel 1.5
    Tags("<thought>", "</thought>"),  # EXAONE Deep
    Tags("<reasoning>", "</reasoning>"),
    Tags("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"),
    Tags("◁think▷", "◁/think▷"),  # Kimi-VL
    Tags("<|channel>thought", "<channel|>"),  # Gemma 4
    Tags("<unused94>thought", "<unused95>"),  # MedGemma
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Tags("<|think|>", "<|end|>", "<|begin|>assistant<|content|>"),  # Solar
    Tags("Here is my thought process:", "Here is my response:", phrase=True),  # Granite 3.2
    Tags("Here's my thought process:", "Here's my response:", phrase=True),
    Tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", "", "[END FINAL RESPONSE]", phrase=True),
)
# gpt-oss: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
LONGEST_HEADER = 200
_TAG_MARKS = {part for t in TAGS for part in (t.start, t.end) if part != END} | {"<|channel>", "<unused94>"}
_CHANNELS = {
    CHANNEL: {START, CHANNEL, MESSAGE, END, "<|constrain|>"},
    "<|think|>": {"<|think|>", END, "<|begin|>", "<|content|>"},
}
TURN_MARKS = {START, MESSAGE, END, "<|begin|>", "<|content|>"}  # of those, what also marks turns


# What markers of families that are not listed look like: <|think_start|>, [REASONING], <|begin_of_thinking|>.
_LOOKS = re.compile(
    r"[<\[◁][^\s<>\[\]◁▷]{0,24}(?:think|thought|reason)[^\s<>\[\]◁▷]{0,24}[>\]▷]", re.IGNORECASE
)
_OPPOSITES = [("start", "end"), ("START", "END"), ("begin", "end"), ("BEGIN", "END"), ("open", "close")]


def _ends_of(start: str) -> list[str]:
    """How the end of such a marker may be spelled."""
    ends = [f"{start[0]}/{start[1:]}"]
    if start.startswith("<|"):
        ends.append(f"<|/{start[2:]}")
    return ends + [start.replace(a, b) for a, b in _OPPOSITES if a in start]


def tags_in(vocabulary: Set[str]) -> tuple[Tags, ...]:
    """The tags that a model may use: those that are known, and pairs of tokens that look like some."""
    known = {t.start for t in TAGS}
    found = (
        Tags(start, end)
        for start in sorted(vocabulary - known)
        if _LOOKS.fullmatch(start)
        for end in _ends_of(start)
        if end in vocabulary
    )
    return (*TAGS, *found)


def opens(text: str, tags: tuple[Tags, ...]) -> bool:
    """Whether a token's text begins a thought, or the naming of a channel."""
    return text == CHANNEL or any(t.start == text for t in tags if not t.phrase)


def markers_in(vocabulary: Set[str]) -> Set[str]:
    """The tokens of a vocabulary that mark reasoning: they are text even where they are control tokens, for
    without them reasoning would run into the answer.
    """
    known = _TAG_MARKS.union(*(marks for sign, marks in _CHANNELS.items() if sign in vocabulary))
    return {text for text in vocabulary if text in known or _LOOKS.fullmatch(text)}


class Piece(NamedTuple):
    """A piece of what was written: (part of) a marker, of the reasoning or of the answer. `written` is what
    the model wrote of it.
    """

    kind: str  # "marker", "reasoning", "answer"
    text: str
    written: str


class Splitter:
    """Feed it what a model writes as it comes; it gives back what is certain. A piece of the answer has the
    text that was written.
    """

    def __init__(self, prompt: str = "", source: str | None = None, tags: tuple[Tags, ...] = TAGS):
        """prompt: the end of what stands before, where a template may have opened a thought. source: the
        template, which says whether a family uses phrases; None: believe those that are closed.
        """
        self._tags = [
            t for t in tags if not t.phrase or source is None or (t.start in source and t.end in source)
        ]
        before = prompt[-200:].rstrip()
        opened = next((t for t in self._tags if before.endswith(t.start)), None)
        self.thinking = opened is not None or before.endswith(f"{CHANNEL}analysis{MESSAGE}")
        self._closed = any(before.endswith(t.end) for t in self._tags)  # a thought, by the template
        self._now = opened
        self._held = ""
        self._gap = 0  # characters of that before the answer, where somebody said that it begins
        self._fresh = True  # at the beginning of reasoning or answer, where line breaks say nothing
        self._said = {"reasoning": False, "answer": False}
        self._step = self._thought if opened else self._body if self.thinking else self._beginning

    @property
    def guesses(self) -> bool:
        """Whether reasoning is open because of plain words, which may mean nothing."""
        return self.thinking and self._now is not None and self._now.phrase

    @property
    def begins(self) -> bool:
        """Whether a marker may be arriving: nothing was decided yet, and something waits."""
        return self._step == self._beginning and bool(self._held.strip())

    @property
    def fresh(self) -> bool:
        """Whether nothing of the answer has come yet, as far as one can tell."""
        return not self.thinking and not self._said["answer"] and not self._held.strip()

    @property
    def place(self) -> Literal["beginning", "thought", "header", "gap", "answer"]:
        """Where the stream is: before anything was decided, in a thought, where a channel is named, between
        a thought and what follows, in the answer.
        """
        if self.thinking:
            return "thought"
        if self._step == self._beginning:
            return "header" if self._held.strip() else "answer" if self._closed else "beginning"
        if self._step == self._header:
            return "header"
        return "gap" if self._step == self._after else "answer"

    @property
    def settled(self) -> bool:
        """Whether nothing but the answer can follow."""
        return self._step in (self._plain, self._answering)

    @property
    def at_line_start(self) -> bool:
        """Whether the last character of what is being thought ends a line."""
        return self.thinking and self._held.endswith("\n")

    @property
    def gap(self) -> str:
        """White space that was written since a thought ended."""
        return self._held if self._step == self._after else ""

    @property
    def end(self) -> str:
        """What ends the thought that is open, or ended the last one; "" where channels do."""
        return self._now.end if self._now is not None else ""

    def answers(self) -> None:
        """What comes from here on is the answer, whatever it looks like."""
        self._gap, self.thinking, self._step = len(self._held), False, self._answering

    def fork(self) -> Splitter:
        """Another one at the same place, which goes on by itself."""
        other = copy.copy(self)
        other._said = dict(self._said)
        other._step = getattr(other, self._step.__name__)
        return other

    def push(self, written: str) -> list[Piece]:
        """The pieces that are certain now."""
        if self._step == self._plain and not self._held:
            return [Piece("answer", written, written)] if written else []
        self._held += written
        out: list[Piece] = []
        step = None
        while self._held and step != self._step:  # a step that is done sets the next one
            step = self._step
            step(out)
        return out

    def flush(self) -> list[Piece]:
        """The stream has ended: what was held back is what it looks like."""
        held, self._held = self._held, ""
        if not held:
            return []
        if self.thinking:
            text = held.strip("\n") if self._fresh else held.rstrip("\n")
            return [Piece("reasoning", text, held)] if text else [Piece("marker", "", held)]
        if self._step in (self._beginning, self._plain, self._wrapped):
            return [Piece("answer", held, held)]
        if self._step == self._after and held.strip():
            return [Piece("answer", held, held)]
        return [Piece("marker", "", held)]

    # What may come next; each takes from `_held` what it can

    def _beginning(self, out: list[Piece]) -> None:
        text = self._held.lstrip()
        tags = next((t for t in self._tags if text.startswith(t.start)), None)
        if tags is not None:
            self._take(out, "marker", len(self._held) - len(text) + len(tags.start))
            if self._said["reasoning"]:
                out.append(Piece("reasoning", "\n\n", ""))
            self._now, self.thinking, self._fresh, self._step = tags, True, True, self._thought
        elif text.startswith((CHANNEL, START)):
            self._step = self._header
        elif text and not any(m.startswith(text) for m in (CHANNEL, START, *(t.start for t in self._tags))):
            self._step = self._plain

    def _thought(self, out: list[Piece]) -> None:
        assert self._now is not None
        if self._until(out, "reasoning", self._now.end) is not None:
            self._take(out, "marker", len(self._now.end))
            self.thinking, self._fresh, self._step = False, True, self._after

    def _after(self, out: list[Piece]) -> None:
        """Between the end of the reasoning and the answer; or more reasoning."""
        assert self._now is not None
        text = self._held.lstrip()
        marks = [m for m in (self._now.answer_start, self._now.start) if m]
        if not text or any(m.startswith(text) and m != text for m in marks):
            return
        if text.startswith(self._now.start):
            self._step = self._beginning
            return
        if text.startswith(self._now.answer_start) and self._now.answer_start:
            self._take(out, "marker", len(self._held) - len(text) + len(self._now.answer_start))
            self._step = self._inside
            return
        self._skip_lines(out)
        self._step = self._wrapped if self._now.answer_end and not self._now.answer_start else self._plain

    def _inside(self, out: list[Piece]) -> None:
        if self._held.strip():
            self._skip_lines(out)
            self._step = self._wrapped

    def _wrapped(self, out: list[Piece]) -> None:
        assert self._now is not None
        if not self._now.answer_end:
            self._step = self._plain
        elif self._until(out, "answer", self._now.answer_end) is not None:
            self._take(out, "marker", len(self._now.answer_end))
            self._step = self._plain

    def _answering(self, out: list[Piece]) -> None:
        self._take(out, "marker", self._gap)
        self._step = self._plain

    def _plain(self, out: list[Piece]) -> None:
        self._take(out, "answer", len(self._held))

    def _header(self, out: list[Piece]) -> None:
        end = self._held.find(MESSAGE)
        if end < 0:
            if len(self._held) > LONGEST_HEADER:
                self._step = self._plain
            return
        head = self._held[:end]
        self.thinking = head.rpartition(CHANNEL)[2].split()[:1] == ["analysis"]
        self._take(out, "marker", end + len(MESSAGE))
        if self._said["reasoning" if self.thinking else "answer"]:
            out.append(Piece("reasoning" if self.thinking else "answer", "\n\n", ""))
        self._fresh, self._step = True, self._body

    def _body(self, out: list[Piece]) -> None:
        found = self._until(out, "reasoning" if self.thinking else "answer", END, START)
        if found is not None:
            if found == END:
                self._take(out, "marker", len(END))
            self.thinking, self._step = False, self._header

    # Taking

    def _until(self, out: list[Piece], kind: str, *ends: str) -> str | None:
        """Take text up to the first of `ends`; which one it is, None while there is none."""
        found = [(at, end) for end in ends if (at := self._held.find(end)) >= 0]
        at, end = min(found) if found else (self._begun(ends), None)
        if self._fresh and kind == "reasoning":
            skipped = len(self._held[:at]) - len(self._held[:at].lstrip("\n"))
            self._take(out, "marker", skipped)
            at -= skipped
        text = self._held[:at]
        if kind == "reasoning":
            text = text.rstrip("\n")
        if text:
            self._fresh = False
            self._take(out, kind, len(text))
        if end is not None:
            self._take(out, "marker", at - len(text))
        return end

    def _begun(self, ends: tuple[str, ...]) -> int:
        """Index at which an unfinished end at the end of what is held begins; its length if there is none."""
        n = len(self._held)
        for at in range(max(0, n - max(map(len, ends)) + 1), n):
            if any(end.startswith(self._held[at:]) for end in ends):
                return at
        return n

    def _skip_lines(self, out: list[Piece]) -> None:
        """Pass over empty lines; the indentation of the first line stays."""
        match = re.match(r"\s*\n", self._held)
        self._take(out, "marker", match.end() if match else 0)

    def _take(self, out: list[Piece], kind: str, n: int) -> None:
        if n:
            written, self._held = self._held[:n], self._held[n:]
            out.append(Piece(kind, "" if kind == "marker" else written, written))
            if kind != "marker":
                self._said[kind] = True


def _tags_of(written: str, prompt: str) -> tuple[Tags, ...]:
    """The tags of a whole text: those that are known, and what looks like some at its beginning."""
    start = _LOOKS.match(written.lstrip()[:60])
    opened = prompt[-60:].rstrip()
    start = start or next((m for m in _LOOKS.finditer(opened) if m.end() == len(opened)), None)
    if start is None or any(t.start == start[0] for t in TAGS):
        return TAGS
    return (*TAGS, *(Tags(start[0], end) for end in _ends_of(start[0]) if end in written))


def pieces_of(written: str, prompt: str = "") -> Iterator[Piece]:
    """A whole text that a model wrote, in pieces."""
    splitter = Splitter(prompt, tags=_tags_of(written, prompt))
    yield from splitter.push(written)
    yield from splitter.flush()


def split_thought(written: str, prompt: str = "") -> tuple[str | None, str, bool]:
    """A text's reasoning (None: there is none), its answer, and whether the reasoning is closed.

    prompt: the end of what stands before. A text that only closes is believed too: some templates opened the
    thought in a prompt that is not known any more.
    """
    splitter = Splitter(prompt, tags=_tags_of(written, prompt))
    pieces = splitter.push(written)
    if splitter.begins and written.lstrip() != "":
        return "", "", False  # the marker itself is arriving
    if splitter.guesses:
        return None, written, True
    marked = splitter.thinking or any(p.kind == "marker" for p in pieces)
    thinking = splitter.thinking
    pieces += splitter.flush()
    reasoning = "".join(p.text for p in pieces if p.kind == "reasoning")
    answer = "".join(p.text for p in pieces if p.kind == "answer")
    if marked:
        return reasoning, answer, not thinking
    end = written.find("</think>")
    if end >= 0 and "<think>" not in written[:end]:
        return written[:end].strip("\n"), written[end + len("</think>") :].lstrip("\n"), True
    return None, written, True
