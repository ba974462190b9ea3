"""What stands in the documents: their pages, links, and the commands that they show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHELLS = ("", "bash", "sh", "console")  # languages of blocks that hold commands
_FENCE = re.compile(r"^```(\w*)$")
_PROMPT = re.compile(r"^(?:[\w.-]+)?\$ +")  # "$ ", or "gpu-box$ "
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z_0-9]*=.*", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of tinychat's as a page shows it. words: its arguments, "tinychat" left out. piped: whether
    another program's output goes into it. mention: it stands in a sentence and is only named.
    """

    page: str
    line: int
    words: tuple[str, ...]
    piped: bool = False
    mention: bool = False

    def __str__(self) -> str:
        return shlex.join(["tinychat", *self.words])


def pages() -> dict[str, str]:
    """Text of README.md and of every page of docs/, by its path in the repository."""
    files = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    return {f.relative_to(REPOSITORY).as_posix(): f.read_text(encoding="utf-8") for f in files}


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures that lead to another place of the repository."""
    return [t for t in _LINK.findall(text) if not re.match(r"[a-z]+:", t)]


def anchors(text: str) -> set[str]:
    """Names under which a page's headings can be linked to, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Number of its first line, language and lines of each block of code, fenced or indented by four."""
    lines, i = text.split("\n"), 0
    while i < len(lines):
        if opened := _FENCE.match(lines[i]):
            end = lines.index("```", i + 1)
            yield i + 2, opened[1], lines[i + 1 : end]
            i = end + 1
        elif lines[i].startswith("    ") and i and not lines[i - 1].strip():
            end = i
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            yield i + 1, "", [line[4:] for line in lines[i:end]]
            i = end
        else:
            i += 1


def commands(page: str, text: str) -> list[Command]:
    """Every command of tinychat's on a page, in blocks and in sentences."""
    found, prose = [], text.split("\n")
    for first, language, lines in blocks(text):
        for i in range(first - 2, first + len(lines)):
            if i < len(prose):
                prose[i] = ""
        if language in SHELLS:
            found += _in_block(page, first, language, lines)
    for span in re.finditer(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", "\n".join(prose), re.DOTALL):
        code = " ".join(span[2].split())
        if "tinychat " in code or code == "tinychat":
            line = "\n".join(prose)[: span.start()].count("\n") + 1
            found += _in_line(page, line, re.sub(r"\[(\S[^\]]*)\]", r"\1", code), mention=True)
    return found


def _in_block(page: str, first: int, language: str, lines: list[str]) -> Iterator[Command]:
    """Commands of a block; a console's are behind a prompt, and the other lines are what is answered."""
    i = 0
    while i < len(lines):
        at, line = i, lines[i]
        while line.endswith("\\") and i + 1 < len(lines):
            i += 1
            line = line[:-1] + lines[i].strip()
        i += 1
        prompted = _PROMPT.match(line)
        if prompted or language != "console":
            yield from _in_line(page, first + at, line[prompted.end() :] if prompted else line)


def _in_line(page: str, number: int, line: str, mention: bool = False) -> Iterator[Command]:
    """Commands of a line of shell."""
    if "tinychat" not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    piped = skip = False
    for token in [*lexer, ";"]:
        if skip or token.startswith(("<", ">")):
            skip = not skip  # the file that is read or written
        elif set(token) <= set("|&;"):
            while words and _ASSIGNMENT.fullmatch(words[0]):
                words = words[1:]
            if words and words[0] == "tinychat":
                named = mention and len(words) <= 2
                yield Command(page, number, tuple(words[1:]), piped, named)
            piped, words = token == "|", []
        else:
            words.append(token)
