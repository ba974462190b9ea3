"""`kill -9` in the middle of answers: what was said more than a second before is in the store, searchable."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinychat.chats.chat_store import ChatStore

# Chats as fast as it can about the word that it is given; says on stdout what has been said, and when.
TALKER = """
import sys, time
from pathlib import Path

def tell(kind, text):
    print(f"{time.monotonic()} {kind} {text}", flush=True)

def words(turn):
    for i in range(40):
        time.sleep(0.01)
        yield f"w{turn}.{i} "
"""
SCREEN = """
from tinychat.conversation import Message
from tinychat.chats.chat_store import ChatStore
from tinychat.tui.conversation import Conversation

store = ChatStore(Path(sys.argv[1]))
c = Conversation.open(store, 1) if store.chats() else Conversation(store, "demo")
for turn in range(10**6):
    q = c.ask(f"{sys.argv[2]} {turn}", c.tree.leaf)
    tell("asked", c.tree.nodes[q].content)
    c.begin_answer(q, "demo")
    text = ""
    for w in words(turn):
        text += w
        c.hear(w, lambda e: None)
        tell("said", text)
    c.finish(Message("assistant", text, q, "p", [2], [1], "stop"))
    tell("finished", text)
"""
PLAIN = """
from tiny import tiny_model
from tinychat.base.events import Completion, Done, Stats, TextDelta
from tinychat.chats.keeper import Keeper
from tinychat.session import Message
from tinychat.chats.chat_store import ChatStore

store = ChatStore(Path(sys.argv[1]))
session = tiny_model(backend="cpu").session()
keeper = Keeper(store, session, store.latest() if store.chats() else None)

def answer(turn):
    session.nodes.append(Message("user", f"{sys.argv[2]} {turn}", session.leaf))
    node = Message("assistant", "", len(session.nodes) - 1)
    session.nodes.append(node)
    session.leaf = len(session.nodes) - 1
    for w in words(turn):
        yield TextDelta(w, 1)
        node.content += w
    node.finish_reason = "stop"

for turn in range(10**6):
    text = ""
    for event in keeper.follow(session, answer(turn)):
        if not text:
            tell("asked", f"{sys.argv[2]} {turn}")
        text += event.text
        tell("said", text)
    tell("finished", text)
"""


def kill_while_talking(code, path, word, seconds):
    """What the talker says that it has done, as (time, kind, text), and when it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", TALKER + code, str(path), word],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")},
    )
    first = child.stdout.readline()
    time.sleep(seconds)
    killed = time.monotonic()
    child.send_signal(signal.SIGKILL)
    lines = [first, *child.stdout.read().splitlines()]
    child.wait()
    assert first, "it never began"
    return [
        (float(at), kind, text) for at, kind, text in (x.rstrip("\n").split(" ", 2) for x in lines)
    ], killed


def survive(code, tmp_path, rounds):
    path, rng = tmp_path / "chats.db", random.Random(0)
    finished = []
    for n in range(rounds):
        log, killed = kill_while_talking(code, path, f"round{n}", rng.uniform(0, 1.5))
        with_store = ChatStore(path)
        assert not with_store.notice
        messages = with_store.messages(1)
        texts = [m.content for m in messages]
        finished += [text for _, kind, text in log if kind == "finished"]
        for text in finished[-20:]:
            assert text in texts
        asked = [text for _, kind, text in log if kind == "asked"]
        assert set(asked) <= set(texts)
        old = [text for at, kind, text in log if kind == "said" and at < killed - 1]
        if old and not any(t.startswith(old[-1].rstrip()) for t in texts):
            raise AssertionError(f"lost {old[-1][-40:]!r}")
        assert with_store.search(asked[0])[0].chat.id == 1
        with_store.lock(1)()  # the dead hold nothing
        with_store.close()
    assert len(finished) > rounds // 4  # the kills came in the middle, and answers before them


@pytest.mark.parametrize("code", [SCREEN, PLAIN], ids=["screen", "plain"])
def test_at_most_the_last_second_is_lost(code, tmp_path):
    survive(code, tmp_path, 6 if code is SCREEN else 3)


@pytest.mark.slow
@pytest.mark.parametrize("code", [SCREEN, PLAIN], ids=["screen", "plain"])
def test_at_most_the_last_second_is_lost_two_hundred_times(code, tmp_path):
    survive(code, tmp_path, 200)
