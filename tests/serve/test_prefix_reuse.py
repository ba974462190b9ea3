"""A conversation that comes back is not read again: in memory, out of memory, after a restart."""

from __future__ import annotations

import json
import os

import pytest
from said import says
from serving import serving
from tiny import tiny_model

from tinychat.engine import shelf as module
from tinychat.serve.limits import Limits

SYSTEM = {"role": "system", "content": "Tools: " + "a tool that does something; " * 20}


def make(**more):
    return tiny_model(ctx=4096, backend="cpu", eos_ids=(), context_length=4096, **more)


def turns(server, messages, n, first=0, temperature=1.2):
    """n turns of an agent; what each had to read, and what was new in it."""
    out = []
    for i in range(first, first + n):
        messages.append({"role": "user", "content": f"Result {i}: {'x' * (i % 7)}"})
        status, said, _ = server.ask(
            "/v1/chat/completions",
            {"messages": messages, "max_tokens": 12, "temperature": temperature, "seed": i},
        )
        assert status == 200, said
        used = said["usage"]
        read = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
        messages.append(said["choices"][0]["message"])
        out.append((read, used["prompt_tokens"]))
        server.made = used["completion_tokens"]
    return out


def test_thirty_turns_read_only_what_is_new():
    """At this temperature a tiny model writes bytes that are no characters. The ids that it wrote are known
    all the same, for its text is what came back.
    """
    with make() as model, serving(model) as server:
        messages = [SYSTEM]
        ((first, had),) = turns(server, messages, 1)
        assert first == had > 500
        for i in range(1, 30):
            had += server.made - 1  # the last token was chosen and not read, unless another ended the answer
            ((read, total),) = turns(server, messages, 1, first=i)
            assert total - had - 1 <= read <= total - had < 48
            had = total


def test_turns_of_tool_calls_read_only_what_is_new(tmp_path, monkeypatch):
    """Calls as a model writes them, in another order and with other spaces than the template would; their ids
    are known when they come back as JSON, also after a restart.
    """
    tool = {"type": "function", "function": {"name": "look", "description": "Looks at a place. " * 20}}
    calls = [
        f'I look.\n<tool_call>\n{{"arguments":{{"b":  {i}, "a": "é"}} , "name": "look"}}\n</tool_call>'
        for i in range(10)
    ]
    messages, had = [SYSTEM, {"role": "user", "content": "Look around."}], 0
    for part in (calls[:6], calls[6:]):
        with make() as model, serving(model, folder=tmp_path) as server:
            says(monkeypatch, model, *part)
            for _ in part:
                status, said, _ = server.ask("/v1/chat/completions", {"messages": messages, "tools": [tool]})
                message, used = said["choices"][0]["message"], said["usage"]
                assert (status, said["choices"][0]["finish_reason"]) == (200, "tool_calls")
                read = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
                assert read <= used["prompt_tokens"] - had
                assert read < 100 or not had
                had = used["prompt_tokens"] + used["completion_tokens"] - 1
                result = {
                    "role": "tool",
                    "tool_call_id": message["tool_calls"][0]["id"],
                    "content": "Nothing.",
                }
                messages += [message, result]


def test_several_conversations_keep_their_own():
    with make() as model, serving(model) as server:
        chats = [[{"role": "system", "content": f"{i} {SYSTEM['content']}"}] for i in range(3)]
        for messages in chats:
            turns(server, messages, 1)
        for i in range(1, 5):
            for messages in chats:
                ((read, _),) = turns(server, messages, 1, first=i)
                assert read < 64


def test_a_regenerated_answer_finds_the_question_again():
    with make() as model, serving(model) as server:
        messages = [SYSTEM]
        turns(server, messages, 3)
        messages = messages[:-2]
        ((read, _),) = turns(server, messages, 1, first=9)
        assert read < 64


def test_a_conversation_is_found_after_a_restart(tmp_path):
    messages = [SYSTEM]
    with make() as model, serving(model, folder=tmp_path) as server:
        turns(server, messages, 4)
    assert len(list(tmp_path.glob("served-*.safetensors"))) == 1
    with make() as model, serving(model, folder=tmp_path) as server:
        ((read, total),) = turns(server, messages, 1, first=4)
        assert read < 64 < total
        ((again, _),) = turns(server, messages, 1, first=5)
        assert again < 64
    assert len(list(tmp_path.glob("served-*.safetensors"))) == 1  # the longer one stands for both


def test_the_answer_after_a_restart_is_what_it_would_have_been(tmp_path):
    said = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        messages = [SYSTEM]
        with make() as model, serving(model, folder=folder) as server:
            turns(server, messages, 3)
            if folder.name == "b":
                turns(server, messages, 2, first=3)
        if folder.name == "a":
            with make() as model, serving(model, folder=folder) as server:
                turns(server, messages, 2, first=3)
        said.append(messages)
    assert said[0] == said[1]


def test_what_makes_way_is_found_on_disk(tmp_path):
    """The pools stay as they are for one full context, and three conversations take more."""
    small = dict(ctx=512, backend="cpu", eos_ids=(), context_length=512, grows=False)
    with tiny_model(**small) as model, serving(model, folder=tmp_path) as server:
        chats = [[{"role": "system", "content": f"{i} {'word ' * 50}"}] for i in range(3)]
        for messages in chats:
            turns(server, messages, 1)
        server.until(lambda: not model.shelf._pending)
        assert list(tmp_path.glob("served-*.safetensors"))
        ((read, total),) = turns(server, chats[0], 1, first=1)
        assert read < 64 < total


@pytest.mark.parametrize("damage", ["cut", "notes", "bits", "pipe"])
def test_damaged_files_are_no_answer(tmp_path, damage):
    messages = [SYSTEM]
    with make() as model, serving(model, folder=tmp_path) as server:
        turns(server, messages, 2)
    (path,) = tmp_path.glob("served-*.safetensors")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "notes":
        n = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + n])
        header["__metadata__"]["notes"] = '[["zz", 5, 1e9, [-1]]]'
        head = json.dumps(header).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + n :])
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(content[:-9] + bytes(b ^ 1 for b in content[-9:-1]) + content[-1:])
    with make() as model, serving(model, folder=tmp_path) as server:
        ((read, total),) = turns(server, list(messages), 1, first=2)
        assert read == total


def test_nothing_is_kept_on_disk_without_a_budget(tmp_path):
    with make() as model:
        model.kv_disk_budget = 0
        with serving(model, folder=tmp_path) as server:
            turns(server, [SYSTEM], 1)
    assert not list(tmp_path.iterdir())


def test_few_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILES", 2)
    with make() as model, serving(model, folder=tmp_path) as server:
        for i in range(4):
            turns(server, [{"role": "system", "content": f"{i} {SYSTEM['content']}"}], 1)
        model.shelf.save()
        assert len(list(tmp_path.iterdir())) == len(model.shelf._files) == 2
        chat = [{"role": "system", "content": f"3 {SYSTEM['content']}"}]
    with make() as model, serving(model, folder=tmp_path) as server:
        ((read, total),) = turns(server, chat, 1)
        assert read < 64 < total  # the last ones stayed


def test_few_branches_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    with make() as model, serving(model, limits=Limits(parallel=1), folder=tmp_path) as server:
        model.shelf._most = 2
        for i in range(4):
            turns(server, [{"role": "system", "content": f"{i} {SYSTEM['content']}"}], 1)
        assert len(model.shelf._kept) == 2
    assert len(list(tmp_path.glob("served-*.safetensors"))) == 4
