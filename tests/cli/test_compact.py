"""/compact line by line: a summary by the same model, and a branch that goes on from it; the chat stays."""

from __future__ import annotations

import os
import signal

import pytest

import tinychat
from tinychat.base.errors import UsageError
from tinychat.chats import summary
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.keeper import Keeper
from tinychat.cli.compact import compact
from tinychat.cli.output import Printer

LONG = "Tell me about it, please: " + "one two three four five six seven eight nine ten " * 32


@pytest.fixture(scope="module")
def model(demo_gguf):
    with tinychat.load(demo_gguf, ctx=512, draft="none") as model:
        yield model


@pytest.fixture
def chat(model):
    """A session with one long question and its answer, kept in a store."""
    store = ChatStore(in_memory=True)
    session = model.session(temperature=0.0, max_tokens=8)
    keeper = Keeper(store, session)
    for event in keeper.follow(session, session.send(LONG)):
        assert event
    yield session, keeper
    keeper.close()
    store.close()


def contents(tree):
    return [m.content for m in tree.messages()]


def test_the_conversation_goes_on_from_a_summary_and_the_whole_of_it_stays(chat, capsys):
    session, keeper = chat
    before, params = contents(session.tree), session.params
    assert session.count_tokens() > 300
    compact(session, keeper)
    out, err = capsys.readouterr()
    assert "Compacted: " in err
    asked, text = contents(session.tree)
    assert (asked, text.rstrip(" …")[:20]) == (summary.ASKED, out.strip()[:20])
    assert session.count_tokens() < 300
    assert session.params is params
    assert contents(keeper.held.tree) == [asked, text]
    with pytest.raises(UsageError, match="nothing to make shorter"):
        compact(session, keeper)
    done = list(session.send("And now?"))[-1]
    assert done.finish_reason in ("stop", "length")
    session.switch(0)
    assert contents(session.tree) == before


def test_a_summary_that_is_stopped_leaves_the_conversation_as_it_was(chat, capsys, monkeypatch):
    session, keeper = chat
    nodes, leaf = list(session.nodes), session.leaf
    show = Printer.show

    def shown(self, event):
        show(self, event)
        if getattr(event, "text", ""):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Printer, "show", shown)
    compact(session, keeper)
    assert "The summary was stopped: the chat is as it was." in capsys.readouterr().err
    assert (session.nodes, session.leaf) == (nodes, leaf)
    monkeypatch.undo()
    before = contents(session.tree)
    done = list(session.send("More."))[-1]
    assert done.stats.cached_tokens > 200  # nothing of the conversation is read again
    assert contents(session.tree)[:2] == before
