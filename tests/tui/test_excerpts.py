"""Excerpts: as many cells as there are, and what was found in view."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.chats.finding import Finder
from tinychat.tui.excerpts import FOUND, clusters, fitted, marked
from tinychat.tui.text import line_width, plain

FAMILY = "👨‍👩‍👧‍👦"
SCRIPTS = ["a", " ", "é", "e\u0301", "日", "한", FAMILY, "👍🏽", "\n", "שלום", "\x1b[31m", "fox "]


@pytest.mark.parametrize("width", [10, 20, 34, 60])
@pytest.mark.parametrize("before", [0, 5, 500])
@pytest.mark.parametrize("script", ["a ", "日本", "e\u0301", FAMILY])
def test_the_word_is_in_view_and_the_line_fits(width, before, script):
    text = script * before + " needle " + script * 500
    line = fitted(Finder.of("needle").excerpt(text), width)
    assert [t for t, style in line if style == FOUND] == ["needle"]
    assert line_width(line) <= width
    assert line_width(line) >= width - 3 or script == FAMILY  # eleven characters, two cells
    assert plain(line).endswith("…")


def test_a_word_longer_than_the_line_is_begun():
    line = fitted(Finder.of("needle" * 10).excerpt("a " + "needle" * 10), 20)
    assert line_width(line) <= 20
    assert plain(line).startswith("…needle")


def test_what_is_seen_as_one_character_is_not_cut():
    assert clusters(f"e\u0301{FAMILY}x👍🏽") == ["e\u0301", FAMILY, "x", "👍🏽"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SCRIPTS), max_size=80).map("".join), st.integers(4, 40))
def test_no_text_is_wider_than_its_line_or_speaks_to_the_terminal(text, width):
    line = fitted(Finder.of("fox").excerpt(text), width)
    assert line_width(line) <= width
    assert "\x1b" not in plain(line)
    assert "\n" not in plain(line)


def test_words_are_marked_across_spans_and_keep_their_style():
    line = [("the f", "strong"), ("ox and", "link"), (" fox", "")]
    spans = Finder.of("fox").spans(plain(line))
    assert marked(line, spans) == [
        ("the ", "strong"),
        ("f", "strong found"),
        ("ox", "link found"),
        (" and", "link"),
        (" ", ""),
        ("fox", "found"),
    ]
