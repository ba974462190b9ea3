"""/v1/chat/completions by the official client and by hand."""

from __future__ import annotations

import asyncio
import importlib.util
import json

import numpy as np
import pytest
from said import says
from serving import events_of, serving
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.engine.sampling import log_softmax

HELLO = [{"role": "user", "content": "Hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
needs_client = pytest.mark.skipif(not importlib.util.find_spec("openai"), reason="needs openai")


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=2048, backend="cpu", eos_ids=(), context_length=2048) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as c:
        yield c


def test_an_answer_is_what_the_model_says_itself(server, model):
    here = model.chat(HELLO, temperature=0, max_tokens=12)
    status, said, _ = server.chat(temperature=0, max_tokens=12)
    choice = said["choices"][0]
    assert status == 200
    assert said["object"] == "chat.completion"
    assert said["model"] == "tiny"
    assert choice["message"] == {"role": "assistant", "content": here.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    used = said["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (here.stats.prompt_tokens, 12)
    assert used["total_tokens"] == here.stats.prompt_tokens + 12
    assert used["completion_tokens_details"] == {"reasoning_tokens": 0}


@needs_client
def test_the_official_client_gets_whole_answers(client, model):
    here = model.chat(HELLO, temperature=1, seed=5, max_tokens=12)
    said = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=1, seed=5, max_completion_tokens=12
    )
    assert said.choices[0].message.content == here.text
    assert said.usage.completion_tokens == 12


@needs_client
def test_the_official_client_gets_streams(client, model):
    here = model.chat(HELLO, temperature=1, seed=6, max_tokens=12)
    asked = {"model": "tiny", "messages": HELLO, "temperature": 1, "seed": 6, "max_tokens": 12}
    first, *chunks = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert first.choices[0].delta.role == "assistant"
    *said, finish, last = chunks
    assert "".join(c.choices[0].delta.content for c in said) == here.text
    assert finish.choices[0].finish_reason == "length"
    assert not last.choices
    assert last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens_details.cached_tokens == 16  # the whole block that the first run left
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert all(c.usage is None for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


@needs_client
def test_the_asynchronous_client_is_answered_beside_others(server, model):
    from openai import AsyncOpenAI

    here = [model.chat(HELLO, temperature=1, seed=i, max_tokens=8).text for i in range(4)]

    async def ask(client, i):
        asked = {"model": "tiny", "messages": HELLO, "temperature": 1, "seed": i, "max_tokens": 8}
        if i % 2:
            return (await client.chat.completions.create(**asked)).choices[0].message.content
        stream = await client.chat.completions.create(**asked, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them():
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(4)))

    assert asyncio.run(all_of_them()) == here


@needs_client
def test_the_official_client_raises_its_own_errors(client):
    import openai

    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert e.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 2500}])
    assert e.value.code == "context_length_exceeded"
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_choices_differ_by_their_seed_and_the_prompt_is_read_once(server, model):
    here = [model.chat("Choices.", temperature=1, seed=7 + i, max_tokens=8).text for i in range(3)]
    _, said, _ = server.chat("Choices.", temperature=1, seed=7, max_tokens=8, n=3)
    assert [c["message"]["content"] for c in said["choices"]] == here
    assert said["usage"]["completion_tokens"] == 24
    _, content, _ = server.chat("Choices.", temperature=1, seed=7, max_tokens=8, n=3, stream=True)
    *chunks, done = events_of(content)
    texts = ["", "", ""]
    for choice in (c["choices"][0] for c in chunks):
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == here
    assert done == "[DONE]"


def test_a_stop_string_ends_an_answer(server, model):
    whole = model.chat(HELLO, temperature=0, max_tokens=30).text
    stop = next(c for c in whole if c.isascii())
    _, said, _ = server.chat(temperature=0, max_tokens=30, stop=[stop])
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["choices"][0]["message"]["content"] == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello."}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "tools": [TOOL], "tool_choice": "other"}, "tool_choice"),
        ({"messages": HELLO, "tools": [TOOL], "parallel_tool_calls": 3}, "parallel_tool_calls"),
        ({"messages": HELLO, "max_tokens": "many"}, "max_tokens"),
        ({"messages": HELLO, "top_p": 2}, "top_p"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "n": 1000}, "n"),
        ({"messages": HELLO, "stream": "yes"}, "stream"),
        ({"messages": HELLO, "stream_options": []}, "stream_options"),
        ({"messages": HELLO, "model": 3}, "model"),
        ({"messages": HELLO, "logit_bias": {"3": 101}}, "logit_bias"),
        ({"messages": HELLO, "logit_bias": [3]}, "logit_bias"),
        ({"messages": HELLO, "presence_penalty": 3}, "presence_penalty"),
        ({"messages": HELLO, "frequency_penalty": "x"}, "frequency_penalty"),
        ({"messages": HELLO, "stop": [""]}, "stop"),
    ],
)
def test_what_is_wrong_is_named(server, body, param):
    status, said, _ = server.ask("/v1/chat/completions", body)
    assert status == 400
    assert said["error"]["param"] == param
    assert said["error"]["message"]
    assert said["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"messages": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(server, body):
    status, said, _ = server.ask("/v1/chat/completions", body)
    assert status == 400
    assert said["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"])
def test_half_a_character_and_infinity_are_errors_in_words(server, path):
    body = b'{"messages": [{"role": "user", "content": "x"}], "input": "x", "max_tokens": 1, "content": "x", '
    status, said, _ = server.ask(path, body + b'"model": "\\ud800"}')
    assert (status, "? is not served" in json.dumps(said)) == (404, True)
    for number in (b"1e999", b"-1e999"):
        status, said, _ = server.ask(path, body + b'"metadata": {"a": ' + number + b"}}")
        assert (status, "too large a number" in json.dumps(said)) == (400, True)


def nested(n):
    return "[" * n + "]" * n


@pytest.mark.parametrize("n", [101, 400, 900])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", '{"messages": [{"role": "user", "content": "x"}], "tools": ['
         '{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": %s}}}}]}'),
        ("chat/completions", '{"messages": [{"role": "user", "content": "x", "more": %s}]}'),
        ("chat/completions", '{"messages": [{"role": "assistant", "tool_calls": ['
         '{"id": "a", "function": {"name": "f", "arguments": {"a": %s}}}]}]}'),
        ("messages", '{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "tools": ['
         '{"name": "f", "input_schema": {"type": "object", "properties": {"a": %s}}}]}'),
        ("messages", '{"max_tokens": 1, "messages": [{"role": "assistant", "content": [{"type": "tool_use",'
         '"id": "a", "name": "f", "input": {"a": %s}}]}, {"role": "user", "content": "x"}]}'),
        ("responses", '{"input": "x", "tools": ['
         '{"type": "function", "name": "f", "parameters": {"a": %s}}]}'),
    ],
)  # fmt: skip
def test_what_is_too_deep_is_the_client_s_mistake(server, path, body, n):
    status, said, _ = server.ask(f"/v1/{path}", (body % nested(n)).encode())
    assert (status, "deep" in json.dumps(said) or "no JSON object" in json.dumps(said)) == (400, True)


def test_unknown_fields_and_nulls_are_passed_over(server):
    status, _, _ = server.chat(
        max_tokens=1, user="me", metadata={"a": [1]}, stop=None, n=None, tools=[], store=True
    )
    assert status == 200
    assert server.chat(max_tokens=1, seed=-1, presence_penalty=0.0)[0] == 200


def test_unknown_paths_and_methods_have_the_error_object_too(server):
    assert server.ask("/v1/nothing")[:1] == (404,)
    status, said, headers = server.ask("/v1/chat/completions")
    assert status == 405
    assert said["error"]["type"] == "invalid_request_error"
    assert "POST" in headers["allow"]
    assert server.ask("/v1/models/none")[1]["error"]["code"] == "model_not_found"


def test_penalties_and_biases_are_those_of_python(server, model):
    options = {"temperature": 0, "max_tokens": 20, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    free = model.chat(HELLO, temperature=0, max_tokens=20)
    _, said, _ = server.chat(**options, logit_bias={"65": -100})
    here = model.chat(HELLO, **options, logit_bias={65: -100})
    assert said["choices"][0]["message"]["content"] == here.text != free.text
    first = free.token_ids[0]
    token = model.tokenizer.token_bytes(first).decode("utf-8", "replace")
    chat, text = {"messages": HELLO, "logprobs": True}, {"prompt": "Once", "logprobs": 1}
    for path, body in (("chat/completions", chat), ("completions", text)):
        body |= {"temperature": 0, "max_tokens": 3}
        odds = server.ask(f"/v1/{path}", body | {"logit_bias": {str(first): 100}})[1]["choices"][0][
            "logprobs"
        ]
        assert (odds["tokens"] if "tokens" in odds else [t["token"] for t in odds["content"]]) == [token] * 3
        status, said, _ = server.ask(f"/v1/{path}", body | {"logit_bias": {"300000": 1}})
        assert (status, "names the token 300000" in said["error"]["message"]) == (400, True)


def test_texts_are_continued(server, model):
    from tinychat.base.events import Done

    *_, done = model.generate("Once", temperature=0, max_tokens=9)
    assert isinstance(done, Done)
    asked = {"prompt": ["Once", "Twice"], "temperature": 0, "max_tokens": 9}
    _, said, _ = server.ask("/v1/completions", asked)
    assert said["choices"][0]["text"] == done.completion.text
    assert len(said["choices"]) == 2
    assert said["usage"]["completion_tokens"] == 18
    assert said["usage"]["prompt_tokens"] == len("OnceTwice")
    ids = model.tokenizer.encode("Once")
    _, content, _ = server.ask("/v1/completions", {**asked, "prompt": ids, "stream": True})
    *chunks, end = events_of(content)
    assert "".join(c["choices"][0]["text"] for c in chunks) == done.completion.text
    assert end == "[DONE]"
    for wrong in ([], [[]], {"a": 1}, [1, "a"], 3):
        assert server.ask("/v1/completions", {"prompt": wrong})[1]["error"]["param"] == "prompt"
    assert server.ask("/v1/completions", {"prompt": [999]})[0] == 400


def test_texts_become_ids_and_ids_texts(server, model):
    _, said, _ = server.ask("/tokenize", {"content": "Hello <|im_end|>"})
    assert said["tokens"] == model.tokenizer.encode("Hello <|im_end|>")
    assert said["count"] == len(said["tokens"])
    assert server.ask("/detokenize", {"tokens": said["tokens"]})[1]["content"] == "Hello <|im_end|>"
    _, chat, _ = server.ask("/tokenize", {"messages": HELLO})
    assert chat["count"] == model.chat(HELLO, max_tokens=1).stats.prompt_tokens
    assert server.ask("/detokenize", {"tokens": [1 << 40]})[1]["error"]["param"] == "tokens"
    assert server.ask("/tokenize", {"content": 1})[1]["error"]["param"] == "content"


def test_counts_are_told(server):
    server.chat(max_tokens=3)
    server.until(server.idle)
    status, content, headers = server.ask("/metrics")
    text = content.decode()
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert 'tinychat_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "\ntinychat_running 0\n" in text
    assert "\ntinychat_models_loaded 1\n" in text
    assert server.ask("/health")[1]["status"] == "ok"
    prometheus = pytest.importorskip("prometheus_client.parser")
    names = {family.name for family in prometheus.text_string_to_metric_families(text)}
    assert {"tinychat_generated_tokens", "tinychat_first_token_seconds"} <= names


def test_a_conversation_may_have_parts_and_a_developer(server, model):
    here = model.chat([{"role": "system", "content": "Be brief."}, *HELLO], temperature=0, max_tokens=5)
    parts = [{"role": "developer", "content": "Be brief."}]
    parts += [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]
    _, said, _ = server.ask("/v1/chat/completions", {"messages": parts, "temperature": 0, "max_tokens": 5})
    assert said["choices"][0]["message"]["content"] == here.text


@needs_client
def test_tools_are_called_by_the_official_client(client, model, monkeypatch):
    says(monkeypatch, model, f"I add.\n{CALL}", f"{CALL}\n{CALL}", "It is 5.")
    messages = [{"role": "user", "content": "2 + 3?"}]
    said = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL]).choices[0]
    (call,) = said.message.tool_calls
    assert (said.finish_reason, said.message.content, call.function.name) == ("tool_calls", "I add.", "add")
    assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL], stream=True):
        (choice,) = chunk.choices
        for part in choice.delta.tool_calls or ():
            if part.index not in calls:
                assert part.id
                assert part.type == "function"
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments
        assert not choice.delta.content
    assert choice.finish_reason == "tool_calls"
    assert [(n, json.loads(a)) for n, a in calls.values()] == [("add", {"a": 2, "b": 3})] * 2
    messages += [said.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    last = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    assert last.choices[0].message.content == "It is 5."
    used = last.usage  # the call keeps the ids that were written: what was read with it is not read again
    assert used.prompt_tokens - used.prompt_tokens_details.cached_tokens < 100


def test_what_was_no_call_after_all_is_text(server, model, monkeypatch):
    says(monkeypatch, model, "<tool_call>\n{never mind")
    body = {"messages": HELLO, "tools": [TOOL]}
    _, said, _ = server.ask("/v1/chat/completions", body)
    assert said["choices"][0]["message"]["content"] == "<tool_call>\n{never mind"
    _, content, _ = server.ask("/v1/chat/completions", {**body, "stream": True})
    *chunks, _ = events_of(content)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content") or "" for d in deltas) == "<tool_call>\n{never mind"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def likelihoods(model, prompt, ids):
    """log p of each of `ids` behind the prompt, by the model's whole rows."""
    rows = log_softmax(model.logits([*prompt, *ids]))
    return [rows[len(prompt) - 1 + i] for i in range(len(ids))]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}])
def test_log_probabilities_are_those_of_the_models_own_logits(server, model, options):
    here = model.chat(HELLO, max_tokens=10, **options)
    asked = {"messages": HELLO, "max_tokens": 10, "logprobs": True, "top_logprobs": 3, **options}
    _, said, _ = server.ask("/v1/chat/completions", asked)
    (choice,) = said["choices"]
    assert choice["message"]["content"] == here.text  # choosing is not touched
    entries, rows = (
        choice["logprobs"]["content"],
        likelihoods(model, model.request(HELLO).prompt(model), here.token_ids),
    )
    assert len(entries) == len(here.token_ids)
    for entry, row, token in zip(entries, rows, here.token_ids, strict=True):
        assert entry["logprob"] == pytest.approx(row[token], abs=1e-4)
        assert bytes(entry["bytes"]) == model.tokenizer.token_bytes(token)
        best = np.sort(row)[::-1][:3]
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(best.tolist(), abs=1e-4)
    _, content, _ = server.ask("/v1/chat/completions", {**asked, "stream": True})
    *chunks, _ = events_of(content)
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == entries


def test_text_completions_have_log_probabilities_too(server, model):
    asked = {"prompt": "Once", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    _, said, _ = server.ask("/v1/completions", asked)
    found = said["choices"][0]["logprobs"]
    assert [len(found[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [6] * 4
    assert found["token_logprobs"][0] == pytest.approx(max(found["top_logprobs"][0].values()))
    assert found["text_offset"][0] == 0
    _, content, _ = server.ask("/v1/completions", {**asked, "stream": True})
    *chunks, _ = events_of(content)
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert {k: [x for p in parts for x in p[k]] for k in found} == found


@needs_client
def test_the_official_client_reads_log_probabilities(client):
    said = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    content = said.choices[0].logprobs.content
    assert len(content) == 4
    assert len(content[0].top_logprobs) == 2
    assert (
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices[0].logprobs is None
    )


def test_log_probabilities_asked_for_wrongly_are_named(server):
    assert server.chat(top_logprobs=2)[1]["error"]["param"] == "top_logprobs"
    assert server.chat(logprobs=True, top_logprobs=21)[1]["error"]["param"] == "top_logprobs"
    assert server.chat(logprobs=5)[1]["error"]["param"] == "logprobs"
    assert server.ask("/v1/completions", {"prompt": "x", "logprobs": True})[1]["error"]["param"] == "logprobs"


def test_answers_beside_one_that_wants_log_probabilities_stay_what_they_are(model):
    """In Python too, and with what a stop string holds back."""
    plain = model.chat(HELLO, temperature=1, seed=4, max_tokens=8)
    *events, done = model.chat(HELLO, temperature=1, seed=4, max_tokens=8, logprobs=0, stream=True)
    assert done.completion.token_ids == plain.token_ids
    told = [e.logprobs for e in events if e.token_id is not None]
    assert [t.token_id for t in told] == plain.token_ids
    assert all(t.logprob < 0 and not t.top for t in told)
    with pytest.raises(UsageError):
        model.chat(HELLO, logprobs=-1)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_answers_have_the_form_that_was_asked_for(server, model):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    asked = {"messages": HELLO, "response_format": form, "temperature": 1, "seed": 1, "max_tokens": 60}
    _, said, _ = server.ask("/v1/chat/completions", asked)
    text = said["choices"][0]["message"]["content"]
    assert json.loads(text)["a"] in (1, 2)
    assert said["choices"][0]["finish_reason"] == "stop"
    _, content, _ = server.ask("/v1/chat/completions", {**asked, "stream": True, "logprobs": True})
    *chunks, _ = events_of(content)
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == text
    plain = server.chat(temperature=0, max_tokens=3)[1]["choices"]
    assert server.chat(temperature=0, max_tokens=3, response_format={"type": "text"})[1]["choices"] == plain


@needs_client
def test_the_official_client_gets_json_of_a_strict_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    said = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=form, temperature=1, seed=2, max_tokens=60
    )
    assert json.loads(said.choices[0].message.content)["a"] in (1, 2)


def test_a_form_that_makes_no_sense_is_named(server):
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, "json", {"type": "regex", "pattern": 3}):
        status, said, _ = server.chat(response_format=wrong)
        assert (status, said["error"]["param"]) == (400, "response_format")
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
    assert server.chat(response_format=wrong)[0] == 400


def test_what_the_template_does_not_know_of_thinking_is_passed_over(server):
    """Agents say with every request how much shall be thought."""
    plain = server.chat(temperature=0, max_tokens=3)[1]["choices"]
    for wish in ({"reasoning_effort": "high"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert server.chat(temperature=0, max_tokens=3, **wish)[1]["choices"] == plain
    assert server.chat(reasoning_effort=3)[1]["error"]["param"] == "reasoning_effort"
