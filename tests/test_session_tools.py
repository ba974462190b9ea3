"""Tools in a conversation: calls and results in its tree, read once, kept, and taken back."""

from __future__ import annotations

import json
import sqlite3

import pytest
from agents import THINKING
from said import says
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.base.events import Done
from tinychat.chats import database
from tinychat.chats.chat_store import Chat, ChatStore
from tinychat.chats.export import markdown_of
from tinychat.chats.keeper import Keeper
from tinychat.chats.open_chat import OpenChat
from tinychat.conversation import Message, Tree
from tinychat.session import Session
from tinychat.text.known_text import KnownText

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
ODD = '<tool_call> {"arguments":{"a":2,"b":3},"name":"add"} </tool_call>'  # no template writes it so
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=4096, backend="cpu", context_length=4096, template=THINKS) as m:
        yield m


def done(events) -> Done:
    *_, last = events
    assert isinstance(last, Done)
    return last


def prompt_ids(session: Session) -> list[int]:
    return [i for _, ids in session._prompt(session.path(session.tree.question), True) for i in ids]


@pytest.mark.parametrize("spelled", [CALL, ODD, f"I add.\n{CALL}", f"<think>\nhm\n</think>\n\n{CALL}{CALL}"])
def test_the_model_reads_what_chat_would_have_it_read_and_only_what_is_new(model, monkeypatch, spelled):
    says(monkeypatch, model, spelled, "Five.", "Bye.", spelled, "Five.", "Bye.")
    session = model.session("Be brief.", temperature=0)
    first = done(session.send("2 + 3?", tools=[add]))
    assert first.finish_reason == "tool_calls"
    results = ["5", "five"][: len(first.completion.tool_calls)]
    second = done(session.send_results(results))
    third = done(session.send("Thanks."))
    assert (second.completion.text, third.completion.text) == ("Five.", "Bye.")
    # All but what the template adds, and the results, is in the cache: nothing is read twice.
    added = len("<|>\n<|>tool\n<|>\n<|>assistant\n") + 40
    for before, after in ((first, second), (second, third)):
        held = before.stats.prompt_tokens + before.stats.generated_tokens
        assert after.stats.cached_tokens >= held - 1
        assert after.stats.prompt_tokens - held <= added + sum(map(len, results))
    ids = prompt_ids(session)
    # The same conversation, asked for as a whole by somebody who keeps it.
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    answer = model.chat(messages, tools=[add], temperature=0)
    messages.append(answer.message())
    for call, text in zip(answer.tool_calls, results, strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    messages.append(model.chat(messages, tools=[add], temperature=0).message())
    messages.append({"role": "user", "content": "Thanks."})
    assert ids == model.request(messages, tools=[add]).prompt(model)


@pytest.fixture(scope="module")
def thinking():
    with tiny_model(ctx=16384, backend="cpu", context_length=16384, template=THINKING) as m:
        yield m


@pytest.mark.parametrize(
    "spelled", [CALL, ODD, f"<think>\nhm\n</think>\n\n{CALL}", f"<think>\nhm {CALL}\n</think>"]
)
def test_a_template_that_drops_old_thoughts_is_read_as_chat_has_it(thinking, monkeypatch, spelled):
    says(monkeypatch, thinking, *([spelled, spelled, "Five.", "Bye."] * 2))
    thinking.known = KnownText()  # how another test spelled the same call
    session = thinking.session(temperature=0)
    first = done(session.send("2 + 3?", tools=[add]))
    second = done(session.send_results(["5"]))
    assert second.stats.cached_tokens >= first.stats.prompt_tokens + first.stats.generated_tokens - 1
    done(session.send_results(["5 again"]))
    answered = prompt_ids(session)
    done(session.send("Thanks."))
    messages = [{"role": "user", "content": "2 + 3?"}]
    for result in ("5", "5 again"):
        answer = thinking.chat(messages, tools=[add], temperature=0)
        called = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": result}
        messages += [answer.message(), called]
    assert answered == thinking.request(messages, tools=[add]).prompt(thinking)
    messages.append(thinking.chat(messages, tools=[add], temperature=0).message())
    messages.append({"role": "user", "content": "Thanks."})
    assert prompt_ids(session) == thinking.request(messages, tools=[add]).prompt(thinking)


def test_of_thirty_rounds_only_what_is_new_is_read(thinking, monkeypatch):
    says(
        monkeypatch,
        thinking,
        *[f"<think>\n{i}\n</think>\n\n{ODD if i % 2 else CALL}" for i in range(30)],
        "Done.",
    )
    session = thinking.session("x" * 100, temperature=0)
    last = done(session.send("Go.", tools=[add]))
    for i in range(30):
        held = last.stats.prompt_tokens + last.stats.generated_tokens
        last = done(session.send_results([f"result {i}"]))
        assert last.stats.cached_tokens >= held - 1
    assert last.completion.text == "Done."
    assert len(session.path()) == 62


def test_calls_are_no_part_of_the_content_and_results_are_messages(model, monkeypatch):
    says(monkeypatch, model, f"I add.\n{CALL}", "Five.")
    session = model.session(temperature=0)
    *events, last = session.send("2 + 3?", tools=[add])
    assert "".join(e.kept for e in events if hasattr(e, "kept")) == "I add."
    done(session.send_results({last.completion.tool_calls[0].id: "5"}))
    question, asked, result, answer = session.messages
    assert (asked["content"], result["content"], answer["content"]) == ("I add.", "5", "Five.")
    (call,) = asked["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 2, "b": 3}
    assert (result["role"], result["tool_call_id"]) == ("tool", call["id"])
    assert session.nodes[1].written == f"I add.\n{CALL}"
    assert session.tree.called(2) == call
    assert "tools" not in question


def test_branches_regenerate_and_edit(model, monkeypatch):
    says(monkeypatch, model, CALL, "Five.", "5!", "Hello.", "Again.")
    session = model.session(temperature=0)
    done(session.send("2 + 3?", tools=[add]))
    done(session.send_results(["5"]))
    assert done(session.regenerate()).completion.text == "5!"  # of the result, not of the question
    assert session.siblings(3) == [3, 4]
    done(session.edit(0, "Hi"))
    assert [m["content"] for m in session.messages] == ["Hi", "Hello."]
    session.switch(1)
    assert session.messages[-1]["content"] == "5!"
    with pytest.raises(UsageError, match="No call waits"):
        session.send_results(["5"])
    session.tools = []
    assert done(session.send("And?")).completion.text == "Again."


def test_results_that_fit_no_call_are_refused(model, monkeypatch):
    says(monkeypatch, model, f"{CALL}{CALL}")
    session = model.session(temperature=0)
    with pytest.raises(UsageError, match="No call waits"):
        session.send_results([])
    done(session.send("2 + 3?", tools=[add]))
    for wrong in ([], ["5"], {"x": "5"}, "55", [5, 5]):
        with pytest.raises(UsageError):
            session.send_results(wrong)
    with pytest.raises(UsageError):
        session.send("?", tools=[3])
    assert len(session.nodes) == 2


def test_a_conversation_with_calls_is_saved_and_goes_on_without_reading_it_again(
    model, monkeypatch, tmp_path
):
    says(monkeypatch, model, ODD, "Five.", "Bye.")
    session = model.session(temperature=0)
    done(session.send("2 + 3?", tools=[add]))
    second = done(session.send_results(["5"]))
    session.save(tmp_path / "chat.json")
    again = Session.load(tmp_path / "chat.json", model)
    assert again.messages == session.messages
    again.tools = [add]
    last = done(again.send("Thanks."))
    assert last.stats.cached_tokens >= second.stats.prompt_tokens + second.stats.generated_tokens - 1


def test_an_answer_that_is_left_in_its_call_keeps_the_words(model, monkeypatch):
    says(monkeypatch, model, f"I add.\n{CALL} and on", "x")
    session = model.session(temperature=0)
    events = session.send("2 + 3?", tools=[add])
    for event in events:
        if "arguments" in getattr(event, "written", ""):
            break
    events.close()
    node = session.nodes[1]
    assert (node.finish_reason, node.tool_calls, node.written) == ("cancelled", [], "")
    assert node.content == f"I add.\n{CALL}"
    assert model.tokenizer.decode(node.ids) == node.content


def test_the_store_keeps_calls_and_results(model, monkeypatch, tmp_path):
    says(monkeypatch, model, f"<think>\nhm\n</think>\n\n{CALL}", "Five.", "Bye.")
    store = ChatStore(tmp_path / "chats.db")
    session = model.session(temperature=0)
    keeper = Keeper(store, session)
    done(keeper.follow(session, session.send("2 + 3?", tools=[add])))
    second = done(keeper.follow(session, session.send_results(["5 ```"])))
    number, before = keeper.held.chat.id, session.messages
    keeper.close()
    chat, tree, _ = store.tree(number)
    text = markdown_of(chat, tree)
    assert "<summary>Call of add</summary>" in text
    assert "````\n5 ```\n````" in text
    other = model.session(temperature=0)
    Keeper(store, other, Chat(number, "", model.name))
    assert other.messages == before
    other.tools = [add]
    last = done(other.send("Thanks."))
    assert last.stats.cached_tokens >= second.stats.prompt_tokens + second.stats.generated_tokens - 1


def test_a_store_of_before_there_were_calls_opens_and_takes_them(tmp_path):
    db = sqlite3.connect(tmp_path / "chats.db")
    for statement in (s for statements in database.MIGRATIONS[:3] for s in statements):
        db.execute(statement)
    db.execute(
        "INSERT INTO chats (id, title, model, params, created, updated) VALUES (1, 'a', 'm', '{}', 1, 1)"
    )
    db.execute("INSERT INTO messages (chat, role, content, created) VALUES (1, 'user', 'a', 1)")
    db.execute("PRAGMA user_version = 3")
    db.commit()
    db.close()
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    store = ChatStore(tmp_path / "chats.db")
    held = OpenChat(store, store.chat(1))
    held.add(Message("assistant", "b", 0, tool_calls=[call], written="b<call>", finish_reason="tool_calls"))
    held.add(Message("tool", "c", 1, tool_call_id="x"))
    held.close()
    assert not held.problem
    _, tree, _ = store.tree(1)
    assert [(m.role, m.content) for m in tree.nodes] == [("user", "a"), ("assistant", "b"), ("tool", "c")]
    assert (tree.nodes[1].tool_calls, tree.nodes[1].written) == ([call], "b<call>")
    assert tree.called(2) == call
    assert tree.nodes[0].tool_calls == []


def test_another_model_reads_the_words_of_a_call_and_not_how_it_was_spelled():
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    m = Message("assistant", "I add.", 0, "<a>", [1], [2], "tool_calls", tool_calls=[call], written="I add.?")
    known = m.for_model("other")
    assert (known.content, known.tool_calls, known.written, known.ids) == ("I add.", [call], "", [])
    assert Message.from_dict(m.as_dict()) == m


@pytest.mark.parametrize("calls", [
    [{}], [3], [{"id": "a"}], [{"id": "a", "function": {"name": "b", "arguments": "["}}],
    [{"id": 3, "function": {"name": "b", "arguments": "{}"}}], [{"name": "b", "arguments": "{}", "id": "a"}],
])  # fmt: skip
def test_calls_from_a_file_that_make_no_sense_are_refused_or_mended(calls):
    given = Message("assistant", "x").as_dict() | {"tool_calls": calls}
    with pytest.raises(ValueError, match="tool_calls"):
        Message.from_dict(given)
    assert Message.mended(given).tool_calls == []


def test_what_leads_where():
    tree = Tree([Message("user", "a"), Message("assistant", "", 0), Message("tool", "b", 1)], 2)
    assert (tree.question, tree.asked(2), tree.asked(None)) == (2, 0, None)
    assert (Tree().question, tree.called(2), tree.unanswered()) == (None, None, [])
