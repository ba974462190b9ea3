"""Stop strings in a stream, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinychat.text.stopping import StopMatcher

# Few letters, so that matches, overlaps and near misses are common.
texts = st.text("abc", max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=6), max_size=4).map(tuple)


def cut_at_the_first(text, stop):
    """The answer by definition: everything before the earliest occurrence."""
    at = [text.find(s) for s in stop if s in text]
    return text[: min(at)] if at else text


@st.composite
def chunked(draw):
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(chunked(), stops)
@example(["aab"], ("ab", "aab"))
@example(["a", "b", "c"], ("abcc", "b"))
@example(["aa", "a"], ("aaa",))
@settings(max_examples=1000)
def test_output_is_the_text_up_to_the_earliest_stop(chunks, stop):
    text = "".join(chunks)
    expected = cut_at_the_first(text, stop)
    m, out = StopMatcher(stop), ""
    for i, chunk in enumerate(chunks):
        out += m.push(chunk)
        # Whatever comes next, nothing shown may turn out to belong to a match or to stand behind one.
        seen = "".join(chunks[: i + 1])
        assert seen.startswith(out)
        for s in stop:
            for ahead in range(1, len(s) + 1):
                assert cut_at_the_first(seen + s[-ahead:], stop).startswith(out)
        # And what can no longer be part of one is shown at once.
        if m.matched is None and not any(s in seen for s in stop):
            held = seen[len(out) :]
            assert not held or any(s.startswith(held) for s in stop)
        if m.matched is not None:
            break
    out += m.flush()
    assert out == expected
    assert (m.matched is not None) == (expected != text)
    if m.matched is not None:
        assert text[len(expected) :].startswith(m.matched)


@given(texts)
def test_without_stop_strings_nothing_waits(text):
    m = StopMatcher()
    assert m.push(text) == text
    assert m.flush() == ""


def test_after_a_match_everything_is_swallowed():
    m = StopMatcher(("END",))
    assert m.push("one END two") == "one "
    assert m.matched == "END"
    assert m.push("three") == ""
    assert m.flush() == ""


def test_an_earlier_longer_stop_that_fails_gives_way_to_the_one_inside_it():
    m = StopMatcher(("<<end>>", "end"))
    assert m.push("x<<end") == "x"
    assert m.matched is None
    assert m.push("!") == "<<"
    assert m.matched == "end"


def test_an_earlier_longer_stop_that_completes_wins():
    m = StopMatcher(("<<end>>", "end"))
    assert [m.push(c) for c in "x<<end>>"] == ["x", *[""] * 7]
    assert m.matched == "<<end>>"


@pytest.mark.parametrize("stop", ["\n\n", "é", "👩‍👩‍👧"])
def test_unicode_stops(stop):
    m = StopMatcher((stop,))
    out = "".join(m.push(c) for c in f"one{stop}two")
    assert (out, m.matched) == ("one", stop)
