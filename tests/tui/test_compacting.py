"""/compact: a summary by the same model, and a branch that goes on from it; the chat stays."""

from __future__ import annotations

import re

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.chats import summary
from tinychat.process.protocol import Failed
from tinychat.tui.conversation import Conversation

FACTS = {"ctx": 1000, "evicts": True}
pytestmark = pytest.mark.asyncio


def used(n):
    return {"prompt_tokens": n, "generated_tokens": 5}


async def chatted(pilot, *tokens, facts=FACTS):
    """A chat of so many answers, each of which took the conversation to so many tokens."""
    app = pilot.app
    app.engine.facts = facts
    await wait_until(pilot, lambda: app.chat.facts.get("ctx") == facts["ctx"])
    app.engine.scripts[:0] = [Script(f"Answer {n}.", stats=used(n)) for n in tokens]
    for i, n in enumerate(tokens, 1):
        await say(pilot, f"Question {n}?")
        await answered(pilot, i)


def contents(messages):
    return [m.content for m in messages]


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 36)])
async def test_the_chat_goes_on_from_a_summary_and_the_whole_of_it_stays(store, size):
    app = make_app(store, Script("- Frage und Antwort\n- offen: nichts"), "More.")
    async with app.run_test(size=size) as pilot:
        await chatted(pilot, 100, 500, 940)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Compacted: 945 tokens are" in screen_text(app))
        asked = app.engine.requests[-1]
        assert contents(asked.path)[:-1] == ["Question 100?", "Answer 100.", "Question 500?", "Answer 500."]
        assert asked.path[-1].content == summary.PROMPT.format(words=asked.params["max_tokens"] // 2)
        assert [m.ids for m in asked.path[:4:2]] == [[], []]
        assert asked.path[1].ids  # what was read is not read again
        text = screen_text(app)
        assert summary.ASKED in text
        assert "offen: nichts" in text
        assert "‹ 2/2 ›" in text
        after = int(re.search(r"are (\d+) now", " ".join(text.split()))[1])
        assert after < 200
        assert f"{after}/1000" in text
        await say(pilot, "And now?")
        await answered(pilot, 3)
        assert contents(app.engine.requests[-1].path) == [
            summary.ASKED, "- Frage und Antwort\n- offen: nichts", "Question 940?", "Answer 940.", "And now?",
        ]  # fmt: skip
        app.chat.conversation.close()
    tree = Conversation.open(store, 1).tree
    assert contents(tree.messages())[-1] == "More."
    tree.switch(0)
    assert contents(tree.messages())[-1] == "Answer 940."


async def test_a_summary_that_is_stopped_leaves_the_chat_as_it_was(store):
    app = make_app(store, Script("half a summary", hang=True))
    async with app.run_test(size=(80, 24)) as pilot:
        await chatted(pilot, 100)
        before = list(app.chat.conversation.tree.nodes)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Writing a summary: 3 tokens" in screen_text(app))
        await say(pilot, "said meanwhile")
        await say(pilot, "/regen")
        await wait_until(pilot, lambda: "Still answering." in screen_text(app))
        await pilot.press("escape")
        await wait_until(pilot, lambda: "The summary was stopped: the chat is as it was." in screen_text(app))
        assert app.chat.conversation.tree.nodes == before
        assert app.chat.composer.text.startswith("said meanwhile")
        assert "ready" in screen_text(app)
        assert "105/1000" in screen_text(app)


async def test_an_engine_that_fails_or_dies_leaves_the_chat_as_it_was(store):
    app = make_app(store, Script("a", hang=True), Script("b", hang=True))
    async with app.run_test(size=(80, 24)) as pilot:
        await chatted(pilot, 100)
        before = list(app.chat.conversation.tree.nodes)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Writing a summary: 1 token" in screen_text(app))
        app.engine.on_event(Failed("It does not fit.", "Use a smaller one.", "answer"))
        await wait_until(pilot, lambda: "It does not fit." in screen_text(app))
        assert not app.chat.answering
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Writing a summary: 1 token" in screen_text(app))
        app.engine.die()
        await wait_until(pilot, lambda: "The engine failed: it was killed" in screen_text(app))
        await wait_until(pilot, lambda: app.chat.ready)
        assert app.chat.conversation.tree.nodes == before


async def test_nothing_to_make_shorter_is_said(store):
    app = make_app(store, Script("Hello.", stats=used(400)), Script("Long. " * 500), Script("Short."))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "There is nothing to make shorter yet." in screen_text(app))
        await say(pilot, "hello")
        await answered(pilot)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "The summary is no shorter (5" in screen_text(app))
        assert contents(app.chat.conversation.path()) == ["hello", "Hello."]
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Compacted:" in screen_text(app))
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "There is nothing to make shorter yet." in screen_text(app))


async def test_a_full_context_that_nothing_leaves_has_room_for_the_question(store):
    facts = FACTS | {"evicts": False}
    app = make_app(store, "The summary.", "Another.")
    async with app.run_test(size=(80, 24)) as pilot:
        await chatted(pilot, 100, 500, 800, 980, facts=facts)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Compacted:" in screen_text(app))
        asked = app.engine.requests[-1]
        # The longest beginning for which 1,000 has room, with the question and the summary.
        assert contents(asked.path)[-2] == "Answer 500."
        assert contents(app.chat.conversation.path())[2:] == [
            "Question 800?", "Answer 800.", "Question 980?", "Answer 980.",
        ]  # fmt: skip


async def test_one_message_that_fills_the_context_is_cut_for_the_question(store):
    app = make_app(store, Script("Long, then.", stats=used(990)), "The summary.")
    app.engine.facts = FACTS | {"evicts": False}
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.chat.facts.get("ctx") == 1000)
        await say(pilot, "word " * 900)
        await answered(pilot)
        await say(pilot, "/compact")
        await wait_until(pilot, lambda: "Compacted:" in screen_text(app))
    sent = app.engine.requests[-1].path
    total = sum(len(m.content.split()) for m in sent)
    assert total + app.engine.requests[-1].params["max_tokens"] < 1000
    assert sent[0].content.endswith("[…]")
    assert sent[0].content.count("word") > 500
