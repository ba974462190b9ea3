"""Words that are looked for, found in a text as the store's index finds them: beginnings of words, whatever
their case and accents.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

PART = 8192  # characters that are looked through at a time
AROUND = 160  # characters of context on each side of what was found
MOST_WORDS, LONGEST_SEARCH = 30, 300
Piece = tuple[str, bool]  # some text, and whether it was looked for


def words_of(text: str) -> list[str]:
    """The words of a search; accents that follow a letter belong to it."""
    return re.findall(r"(?:[^\W_]|[\u0300-\u036f])+", text[:LONGEST_SEARCH])[:MOST_WORDS]


def folded(text: str) -> tuple[str, list[int] | None]:
    """The text without case and accents, and where in `text` its characters stand (None: the same places)."""
    if text.isascii():
        return text.lower(), None
    out, places = [], []
    for i, char in enumerate(text):
        for c in char.casefold() if char.isascii() else unicodedata.normalize("NFD", char).casefold():
            if not unicodedata.combining(c):
                out.append(c)
                places.append(i)
    return "".join(out), places


@dataclass(frozen=True)
class Finder:
    """Finds the words of a search; of the last one a beginning is enough. `words`: a pattern for each."""

    words: tuple[str, ...]
    by_words: bool = True

    @classmethod
    def of(cls, text: str, by_words: bool = True) -> Finder:
        """by_words: as the index of words finds them; otherwise the text as it is, anywhere."""
        found = words_of(text) if by_words else [text.strip()]
        patterns = [p for w in found if (p := re.escape(folded(w)[0]))]
        if by_words:
            patterns = [*(p + r"(?![^\W_])" for p in patterns[:-1]), *patterns[-1:]]
        return cls(tuple(patterns), by_words)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the words are in `text`, in order; accents that follow a letter belong to it."""
        if not self.words:
            return []
        return list(self._spans(text))

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        low, places = folded(text)
        for start, end in self._matches("|".join(self.words), low):
            if places is not None:
                start, end = places[start], places[end - 1] + 1
                while end < len(text) and unicodedata.combining(text[end]):
                    end += 1
            yield start, end

    def _matches(self, pattern: str, low: str) -> Iterator[tuple[int, int]]:
        # What comes before is looked at afterwards: an expression that begins with a letter is found faster.
        for match in re.finditer(pattern, low):
            start, end = match.span()
            if not (self.by_words and start and low[start - 1].isalnum()):
                yield start, end

    def all_in(self, text: str) -> bool:
        """Whether every word is in the text."""
        low = folded(text)[0]
        return bool(self.words) and all(any(True for _ in self._matches(w, low)) for w in self.words)

    def any_in(self, text: str) -> bool:
        """Whether one of the words is."""
        return bool(self.spans(text))

    def excerpt(self, text: str) -> list[Piece]:
        """Some of the text around the first place; its beginning where there is none."""
        first = self._first(text)
        start, end = max(0, first - AROUND), first + AROUND
        pieces: list[Piece] = [("…", False)] if start else []
        shown, at = text[start:end], 0
        for a, b in self.spans(shown):
            if a + start >= first:  # what is before may be the end of a longer word
                pieces += [(shown[at:a], False), (shown[a:b], True)]
                at = b
        pieces += [(shown[at:], False), ("…" if end < len(text) else "", False)]
        return [p for p in pieces if p[0]]

    def _first(self, text: str) -> int:
        """Where the first place is, a part of a long text at a time; 0 where there is none."""
        for start in range(0, max(1, len(text)), PART):
            before = min(start, LONGEST_SEARCH)
            found = next(self._spans(text[start - before : start + PART]), None) if self.words else None
            if found is not None:
                return start - before + found[0]
        return 0
