"""Clients that are no Python libraries: npm's `openai` and `@anthropic-ai/sdk`, and the command `llm`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import serving
from tiny import tiny_model

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "Hello."}]
PACKAGES = os.environ.get("TINYCHAT_TEST_NPM", "")
LLM = os.environ.get("TINYCHAT_TEST_LLM") or shutil.which("llm") or ""
SCRIPT = Path(__file__).parents[1] / "support" / "npm_clients.mjs"
needs_npm = pytest.mark.skipif(
    not (PACKAGES and shutil.which("node")),
    reason="needs node, and TINYCHAT_TEST_NPM naming a folder with npm's openai and @anthropic-ai/sdk in it",
)
needs_llm = pytest.mark.skipif(not LLM, reason="needs the command llm, or TINYCHAT_TEST_LLM naming it")


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=2048, backend="cpu", eos_ids=(), context_length=2048) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


@needs_npm
def test_npm_clients_get_what_python_gets(server, model, tmp_path):
    (tmp_path / "node_modules").symlink_to(Path(PACKAGES).resolve() / "node_modules")
    shutil.copy(SCRIPT, tmp_path)
    env = {**os.environ, "BASE": server.url.removesuffix("/v1"), "NAME": "tiny"}
    run = subprocess.run(
        ["node", SCRIPT.name], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    here = model.chat(HELLO, temperature=0, max_tokens=12)
    assert told["models"] == ["tiny"]
    assert told["chat"] == [here.text, "length", 12]
    assert told["response"] == [here.text, "incomplete"]
    assert told["message"] == [here.text, "max_tokens", 12]
    assert told["chatStream"] == told["responseStream"] == told["messageStream"] == here.text
    assert (told["responseEnd"], told["messageEnd"]) == ("response.incomplete", "max_tokens")
    assert told["responseAfter"]
    function, reason = told["call"]
    assert (function["name"], reason) == ("weather", "tool_calls")
    assert told["callStream"] == function["arguments"]
    for given in (told["schema"], function["arguments"]):
        assert json.loads(given)["unit"] in ("C", "F")
    kind, name, given, reason = told["use"]
    assert (kind, name, given["unit"] in ("C", "F"), reason) == ("tool_use", "weather", True, "tool_use")
    assert told["count"] == here.stats.prompt_tokens
    not_found, wrong = ["NotFoundError", 404], ["BadRequestError", 400]
    assert told["refused"] == [not_found, wrong, wrong, wrong, not_found]
    server.until(server.idle)


@pytest.fixture
def ask(server, tmp_path):
    """Runs `llm` with the server as its only model."""
    facts = {"model_id": "tiny", "model_name": "tiny", "api_base": server.url}
    facts |= {"supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([facts]))  # JSON is YAML

    def ask(*args: str) -> str:
        env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
        run = subprocess.run(
            [LLM, "-m", "tiny", *args], env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    return ask


@needs_llm
def test_llm_answers_streams_goes_on_and_is_held_to_a_schema(ask, model):
    here = model.chat(HELLO, temperature=0, max_tokens=12).text
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    assert ask("Hello.", *options) == f"{here}\n"
    assert ask("Hello.", *options, "--no-stream") == f"{here}\n"
    said = [*HELLO, {"role": "assistant", "content": here}, {"role": "user", "content": "And?"}]
    assert ask("-c", "And?", *options) == f"{model.chat(said, temperature=0, max_tokens=12).text}\n"
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    held = ask("Hello.", "--schema", json.dumps({**schema, "additionalProperties": False}))
    assert json.loads(held)["unit"] in ("C", "F")
    biased = ask("Hello.", *options[:2], "0", "-o", "max_tokens", "3", "-o", "logit_bias", '{"65": 100}')
    assert biased == f"{model.tokenizer.decode([65] * 3)}\n"
