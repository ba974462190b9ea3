"""Conversations with a model of a server: what is asked, what comes back, and all that can go wrong."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time

import pytest
from scripted_server import ScriptedServer, answer, status

from tinychat.base.errors import ModelNotFoundError, TinychatError, UsageError
from tinychat.base.events import Done, Notice
from tinychat.base.sampling_params import SamplingParams
from tinychat.conversation import Message, Tree
from tinychat.process import remote, server
from tinychat.process.address import Address, KeySource
from tinychat.process.connector import MOST_MODELS, Connector
from tinychat.process.remote import RemoteSession
from tinychat.process.server_params import ServerParams


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)
    for name in ("TINYCHAT_API_KEY", "OPENAI_API_KEY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def played():
    with ScriptedServer() as s:
        yield s


def connected(url, name="", **options):
    return Connector(Address.parse(url))(name, options, lambda *_: None)


def said(session, text="hi"):
    """(events, answer's message)."""
    events = list(session.send(text))
    return events, session.nodes[-1]


# Answers


def test_an_answer_its_reasoning_and_its_numbers(played):
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    played.scripts = [answer("The answer.", "Let me think.", usage=usage)]
    model = connected(played.url)
    assert model.id == "org/big-model"
    assert model.n_ctx == 32768
    session = model.session("Be brief.", temperature=0.2, repeat_penalty=1.1, stop=["END"])
    events, m = said(session, "question")
    done = events[-1]
    assert "".join(e.text for e in events) == "The answer." == done.completion.text
    assert done.completion.reasoning == "Let me think."
    assert m.split() == ("Let me think.", "The answer.")
    assert (m.finish_reason, m.ids) == ("stop", [])
    s = done.stats
    assert (s.prompt_tokens, s.cached_tokens, s.generated_tokens, s.reasoning_tokens) == (20, 16, 9, 4)
    assert s.ttft_s > 0
    assert played.questions == [
        {
            "model": "org/big-model",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "question"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.2,
            "repeat_penalty": 1.1,
            "repetition_penalty": 1.1,
            "stop": ["END"],
        }
    ]


def test_branches_edits_and_files_are_asked_as_they_stand(played, tmp_path):
    session = connected(played.url).session(seed=5)
    said(session, "one")
    list(session.send("two", attachments=[{"name": "a.txt", "text": "inside"}]))
    list(session.regenerate())
    assert len(session.siblings(session.leaf)) == 2
    assert played.questions[-1]["seed"] == 6  # the same seed would say the same again
    assert played.questions[-1]["messages"] == played.questions[-2]["messages"]
    assert "inside" in played.questions[-1]["messages"][-1]["content"]
    list(session.edit(0, "uno"))
    assert [m["content"] for m in played.questions[-1]["messages"]] == ["uno"]
    session.save(tmp_path / "chat.json")
    again = RemoteSession.load(tmp_path / "chat.json", session.model)
    assert again.messages == session.messages
    assert again.params == session.params


def test_what_was_thought_is_not_told_again(played):
    session = connected(played.url).session()
    said(session, "think")
    assert session.nodes[1].split() == ("hidden thought", "echo: think")
    said(session, "more")
    assert [m["content"] for m in played.questions[-1]["messages"]] == ["think", "echo: think", "more"]


def test_questions_without_an_answer_leave_turns_that_alternate(played):
    session = connected(played.url).session()
    said = [("one", "", "error"), ("two", "", "cancelled"), ("three", "3", "stop"), ("four", "", None)]
    path = []
    for text, reply, reason in said:
        path += [Message("user", text), Message("assistant", reply, finish_reason=reason)]
    session.tree = Tree.of_path([*path, Message("user", "five")])
    list(session.regenerate())
    assert [m["content"] for m in played.questions[0]["messages"]] == ["two\n\nthree", "3", "five"]


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_reasoning_that_spells_its_own_end_stays_reasoning(played, pieces):
    played.scripts = [answer("yes", "a </think> b", pieces=pieces)]
    events, m = said(connected(played.url).session())
    assert m.split() == ("a </ think> b", "yes")
    assert "".join(getattr(e, "written", "") for e in events) == m.content


def test_reasoning_in_the_text_is_told_apart(played):
    played.scripts = [answer("<think>hm</think>\n\nyes", pieces=30)]
    events, m = said(connected(played.url).session())
    assert m.split() == ("hm", "yes")
    assert "".join(e.text for e in events) == "yes"


def test_parts_whole_answers_and_odd_chunks(played):
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    whole = {"choices": [{"message": {"content": "whole"}, "finish_reason": "length"}]}

    def odd(h):
        h.begin()
        h.raw(b": a comment\r\n\r\nevent: message\r\nid: 3\r\n")
        h.raw(b'data: 5\n\ndata: []\n\ndata: {}\n\ndata: {"choices": [7]}\n\n')
        h.raw(b'data: {"choices": [{"delta": {"content": 5, "role": []}}], "usage": 3}\n\n')
        h.raw(
            b'data:{"choices": [{"delta":\ndata: {"content": "joi\\ud83dned"}, "finish_reason": "stop"}]}\n'
        )

    played.scripts = [
        lambda h: (h.begin(), h.say(content=[thinking]), h.say("stop", content=[{"text": "yes"}]), h.end()),
        lambda h: h.page(whole),
        odd,
    ]
    session = connected(played.url).session()
    assert said(session)[1].split() == ("hm", "yes")
    m = said(session)[1]
    assert (m.content, m.finish_reason) == ("whole", "length")
    assert said(session)[1].content == "joi\ufffdned"


# Failures


def failing(played, script, attempts=1, **kw):
    """The error of an answer, and the session."""
    played.scripts = [script] * attempts
    session = connected(played.url).session()
    events = []
    with pytest.raises(TinychatError) as e:
        events.extend(session.send("hi"))
    assert "\x1b" not in str(e.value)
    assert "bug" not in e.value.todo
    assert str(e.value).count("\n") == 1
    assert len(str(e.value)) < 800
    assert len(played.questions) == attempts
    return e.value, session


def test_what_is_not_worth_another_attempt_fails_at_once(played):
    e, _ = failing(played, status(401, {"error": {"message": "no \x1b[31mkey"}}))
    assert "wants a key (401): no" in e.what
    assert "TINYCHAT_API_KEY" in e.todo
    played.heard.clear()
    e, _ = failing(played, status(404, {"detail": "no such model"}))
    assert "(404): no such model." in e.what
    played.heard.clear()
    message = "This model's maximum context length is 10 tokens"
    e, _ = failing(played, status(400, {"error": {"message": message}}))
    assert message in e.what
    assert "new chat" in e.todo
    played.heard.clear()
    e, _ = failing(played, status(307, Location="https://other.example/v1/chat/completions"))
    assert e.todo == "Use that address: --server https://other.example/v1"
    played.heard.clear()
    e, _ = failing(played, status(302, Location="http://x/;rm -rf ~"))
    assert "rm" not in str(e)
    played.heard.clear()
    e, _ = failing(played, lambda h: h.page(b"<html>log in</html>", 200, "text/html"))
    assert "text/html" in e.what
    played.heard.clear()
    e, _ = failing(played, lambda h: (h.begin(), h.raw(b"data: " + b"x" * (1 << 20) + b"\n" * 9)))
    assert "without end" in e.what
    played.heard.clear()
    e, _ = failing(played, lambda h: h.begin(Content_Encoding="gzip"))
    assert "gzip" in e.what


def broken_json(h):
    h.begin()
    h.raw(b'data: {"choices": [{"del\n\n')


def nothing(h):
    h.begin()
    h.say(role="assistant", content="")


def half_a_chunk(h):
    h.close_connection = True
    h.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda")


WORTH_AGAIN = {
    "busy": (status(429, {"error": {"message": "slow down"}}, Retry_After="0.001"), "(429): slow down."),
    "failed": (status(500, {"error": {"message": "oh"}}), "(500): oh."),
    "without a body": (status(503), "failed (503)."),
    "broken JSON": (broken_json, "broken JSON"),
    "ended early": (nothing, "ended its answer early"),
    "cut": (half_a_chunk, "was lost"),
    "reset": (lambda h: h.reset(), "was lost"),
    "error in the stream": (
        lambda h: (h.begin(), h.raw(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')),
        "(500): out of memory.",
    ),
}


@pytest.mark.parametrize("kind", WORTH_AGAIN)
def test_what_may_pass_is_tried_again_a_few_times(played, kind):
    script, words = WORTH_AGAIN[kind]
    e, session = failing(played, script, attempts=4)
    assert words in e.what
    assert session.nodes == []  # the question is taken back, as it is where a model fails before it begins
    played.scripts = [script, script]
    events, m = said(session, "and now?")
    assert m.content == "echo: and now?"
    assert sum("Another attempt" in e.message for e in events if isinstance(e, Notice)) == 2


@pytest.mark.parametrize("how", ["end", "reset", "broken", "stall"])
def test_what_was_said_before_a_failure_is_kept_and_not_asked_again(played, how, monkeypatch):
    monkeypatch.setattr(server, "STALL", 0.2)
    gone = threading.Event()

    def play(h):
        h.begin()
        h.say(content="so far")
        gone.wait(0.05)
        if how == "reset":
            h.reset()
        elif how == "broken":
            h.raw(b"data: {{{\n\n")
        elif how == "stall":
            gone.wait(5)

    played.scripts = [play]
    session = connected(played.url).session()
    with pytest.raises(TinychatError):
        list(session.send("hi"))
    gone.set()
    assert [m.content for m in session.nodes] == ["hi", "so far"]
    assert session.nodes[1].finish_reason == "error"
    assert len(played.questions) == 1


def test_nobody_there_and_no_such_host():
    with ScriptedServer() as s:
        url = s.url
    with pytest.raises(TinychatError, match="Nothing answers at"):
        connected(url)
    with pytest.raises(TinychatError, match="There is no host"):
        connected("http://no-such-host.invalid")


def test_an_endless_answer_is_cut_and_kept(played, monkeypatch):
    monkeypatch.setattr("tinychat.process.served.LONGEST_ANSWER", 10_000)

    def play(h):
        h.begin()
        while True:
            h.say(content="x" * 1000)

    played.scripts = [play]
    session = connected(played.url).session()
    with pytest.raises(TinychatError, match="without end"):
        list(session.send("hi"))
    assert session.nodes[1].content == "x" * 10_000


def test_a_cancel_closes_the_connection_at_once(played):
    def wait(h):
        h.begin()
        h.until_left()

    for script in (wait, lambda h: h.until_left()):  # while it streams, and before its first byte
        played.left.clear()
        played.scripts = [script]
        session = connected(played.url).session()
        asked = threading.Timer(0.1, session.cancel)
        asked.start()
        began = time.monotonic()
        events, m = said(session)
        assert played.left.wait(30)
        assert time.monotonic() - began < 15
        assert events[-1].finish_reason == m.finish_reason == "cancelled"
    assert len(played.questions) == 2


def test_leaving_the_events_closes_the_connection(played):
    session = connected(played.url).session()
    events = session.send("slow")
    while not getattr(next(events), "text", ""):
        pass
    events.close()
    assert session.nodes[1].finish_reason == "cancelled"
    assert session.nodes[1].content.startswith("echo: slow")


def test_fields_that_a_server_does_not_know_are_left_out_from_then_on(played):
    def refuse(message):
        return status(400, {"error": {"message": message}})

    extra = {"detail": [{"msg": "Extra inputs are not permitted", "loc": ["body", "top_k"]}]}
    played.scripts = [
        refuse("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        status(422, extra),
    ]
    session = connected(played.url).session(max_tokens=5, top_k=3)
    events, _ = said(session)
    assert [e.message for e in events if isinstance(e, Notice)] == [
        f"{session.model.server.address} does not know top_k: it is left out."
    ]
    last = played.questions[-1]
    assert "top_k" not in last
    assert "max_tokens" not in last
    assert last["max_completion_tokens"] == 5
    said(session, "again")
    assert len(played.questions) == 4
    played.scripts = [refuse("max_completion_tokens is too large: 5")]  # known, and wrong
    with pytest.raises(TinychatError, match="too large"):
        list(session.send("more"))


# Keys


def test_the_key_goes_along_and_is_in_no_message(played, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_API_KEY", "sk-very-secret")
    session = connected(played.url).session()
    said(session)
    assert {h["Authorization"] for _, h, _ in played.heard} == {"Bearer sk-very-secret"}
    played.scripts = [status(401, {"error": {"message": "Incorrect key sk-very-secret given"}})]
    with pytest.raises(TinychatError) as e:
        list(session.send("hi"))
    assert "Incorrect key … given" in e.value.what
    assert "Check the key in TINYCHAT_API_KEY" in e.value.todo
    session.save(tmp_path / "chat.json")
    assert "secret" not in (tmp_path / "chat.json").read_text()


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with ScriptedServer(context=context) as s:
        with pytest.raises(TinychatError, match="cannot be verified") as e:
            connected(s.url)
        assert "SSL_CERT_FILE" in e.value.todo
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        session = connected(s.url).session()
        assert said(session)[1].content == "echo: hi"
        threading.Timer(0.1, session.cancel).start()
        assert said(session, "slow")[1].finish_reason == "cancelled"
        with pytest.raises(TinychatError):
            connected(s.url.replace("https", "http"))


# Models


def test_a_model_is_found_by_its_name_or_as_the_only_one(played):
    played.listed = {"data": [{"id": "llama3.2:latest"}, {"id": "org/Big", "meta": {"n_ctx": 4096}}]}
    assert connected(played.url, "llama3.2").id == "llama3.2:latest"
    big = connected(played.url, "big")
    assert (big.id, big.n_ctx) == ("org/Big", 4096)
    assert big.name == f"org/Big@{played.url}/v1"
    with pytest.raises(ModelNotFoundError, match=r"has 2 models: llama3.2:latest, org/Big\."):
        connected(played.url)
    other = connected(played.url, "bag")
    assert other.id == "bag"
    events, _ = said(other.session())
    assert "does not list bag" in events[0].message
    played.listed = {"data": []}
    with pytest.raises(ModelNotFoundError, match="has 0 models"):
        connected(played.url)
    played.models = status(404)  # not every server lists them
    assert connected(played.url, "any").id == "any"
    with pytest.raises(TinychatError, match="404"):
        connected(played.url)


def test_hostile_lists_of_models(played):
    ids = ["good", "x" * 5000, "\x1b[31mred", "two\nlines", 5, None, "", {"id": "x"}, "\ud800"]
    played.listed = {"data": [*({"id": i} for i in ids), 7, None, {}, {"id": "good", "n_ctx": True}]}
    assert connected(played.url).id == "good"
    for page in (5, [], {"data": "x"}, None, {"data": {"id": "x"}}):
        played.listed = page
        with pytest.raises(ModelNotFoundError):
            connected(played.url)
    deep = b"[" * 100_000
    played.models = lambda h: h.page(deep)
    with pytest.raises(TinychatError, match="broken JSON"):
        connected(played.url)
    played.listed = {"data": [{"id": f"m{i}"} for i in range(5000)]}
    played.models = lambda h: h.page(played.listed)
    assert len(Connector(Address.parse(played.url)).list()["installed"]) == MOST_MODELS


def test_a_model_of_another_server_is_asked_there_without_the_first_ones_key(played, tmp_path):
    key = tmp_path / "key"
    key.write_text("sk-first")
    key.chmod(0o600)
    with ScriptedServer() as other:
        first = Address.parse(played.url)
        model = Connector(first, KeySource(first, None, key))(f"x@{other.url}/v1", {}, lambda *_: None)
        said(model.session())
        assert all("Authorization" not in h for _, h, _ in other.heard)
        assert played.heard == []


def test_every_sampling_parameter_can_be_sent(played):
    assert list(ServerParams.SETTINGS) == list(SamplingParams.SETTINGS)  # a stored chat may have any of them
    values = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "stop": ["x"],
    }
    values |= {"max_tokens": 9, "think_budget": 20, "seed": 4}
    values |= {"presence_penalty": 0.1, "frequency_penalty": -0.2, "logit_bias": {"7": -100}}
    assert {*values} == {*SamplingParams.SETTINGS}
    list(connected(played.url).session(**values).send("hi"))
    assert values.items() <= played.questions[0].items()


def test_parameters_are_checked_before_anything_is_asked(played):
    session = connected(played.url).session()
    with pytest.raises(UsageError):
        session.send("hi", temperature=-1)
    with pytest.raises(UsageError):
        session.send("")
    assert played.questions == []
    events = list(session.send("hi", max_tokens=3))
    assert isinstance(events[-1], Done)
    assert played.questions[0]["max_tokens"] == 3
