"""Telling what a person wrote from what the chat template wrote, where a template has put them together.

Where a message spells a marker (`<|im_end|>`), or the end or the beginning of one, the characters are
guarded: hidden from the template, and from its own text, behind a code of private-use characters. `reveal`
finds them in what was rendered, so that they are tokenized as plain text.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tinychat.text.reasoning import TURN_MARKS, markers_in

if TYPE_CHECKING:
    import tokenizers

    from tinychat.text.tokenizer import Tokenizer

# A guard is OPEN, the characters' UTF-8 in hexadecimal digits, CLOSE.
CALLS = "tool_calls"  # the key of a message whose markers the template writes
OPEN, CLOSE = "\ue0ff", "\ue0fe"
_GUARD = re.compile(f"{OPEN}([0-9A-Fa-f]+){CLOSE}")
# Literals in a template: in quotes, and between its blocks.
# One that is never closed goes to the end, so that no character is looked at from each quote before it.
_LITERAL = re.compile(
    r"'(?:[^'\\]|\\.?)*(?:'|\Z)|\"(?:[^\"\\]|\\.?)*(?:\"|\Z)|[}%#]\}[^{]*|\A[^{]*", re.DOTALL
)
# What a marker looks like that no tokenizer calls an added token.
_MARKER = re.compile(r"<[|｜]?[\w/▁-]+[|｜]?>|\[/?[A-Z_]{2,}\]")
# What a template looks for in messages: 'x' in content, content.split('x')
_SOUGHT = re.compile(
    r"""(['"])(?P<a>(?:(?!\1).)+)\1\s+(?:not\s+)?in\b"""
    r"""|\.(?:r?split|startswith|endswith|r?partition|find|index|replace|count)\(\s*(['"])(?P<b>(?:(?!\3).)+)\3"""
)
# What models write around their thoughts and their calls of tools.
_SPOKEN = re.compile(r"</?(?:tool_call|tool_calls|tool_response|answer)>")


class Trusted(str):
    """A text whose markers are meant as such, and stay: ours, with what others wrote guarded already."""


class Markers:
    """The markers of one tokenizer and template, found in what people write.

    Everything that the tokenizer lists as an added token is a marker, but for white space; and what the
    template writes that looks like one and is a token.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        self._tokenizer = tokenizer
        contents = set(tokenizer.markers.values())
        for literal in _LITERAL.findall(template):
            for text in _MARKER.findall(literal):
                token_id = tokenizer.backend.token_to_id(text)
                if token_id is not None and token_id not in tokenizer.markers:
                    tokenizer.written[token_id] = text
                    contents.add(text)
        self._contents = contents | {OPEN, CLOSE}
        sought = {m["a"] or m["b"] for m in _SOUGHT.finditer(template)}
        # An answer's own markers stay what they are: the template takes thoughts out of it, or keeps them.
        spoken = markers_in(contents) - TURN_MARKS
        self._spoken = {
            text
            for i, text in tokenizer.markers.items()
            if text in spoken
            or _SPOKEN.fullmatch(text)
            or (text in sought and i not in tokenizer.special_ids)
        }
        self._longest = max(map(len, self._contents))
        self._sorted = sorted(self._contents)
        self._reversed = sorted(text[::-1] for text in self._contents)
        self._firsts, self._lasts = (
            re.compile(f"[{re.escape(''.join({text[i] for text in self._contents}))}]") for i in (0, -1)
        )
        self._finder: tokenizers.Tokenizer | None = None

    def guard(self, value: Any, spoken: bool = False) -> Any:
        """`value` with every marker guarded, in all its strings however deep. spoken: it is an answer, whose
        own markers stay, but for those in the calls that it has.
        """
        if isinstance(value, Trusted):
            return str(value)
        if isinstance(value, str):
            return self._guard(value, spoken)
        if isinstance(value, dict):
            spoken = spoken or value.get("role") == "assistant"
            return {self.guard(k): self.guard(v, spoken and k != CALLS) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.guard(v, spoken) for v in value]
        return value

    def _guard(self, text: str, spoken: bool) -> str:
        parts = self._find(text)
        if spoken:
            parts = [(a, b) for a, b in parts if text[a:b] not in self._spoken]
        parts += self._ends(text)
        if not parts:
            return text
        out, at = [], 0
        for start, stop in sorted(parts):
            start = max(start, at)
            if start < stop:
                code = text[start:stop].encode("utf-8", "surrogatepass").hex()
                out += [text[at:start], OPEN, code, CLOSE]
                at = stop
        return "".join([*out, text[at:]])

    def _find(self, text: str) -> list[tuple[int, int]]:
        """Positions of whole markers."""
        if self._finder is None:
            self._finder = _finder(self._tokenizer, self._contents)
        if self._finder.normalizer is None and not self._firsts.search(text):
            return []
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates spell nothing
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        found = self._finder.encode(text)
        return [span for i, span in zip(found.ids, found.offsets, strict=True) if i]

    def _ends(self, text: str) -> list[tuple[int, int]]:
        """A marker's end at the beginning of a text and a marker's beginning at its end: what stands beside
        it may be the rest. White space around it may be taken off by the template.
        """
        parts = []
        start = len(text) - len(text.lstrip())
        stop = len(text.rstrip())
        window = self._longest - 1
        ends = [m.end() for m in self._lasts.finditer(text, start, min(stop, start + window))]
        for end in reversed(ends):
            if _begins(self._reversed, text[start:end][::-1]):
                parts.append((start, end))
                break
        for match in self._firsts.finditer(text, max(start, stop - window), stop):
            if _begins(self._sorted, text[match.start() : stop]):
                parts.append((match.start(), stop))
                break
        return parts


def reveal(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Rendered text without its guards, and (start, end) of what they guarded."""
    if OPEN not in text:
        return text, []
    out: list[str] = []
    spans, at, length = [], 0, 0
    for match in _GUARD.finditer(text):
        try:
            guarded = bytes.fromhex(match[1]).decode("utf-8", "surrogatepass")
        except ValueError:  # not one of ours
            continue
        before = text[at : match.start()]
        out += [before, guarded]
        length += len(before)
        spans.append((length, length + len(guarded)))
        length += len(guarded)
        at = match.end()
    return "".join([*out, text[at:]]), spans


def beginning(text: str, revealed: str) -> str | None:
    """The beginning of rendered text that reveals exactly this; None if it begins otherwise."""
    if not reveal(text)[0].startswith(revealed):
        return None
    at = n = 0  # characters of the text, and those that they reveal
    for match in _GUARD.finditer(text):
        if n + match.start() - at >= len(revealed):
            break
        n += match.start() - at + len(reveal(match[0])[0])
        at = match.end()
    stop = at + len(revealed) - n
    return text[:stop] if reveal(text[:stop])[0] == revealed else None


def _begins(ordered: list[str], beginning: str) -> bool:
    """Whether one of the ordered texts begins so and goes on."""
    at = bisect.bisect_right(ordered, beginning)
    return at < len(ordered) and ordered[at].startswith(beginning)


def _finder(tokenizer: Tokenizer, contents: Iterable[str]) -> tokenizers.Tokenizer:
    """A tokenizer that knows nothing but the markers; id 0 is everything else."""
    from tokenizers import AddedToken, Tokenizer, models

    finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    normalized = tokenizer.normalized_markers()
    if normalized:
        finder.normalizer = tokenizer.backend.normalizer
    finder.add_tokens([AddedToken(text, normalized=text in normalized) for text in sorted(contents)])
    return finder
