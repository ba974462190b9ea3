r"""Formulas in Markdown: `\(…\)`, `\[…\]`, `$…$`, `$$…$$`, `\begin{…}…\end{…}` stay as they are written.

Markdown would take backslashes, underscores and asterisks out of them. What is copied is what was said. A
formula that is still being written is one already, so that nothing changes its look while it comes.
"""

from __future__ import annotations

import re
from typing import Any

_OPEN = re.compile(r"\\\(|\\\[|\$\$|\\begin\{([A-Za-z]{1,20}\*?)\}")
_CLOSE = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
# Between single dollars stands a formula only if it has something that Markdown would change: prices do not.
_DOLLARS = re.compile(r"\$(?=[^\s$])([^$`\n]*?[\\^_{*][^$`\n]*)(?<=[^\s$])(?<!\\)\$(?![0-9A-Za-z])")

# Formulas that a bar of theirs would cut in two, in a table. The bar's stand-in is as long as the bar.
_WITH_BAR = re.compile(r"\\\((?:(?!\\[()])[^\n])*\\\)|\\\[(?:(?!\\[\[\]])[^\n])*\\\]|\$\$[^$\n]+\$\$")
_BAR = "\ue07c"


def add_math(parser: Any) -> None:
    """Have a markdown-it parser know formulas: tokens `math_inline` and `math_block`. In its env, `live`
    says that the end of the source is not the end of the text.
    """
    parser.inline.ruler.before("escape", "math", _inline)
    parser.block.ruler.before("fence", "math", _block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    parser.core.ruler.at("inline", _all_inline)


def _table(state: Any, start: int, end: int, silent: bool) -> bool:
    """Rule for tables, as the parser's own; a bar inside of a formula does not end its cell."""
    from markdown_it.rules_block import table

    src, known = state.src, len(state.tokens)
    if "|" in src and ("\\" in src or "$$" in src) and _BAR not in src:
        state.src = _WITH_BAR.sub(_covered, src)
    try:
        return table(state, start, end, silent)
    finally:
        state.src = src
        for token in state.tokens[known:]:
            token.content = token.content.replace(_BAR, "|")


def _covered(found: re.Match) -> str:
    formula = found[0]
    return formula.replace("|", _BAR) if any(c.isalnum() for c in formula) else formula


def _all_inline(state: Any) -> None:
    """Rule for inline text, as the parser's own; only the last piece of a text that goes on may hold an open
    formula.
    """
    tokens = [t for t in state.tokens if t.type == "inline"]
    live = state.env.get("live", False)
    for token in tokens:
        state.env["open"] = live and token is tokens[-1]
        token.children = token.children or []
        state.md.inline.parse(token.content, state.md, state.env, token.children)


def _inline(state: Any, silent: bool) -> bool:
    src, at = state.src, state.pos
    if src[at] not in "\\$":
        return False
    end = -1
    if match := _OPEN.match(src, at):
        closing = _closing(match)
        end = src.find(closing, match.end())
        if end >= 0:
            end += len(closing)
        elif state.env.get("open"):
            end = state.posMax
        else:
            end = match.end()  # as it is written, and nothing beyond it
    elif (match := _DOLLARS.match(src, at)) and not (at and src[at - 1].isalnum()):
        end = match.end()
    if not at < end <= state.posMax:
        return False
    if not silent:
        state.push("math_inline", "", 0).content = src[at:end]
    state.pos = end
    return True


def _closing(match: re.Match) -> str:
    return f"\\end{{{match[1]}}}" if match[1] else _CLOSE[match[0]]


def _block(state: Any, start: int, end: int, silent: bool) -> bool:
    """A formula on lines of its own. A blank line ends what never closes."""
    src = state.src
    first = state.bMarks[start] + state.tShift[start]
    match = _OPEN.match(src, first, state.eMarks[start])
    if match is None or match[0] == "\\(" or state.is_code_block(start):
        return False
    closing, line, at = _closing(match), start, match.end()
    while True:
        found = src.find(closing, at, state.eMarks[line])
        if found >= 0:
            if src[found + len(closing) : state.eMarks[line]].strip(" \t.,;:"):
                return False  # text goes on behind it: a paragraph's
            break
        line += 1
        if line >= end or state.isEmpty(line) or state.sCount[line] < state.blkIndent:
            if not (state.env.get("live") and line >= state.lineMax):
                return False
            line -= 1
            break
        at = state.bMarks[line] + state.tShift[line]
    if silent:
        return True
    state.line = line + 1
    token = state.push("math_block", "", 0)
    token.content = state.getLines(start, line + 1, state.sCount[start], False)
    token.map = [start, state.line]
    return True
