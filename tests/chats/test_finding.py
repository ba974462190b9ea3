"""Words that are looked for, in the texts that have them."""

from __future__ import annotations

import sqlite3

import pytest

from tinychat.chats.finding import AROUND, PART, Finder

NAIVE = "nai\u0308ve"  # the accent is a character of its own


def found(search, text, by_words=True):
    return [text[a:b] for a, b in Finder.of(search, by_words).spans(text)]


@pytest.mark.parametrize(
    ("search", "text", "expected"),
    [
        ("fox", "A Fox, foxes and a firefox", ["Fox", "fox"]),
        ("fox den", "the fox's dens", ["fox", "den"]),
        ("fox den", "foxes den", ["den"]),  # only the last word may go on
        ("cafe", "Café CAFÉ cafe\u0301s", ["Café", "CAFÉ", "cafe\u0301"]),
        ("naïve", f"so {NAIVE}", [NAIVE]),
        ("strasse", "Die Straße", ["Straße"]),
        ("日本", "彼は日本語 日本語", ["日本"]),
        ("bar", "foo_bar", ["bar"]),
        ("(", "a (b", []),
    ],
)
def test_beginnings_of_words_whatever_their_case_and_accents(search, text, expected):
    assert found(search, text) == expected


def test_without_an_index_the_text_itself_is_found_anywhere():
    assert found("x den", "fox denies", by_words=False) == ["x den"]
    assert found("", "anything", by_words=False) == []


@pytest.mark.parametrize("word", ["fox", "Café", NAIVE, "日本語", "foo_bar", "x86", "Übergrößen"])
def test_what_the_index_of_words_finds_is_found(word):
    db = sqlite3.connect(":memory:")
    try:
        db.execute("CREATE VIRTUAL TABLE w USING fts5(content, tokenize='unicode61 remove_diacritics 2')")
    except sqlite3.OperationalError:
        pytest.skip("needs SQLite with FTS5")
    text = f"before {word}-after {word.upper()}"
    db.execute("INSERT INTO w (content) VALUES (?)", (text,))
    for search in (word, word.lower(), word[:3]):
        match = " ".join(f'"{w}"' for w in search.replace("_", " ").split()) + "*"
        assert db.execute("SELECT count(*) FROM w WHERE w MATCH ?", (match,)).fetchone() == (1,)
        assert len(found(search, text)) >= 1


def test_an_excerpt_has_the_first_place_and_what_is_around_it():
    text = "a " * 5000 + "the needle and another needle " + "b " * 5000
    pieces = Finder.of("needle").excerpt(text)
    assert [p for p, hit in pieces if hit] == ["needle", "needle"]
    assert pieces[0] == ("…", False)
    assert pieces[-1] == ("…", False)
    assert len("".join(p for p, _ in pieces)) <= 2 * AROUND + 2
    assert Finder.of("absent").excerpt("short") == [("short", False)]


@pytest.mark.parametrize("shift", range(-8, 9))
def test_a_word_where_two_parts_meet_is_found_once(shift):
    text = "x" * (PART + shift - 1) + " needle " + "y" * PART
    assert [p for p, hit in Finder.of("needle").excerpt(text) if hit] == ["needle"]
