"""/v1/embeddings of a model whose folder says how it pools."""

from __future__ import annotations

import base64
import importlib.util
import json

import numpy as np
import pytest
from serving import post, serving
from tiny import tiny_folder

import tinychat

TEXTS = ["one", "two, and more of it", "three"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kinds = ["Transformer", "Pooling", "Normalize"]
    places = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in zip(kinds, places, strict=True)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    with tinychat.load(folder, quantize="none", ctx=128, threads=1) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


def test_embeddings_are_those_of_the_model(server, model):
    here = model.embed(TEXTS)
    status, said, _ = server.ask("/v1/embeddings", {"model": "tiny", "input": TEXTS})
    assert status == 200
    assert [d["index"] for d in said["data"]] == [0, 1, 2]
    assert np.allclose([d["embedding"] for d in said["data"]], here)
    assert said["usage"] == {"prompt_tokens": 27, "total_tokens": 27}
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    for given in (ids, ids[0], TEXTS[0]):
        _, said, _ = server.ask("/v1/embeddings", {"input": given, "encoding_format": "base64"})
        vector = np.frombuffer(base64.b64decode(said["data"][0]["embedding"]), "<f4")
        assert np.array_equal(vector, here[0])
    _, said, _ = server.ask("/v1/embeddings", {"input": "one", "dimensions": 5})
    assert len(said["data"][0]["embedding"]) == 5


@pytest.mark.skipif(not importlib.util.find_spec("openai"), reason="needs openai")
def test_the_official_client_gets_embeddings(server, model):
    from openai import OpenAI

    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        said = client.embeddings.create(model="tiny", input=TEXTS)  # asks for base64 by itself
    assert np.array_equal(np.float32([d.embedding for d in said.data]), model.embed(TEXTS))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["x", 3]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 65}, None),
        ({"input": "x" * 129}, None),
        ({"input": [300]}, None),
    ],
)
def test_what_is_asked_wrongly_is_named(server, asked, param):
    status, said, _ = server.ask("/v1/embeddings", asked)
    assert (status, said["error"]["param"]) == (400, param), said


def test_an_embedding_model_answers_no_chats(server):
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": "Hello."}]}),
        ("completions", {"prompt": "x"}),
    ):
        status, said, _ = server.ask(f"/v1/{path}", body)
        assert (status, "does not chat" in said["error"]["message"]) == (400, True)


def test_a_client_that_goes_away_ends_its_texts(server):
    s = server.raw(post("/v1/embeddings", {"input": ["x" * 100] * 2048}, server.port))
    server.until(lambda: server.service.desk.running)
    s.close()
    server.until(server.idle)
