from __future__ import annotations

import io
import json
import unicodedata

import pytest
from tiny import tiny_model

from tinychat.base.characters import ERRORS, is_unicode, make_printable, whole
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.open_chat import OpenChat
from tinychat.conversation import Message
from tinychat.session import Session


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, café, 漢字, 😀", "plain, café, 漢字, 😀"),
        ("\ud83d\ude00", "😀"),  # a pair, as JavaScript counts characters
        ("caf\udce9", "café"),  # a byte of a command line that is not UTF-8
        ("\udc80 \ud83d \udfff", "\ufffd \ufffd \ufffd"),
    ],
)
def test_text_is_made_whole(text, expected):
    assert whole(text) == expected
    assert whole(text).encode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8", "utf-16"])
def test_every_text_can_be_printed_and_takes_as_many_cells(encoding):
    text = "╭─ “café” 漢 … ● → e\u0301 ﬁ 😀 \udce9 \ud800\n"
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    make_printable(stream)
    stream.write(text)
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert is_unicode(stream) == encoding.startswith("utf")
    if encoding == "utf-8":
        assert shown == text.replace("\udce9", "é").replace("\ud800", "\ufffd")
    if encoding == "ascii":
        assert shown.startswith('+- "cafe" ?? . * > ')

        def cells(s):
            s = [c for c in s if not unicodedata.combining(c)]
            return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in s)

        assert cells(shown) == cells(text)


def test_the_store_takes_every_text(tmp_path):
    store = ChatStore(tmp_path / "chats.db")
    chat = store.create("m\udce9", "s\ud800", title="t\udce9")
    held = OpenChat(store, chat)
    m = Message("user", "caf\udce9", prompt_text="p\ud800", model="m\ud800")
    at = held.add(m)
    for text in ("caf\udce9", "half \ud83d", "whole \ud83d\ude00"):
        m.content = text
        held.change(at)
        assert held.flush()
    held.close()
    store.update(chat.id, title="new \udce9", system="\udce9")
    assert store.messages(chat.id)[0].content == "whole 😀"
    assert (store.chat(chat.id).title, store.chat(chat.id).system) == ("new é", "é")
    assert len(store.search("whole")) == 1
    assert store.search("\ud800") is not None
    store.close()


def test_a_session_keeps_and_saves_whole_text(tmp_path):
    with tiny_model() as model:
        session = model.session("s\udce9", max_tokens=1)
        list(session.send("caf\udce9 \ud83d\ude00"))
        list(session.edit(0, "\ud800"))
        session.save(tmp_path / "s.json")
        assert Session.load(tmp_path / "s.json", model).nodes[0].content == "café 😀"
    assert [n.content for n in session.nodes if n.role == "user"] == ["café 😀", "\ufffd"]
    assert json.loads((tmp_path / "s.json").read_text())["system"] == "sé"


def test_the_handler_reads_bytes_as_latin1():
    assert b"\xe9\x90 \xc3\xa9".decode("utf-8", ERRORS) == "é\ufffd é"
