"""Agents with long system prompts and tools: from the second turn on a server reads only what is new, with
every kind of memory, also after a restart, and where memory holds less than is asked for.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import pytest
from agents import THINKING, Agent, Turn, Watch, call, tools, words
from recurrent import delta_model, recurrent_model
from said import says
from serving import Served, serving
from tiny import tiny_model

from tinychat.backends.interface import BLOCK
from tinychat.network.config import RopeConfig

WINDOWED = dict(window=48, windowed_layers=(0,), local_rope=RopeConfig(dim=16, theta=500.0))
MAKES = {
    "full": tiny_model,
    "window": lambda **more: tiny_model(**WINDOWED, **more),
    "state": recurrent_model,
    "delta": delta_model,
}
SLOW = pytest.mark.slow
FEW = ["window", "delta", pytest.param("full", marks=SLOW), pytest.param("state", marks=SLOW)]
THOUGHT = "The user wants to know what is in the files, so I look at the next one. "


def make(kind: str, ctx: int, **more):
    more = {"backend": "cpu", "eos_ids": (), **more} if kind in ("full", "window") else more
    return MAKES[kind](ctx=ctx, context_length=ctx, template=THINKING, **more)


def raw(server: Served):
    """How an agent without a client library asks."""

    def send(path, body):
        status, said, _ = server.ask(f"/v1/{path}", body)
        assert status == 200, said
        return said

    return send


@contextmanager
def clients(server: Served):
    """The official clients."""
    from anthropic import Anthropic
    from openai import OpenAI

    options = {"api_key": "none", "max_retries": 0}
    root = server.url.removesuffix("/v1")
    with OpenAI(base_url=server.url, **options) as openai, Anthropic(base_url=root, **options) as anthropic:

        def send(path, body):
            ask = openai.chat.completions if path == "chat/completions" else anthropic.messages
            return ask.create(**body).model_dump()

        yield send


def check(turns: list[Turn], before: Turn | None = None, slack: int = 1) -> None:
    """Each reads what came behind the prompt and the answer before it; `slack` tokens more at most."""
    for last, turn in zip([before, *turns], turns, strict=False):
        assert turn.read == turn.computed
        if last is not None:
            had = last.prompt + last.made - 1  # the token that ends an answer is not read
            assert turn.known >= had
            assert turn.read <= turn.prompt - had - 1 + slack


def session(monkeypatch, tmp_path, kind, speaks, system, n, official=False, thought="", thinks=True):
    """n turns of an agent with a restart in the middle; what each took. thinks: as of an `Agent`."""
    watch, made = Watch(monkeypatch), []
    agent = Agent(None, speaks, words(system), tools(max(1, system // 1000)), thinks)
    agent.ask("What is in the project?")
    for part in (range(n - n // 2), range(n - n // 2, n)):
        with make(kind, 1 << 15) as model, serving(model, folder=tmp_path) as server:
            says(monkeypatch, model, *(call(i, thought) for i in part))
            watch.at(model)
            with clients(server) if official else _same(raw(server)) as agent.send:
                made += [watch.turn(agent) for _ in part]
    return made


@contextmanager
def _same(value):
    yield value


@pytest.mark.parametrize(
    ("kind", "speaks", "thought"),
    [
        ("full", "openai", THOUGHT),
        ("window", "anthropic", ""),
        ("state", "openai", ""),
        ("delta", "anthropic", THOUGHT),
    ],
    ids=["full", "window", "state", "delta"],
)
def test_turns_of_an_agent_read_only_what_is_new(monkeypatch, tmp_path, kind, speaks, thought):
    turns = session(monkeypatch, tmp_path, kind, speaks, 600, 5, thought=thought)
    assert turns[0].read == turns[0].prompt > 600
    check(turns)


@pytest.mark.parametrize(("kind", "speaks"), [("window", "openai"), ("delta", "anthropic")])
def test_an_agent_that_drops_thoughts_between_its_calls_has_the_last_call_read_again(
    monkeypatch, tmp_path, kind, speaks
):
    turns = session(monkeypatch, tmp_path, kind, speaks, 600, 4, thought=THOUGHT, thinks=False)
    for last, turn in pairwise(turns):
        assert turn.known >= last.prompt
        assert turn.read == turn.computed <= turn.prompt - last.prompt + 2 * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("speaks", ["openai", "anthropic"])
@pytest.mark.parametrize("thought", [THOUGHT, ""], ids=["thinks", "plain"])
@pytest.mark.parametrize("kind", sorted(MAKES))
def test_thirty_turns_on_ten_thousand_tokens(monkeypatch, tmp_path, kind, speaks, thought):
    """With the official clients; -s shows the figures."""
    turns = session(monkeypatch, tmp_path, kind, speaks, 10_000, 30, official=True, thought=thought)
    assert turns[0].read == turns[0].prompt > 10_000
    check(turns)
    read, total = sum(t.read for t in turns[1:]), sum(t.prompt for t in turns[1:])
    print(f"{kind} {speaks}: {turns[0].read} tokens, then {read} of {total} in {len(turns) - 1} turns")


@pytest.mark.parametrize("kind", FEW)
def test_two_agents_share_memory_for_one_and_a_half(monkeypatch, tmp_path, kind):
    """What makes way is written to disk and read back, not computed again."""
    ctx, watch = 2048, Watch(monkeypatch)
    agents = [Agent(None, "openai", words(1000)[i:], tools(1)) for i in range(2)]
    made = [[], []]
    with make(kind, ctx, grows=False) as model, serving(model, folder=tmp_path) as server:
        says(monkeypatch, model, *(call(i // 2) for i in range(8)))
        watch.at(model)
        for agent in agents:
            agent.send = raw(server)
            agent.ask("What is in the project?")
        for _ in range(4):
            for agent, turns in zip(agents, made, strict=True):
                turns.append(watch.turn(agent))
                server.until(lambda: not model.shelf._pending)
        assert list(tmp_path.glob("served-*.safetensors"))
        for turns in made:
            assert 2 * (turns[-1].prompt + turns[-1].made) > 1.3 * ctx
            check(turns)


def question(agent: Agent, watch: Watch, monkeypatch, model, text: str, written: str) -> Turn:
    """A turn in which nothing is called; the answer is added as the client got it."""
    says(monkeypatch, model, written)
    agent.ask(text)
    system = {"role": "system", "content": agent.system}
    watch.computed = 0
    said = agent.send("chat/completions", {"messages": [system, *agent.messages], "max_tokens": 900})
    message, used = said["choices"][0]["message"], said["usage"]
    assert message["reasoning_content"]
    agent.messages.append({"role": "assistant", "content": message["content"]})
    read = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
    return Turn(used["prompt_tokens"], used["completion_tokens"], read, watch.computed, watch.known)


@pytest.mark.parametrize("kind", FEW)
def test_a_thought_that_the_client_drops_costs_the_answer_behind_it(monkeypatch, tmp_path, kind):
    """What was read before the thought is known, also after a restart; a snapshot of a window or a state lies
    up to two blocks before. The prompts are those of our own chat, whose template strips thoughts.
    """
    watch, before = Watch(monkeypatch), None
    agent = Agent(None, "openai", words(600), [])
    texts = ["What?", "And then, what else is there?", "Why is that so?", "Who says that?"]
    for part in (texts[:2], texts[2:]):
        with make(kind, 4096) as model, serving(model, folder=tmp_path) as server:
            agent.send = raw(server)
            watch.at(model)
            for text in part:
                answer = f"It is {text} " * 3
                turn = question(
                    agent, watch, monkeypatch, model, text, f"<think>\n{THOUGHT}\n</think>\n\n{answer}"
                )
                if before is not None:
                    assert turn.known >= before.prompt
                    assert turn.read == turn.computed
                    assert turn.read <= turn.prompt - turn.known + 2 * BLOCK
                before = turn
            own = model.session(system=agent.system)
            for i, text in enumerate(texts[: len(agent.messages) // 2]):
                says(
                    monkeypatch,
                    model,
                    f"<think>\n{THOUGHT}\n</think>\n\n{agent.messages[2 * i + 1]['content']}",
                )
                *_, done = own.send(text, max_tokens=900)
            assert done.stats.prompt_tokens == before.prompt
