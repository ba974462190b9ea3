"""Answers that run in a circle are noticed, and what repeats rightly is not taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinychat.text.repeating import EVERY, LONGEST, LONGEST_WIDE, WIDE, WINDOW, Circle


def closes(pieces):
    """After how many tokens the circle is closed; None: never. Pieces are tokens' texts."""
    circle, known = Circle(), {}
    for n, piece in enumerate(pieces, 1):
        if circle.push(known.setdefault(piece, len(known)), piece):
            return n
    return None


@given(st.integers(1, LONGEST), st.integers(0, 300))
def test_a_period_is_noticed_when_it_fills_the_window(period, before):
    pieces = [f" before{i}" for i in range(before)] + [f" w{i % period}" for i in range(2 * WINDOW)]
    first = before + WINDOW
    assert first <= closes(pieces) < first + EVERY


@given(st.lists(st.integers(0, 3), min_size=WINDOW, max_size=600), st.randoms())
def test_what_does_not_repeat_is_left_alone(ids, random):
    pieces = [f" w{i}" for i in ids]
    for at in range(0, len(pieces), 50):  # a word of its own in every fifty
        pieces[at] = f" own{at}"
    assert closes(pieces) is None


@pytest.mark.parametrize(
    "text",
    [
        "```\n" + "0 0 0 0\n" * 200,
        "Look:\n\n~~~python\n" + "x = 0\n" * 300,
        "| a | b |\n|---|---|\n" + "| 0 | 0 |\n" * 200,
        "Indented:\n\n" + "    00 00 00 00\n" * 200,
        "```\n" + "{\n    'a': 0\n}\n" * 100,  # for a while
        "```\n" + "0 0 0 0\n\n" * 600,
    ],
)
def test_code_and_tables_may_repeat(text):
    pieces = [w for line in text.splitlines(keepends=True) for w in line.replace(" ", "\x00 ").split("\x00")]
    assert len(pieces) > 2 * WINDOW
    assert closes(pieces) is None


@pytest.mark.parametrize("before", ["", "```\n"])
def test_several_lines_again_and_again_are_a_circle_in_a_table_or_in_code(before):
    rows = [p for name in ("Mars", "Earth", "Venus") for p in ("|", f" {name}", " |", " 1", " |", "\n")]
    n = closes([before, *rows * 100])
    assert WIDE <= n < WIDE + len(rows) + 8 * EVERY
    long = [p for i in range(LONGEST_WIDE // 3 + 1) for p in ("|", f" {i}", "\n")]
    assert closes([before, *long * 10]) is None


def test_behind_the_code_it_counts_again():
    code = ["```", "\n", *["0", "\n"] * 300, "```", "\n"]
    assert closes(code) is None
    n = closes([*code, *[" again", " and"] * WINDOW])
    assert len(code) + WINDOW <= n < len(code) + WINDOW + 2 * EVERY


def test_a_list_whose_items_are_numbered_is_none():
    assert closes([p for i in range(300) for p in (f"{i}.", " The same", " words", "\n")]) is None
