"""What strangers wrote is text on a terminal; honest text comes through as it is."""

from __future__ import annotations

import io
import sys
import unicodedata
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from tinychat.base import terminal


class Tty(io.TextIOWrapper):
    def isatty(self):
        return True


@contextmanager
def guarded(stream=Tty, encoding="utf-8"):
    """stdout and stderr are one terminal; its bytes."""
    written = io.BytesIO()
    tty = stream(written, encoding=encoding, write_through=True)
    with redirect_stdout(tty), redirect_stderr(tty):
        terminal.guard()
        yield written
    tty.detach()  # the bytes outlive it


HONEST = (
    "plain, tab\tand newline\n",
    "日本語 한국어 ไทย हिन्दी é e\u0301 Ω≈ç",
    "😀 👩‍👩‍👧‍👦 👍🏽 ❤️ 🇫🇷 1️⃣",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f England",
    "مرحبا بالعالم \u200fעברית\u200e نمی\u200cخواهم",
    "½ ° “quotes” … — │╭╮ ␛",
)


@pytest.mark.parametrize("text", HONEST)
def test_honest_text_is_written_as_it_is(text):
    with guarded() as out:
        sys.stdout.write(text)
        sys.stderr.write(text)
    assert out.getvalue().decode() == text * 2


@pytest.mark.parametrize(
    "text",
    [
        "\x1b]52;c;aGk=\x07",
        "\x1b]0;title\x1b\\",
        "\x1b[2J\x1b[H",
        "\x1bc",
        "\x1bP$q\x1b\\",
        "\x9b2J\x9d0;x\x9c\x90x\x9c",
        "\x1b[8mhidden\x1b[0m",
        "\x1b]8;;https://evil.example\x07link\x1b]8;;\x07",
        "over\rwritten\b\b\x0b\x0c\x7f\x0e\x0f\x05",
        "abc\u202egnp.exe\u202c \u2066x\u2069 \u2067y\u2069",
        "\u2028\u2029\ufeff\ufff9\ufffb\u206f",
        "tags \U000e0041\U000e0042 \U0001f3f4\U000e0041\U000e007f",
        "\ud800\udc9b",
    ],
)
def test_nothing_that_is_written_can_be_an_instruction(text):
    with guarded() as out:
        for stream in (sys.stdout, sys.stderr):
            print(text, file=stream)
            stream.writelines([text])
            for half in (text[: len(text) // 2], text[len(text) // 2 :]):
                stream.write(half)
    shown = out.getvalue().decode()
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n"}
    assert not {c for c in shown if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF")}
    assert not {c for c in shown if unicodedata.bidirectional(c) in ("RLI", "LRI", "FSI", "PDI")}
    assert not {c for c in shown if 0xE0000 <= ord(c) < 0xE0080}


def test_a_pipe_gets_everything():
    with guarded(io.TextIOWrapper) as out:
        print("\x1b[31m\u202e", end="")
    assert out.getvalue() == "\x1b[31m\u202e".encode()


def test_what_the_encoding_lacks_is_replaced():
    with guarded(encoding="latin-1") as out:
        print("é日\ud800", end="")
    assert out.getvalue() == b"\xe9???"  # of a wide character both cells


def test_there_is_no_way_around():
    """click and others look for the binary stream where an encoding seems wrong."""
    import click

    with guarded(encoding="ascii") as out:
        with pytest.raises(AttributeError):
            _ = sys.stdout.buffer
        click.echo("\x1b]0;x\x07")
        click.secho("\x1b]0;x\x07", fg="red", err=True)
    assert out.getvalue() == b"?]0;x?\n" * 2


def test_our_own_words_keep_their_colour_and_their_place(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    with guarded() as out:
        sys.stderr.write("before ")
        terminal.label("Error:", "red", err=True)
        sys.stderr.write(" \x1b[31mafter\x1b[0m")
        assert out.getvalue() == b"before \x1b[31mError:\x1b[0m after"
        monkeypatch.setenv("NO_COLOR", "1")
        terminal.label("Error:", "red")
        assert out.getvalue().endswith(b"afterError:")


def test_tables_and_bars_have_no_markup_and_no_links():
    with guarded() as out:
        console = terminal.console()
        console.print("[link=https://evil.example]x[/link] :smile: \x1b]0;t\x07")
        with terminal.bar("[link=https://evil.example]y[/link]\n\x1b]52;c;\x07", 10, in_bytes=True) as update:
            update(5, 10, "[conceal]z[/conceal]\x1b[2J\u202e")
    shown = out.getvalue().decode()
    assert "[link=https://evil.example]x[/link] :smile: ␛]0;t" in shown
    assert "[conceal]z[/conceal]␛[2J" in shown
    assert not any(bad in shown for bad in ("\x1b]", "\x1b[2J\u202e", "\u202e", "\x1b[8m", "\x9b"))
