"""Ids of texts are found again by the text, within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinychat.text.known_text import KnownText


def test_the_longest_beginning_is_found():
    known = KnownText()
    known.add("ab", [1])
    known.add("abcd", [1, 2])
    known.add("abx", [9])
    assert [known.find(t) and list(known.find(t).ids) for t in ("a", "ab", "abc", "abcde", "abxy")] == [
        None,
        [1],
        [1],
        [1, 2],
        [9],
    ]


@given(st.lists(st.text("ab\ud800", max_size=6), max_size=12), st.text("ab\ud800", max_size=8))
def test_it_finds_what_a_search_through_all_finds(texts, wanted):
    known = KnownText()
    for i, text in enumerate(texts):
        known.add(text, [i])
    found = [text for text in texts if wanted.startswith(text)]
    best = known.find(wanted)
    if found:
        longest = max(found, key=len)
        assert (best.characters, list(best.ids)) == (
            len(longest),
            [max(i for i, t in enumerate(texts) if t == longest)],
        )
    else:
        assert best is None


def test_what_was_used_longest_ago_goes_first():
    known = KnownText(most_ids=6, most_texts=3)
    known.add("a", [1, 2])
    known.add("b", [1, 2])
    assert known.find("a")
    known.add("c", [1, 2, 3])
    assert known.find("a")
    assert not known.find("b")
    known.add("d", range(7))  # more than everything together may be
    assert not known.find("d")
    assert known.find("c")
    for i in range(5):
        known.add(f"e{i}", [])
    assert not known.find("c")
