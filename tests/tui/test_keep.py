"""Conversations of the plain REPL and of one-shot commands in the store, and back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from stored import add
from tiny import tiny_folder, tiny_model

from tinychat.base.errors import UsageError
from tinychat.base.events import Reading
from tinychat.chats.chat_store import ChatLockedError, ChatStore
from tinychat.chats.keeper import Keeper


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def listen(events):
    return [e for e in events][-1].completion


def test_a_resumed_session_has_the_same_tree_and_ids_and_goes_on(store, model):
    session = model.session("Be brief.", seed=1, max_tokens=6)
    keeper = Keeper(store, session)
    keeper.keep(session)
    assert store.chats() == []  # nothing was said yet
    listen(session.send("hi"))
    keeper.keep(session)
    listen(session.regenerate())
    keeper.keep(session)
    with pytest.raises(ChatLockedError):
        Keeper(store, model.session(), store.latest())
    keeper.close()

    again = model.session(seed=1, max_tokens=6)
    resumed = Keeper(store, again, store.latest())
    assert [vars(n) for n in again.nodes] == [vars(n) for n in session.nodes]
    assert (again.leaf, again.system) == (session.leaf, "Be brief.")
    assert listen(again.send("more")).token_ids == listen(session.send("more")).token_ids
    resumed.keep(again)
    assert len(store.messages(1)) == 5
    assert store.chat(1).messages == 5
    resumed.close()


def test_an_answer_that_goes_on_is_stored_as_it_grows(store, model, monkeypatch):
    monkeypatch.setattr("tinychat.chats.keeper.SAVE_SECONDS", 0.0)
    session = model.session(max_tokens=6, temperature=0)
    keeper = Keeper(store, session)
    first = [e.text for e in keeper.follow(session, session.send("hi"))]
    said, seen = "".join(first), []
    for event in keeper.follow(session, session.go_on()):
        said += event.text
        seen.append(store.messages(1)[1].content)
    assert seen[2].startswith("".join(first))
    assert len(seen[2]) > len("".join(first))
    keeper.close()
    question, answer = store.messages(1)
    node = session.nodes[session.leaf]
    assert (answer.content, answer.ids, answer.finish_reason) == (node.content, node.ids, node.finish_reason)
    assert said == answer.content
    assert len(answer.ids) == 12
    assert question.content == "hi"


def test_another_session_is_another_chat(store, model):
    first, second = model.session(max_tokens=2), model.session(max_tokens=2)
    keeper = Keeper(store, first)
    listen(first.send("one"))
    keeper.keep(first)
    listen(second.send("two"))
    keeper.keep(second)
    assert [c.title for c in store.chats()] == ["two", "one"]


def test_ids_of_another_model_are_not_taken_over(store, model):
    session = model.session(max_tokens=3)
    keeper = Keeper(store, session)
    listen(session.send("hi"))
    keeper.keep(session)
    keeper.close()
    store._database._db.execute("UPDATE messages SET model = 'other' WHERE role = 'assistant'")
    again = model.session()
    Keeper(store, again, store.latest()).close()
    assert again.nodes[1].content == session.nodes[1].content
    assert again.nodes[1].ids == again.nodes[1].prompt_ids == []


def test_one_answer_alone_is_not_kept_and_a_continued_chat_is(tmp_path, monkeypatch):
    model = str(tiny_folder(tmp_path / "tiny"))
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))

    def tinychat(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "tinychat", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        ).stdout

    short = ("--max-tokens", "4", "--temp", "0")
    tinychat("run", model, "hi", *short)
    assert json.loads(tinychat("chats", "--json")) == []
    tinychat("run", model, "hello", "-c", *short)
    tinychat("run", model, "more", "--resume", "1", *short)
    tinychat("run", "-c", "and then what?", *short)  # a single argument: the chat knows its model
    (chat,) = json.loads(tinychat("chats", "--json"))
    assert (chat["id"], chat["messages"], chat["title"]) == (1, 6, "hello")
    assert "hello" in tinychat("chats", "export", "1")
    assert [m.role for m in ChatStore(tmp_path / "chats.db").messages(1)] == ["user", "assistant"] * 3
    tinychat("chats", "rm", "1")
    assert json.loads(tinychat("chats", "--json", "hello")) == []


def test_the_chats_command_finds_exports_and_deletes(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from tinychat.cli.main import cli

    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    store = ChatStore(tmp_path / "chats.db")
    for text in ("glaciers and moraines", "a recipe", "rm"):
        chat = store.create("demo")
        add(store, chat.id, "user", text, None)

    def chats(*args):
        result = CliRunner().invoke(cli, ["chats", *args])
        return result.exit_code, result.output

    assert "recipe" in chats()[1]
    assert "recipe" not in chats("glaciers", "moraines")[1]
    assert chats("export", "1")[1].count("glaciers") >= 1
    assert json.loads(chats("export", "1", "--json")[1])["nodes"][0]["content"] == "glaciers and moraines"
    assert chats("rm")[0] == 2  # which one?
    code, said = chats("rm", "1", "99")
    assert code == 1 or "99" in said
    assert "glaciers" in chats()[1]  # all of them, or none
    assert json.loads(chats("rm", "1", "2", "--json")[1]) == {"deleted": [1, 2]}
    assert json.loads(chats("--json", "rm", "the", "recipe")[1]) == []  # words are a search


def test_a_question_whose_answer_fails_before_it_begins_gives_its_place_to_the_next(store, model):
    session = model.session(max_tokens=3)
    keeper = Keeper(store, session)
    listen(keeper.follow(session, session.send("one")))

    def fails(*_):
        yield Reading(1, 2, 1.0)  # by now the question is stored
        raise UsageError("Something is wrong.", "Ask again.")

    generate, session._generate = session._generate, fails
    with pytest.raises(UsageError):
        listen(keeper.follow(session, session.send("two")))
    session._generate = generate
    listen(keeper.follow(session, session.send("three")))
    keeper.close()
    assert [m.content for m in store.messages(1)] == [m.content for m in session.nodes]
    again = model.session(max_tokens=3)
    Keeper(store, again, store.latest()).close()
    assert again.messages == session.messages
