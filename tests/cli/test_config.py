"""`config.toml` on the command line: what it says holds where no flag does."""

from __future__ import annotations

import json

import pytest
from cli_helpers import tinychat
from tiny import tiny_folder


@pytest.fixture
def home(tmp_path):
    tiny_folder(tmp_path / "model")
    (tmp_path / "home").mkdir()

    def write(text):
        (tmp_path / "home" / "config.toml").write_text(text.replace("MODEL", str(tmp_path / "model")))
        return {"env": {"TINYCHAT_HOME": str(tmp_path / "home")}}

    return write


def test_names_cannot_speak_to_the_terminal(home):
    shown = tinychat("config", **home('model = "a\\n\\u001b[2Jb"\n')).stdout
    assert any(line.split() == ["model", "a", "␛[2Jb", "config.toml"] for line in shown.splitlines())


def test_one_answer_takes_model_sampling_and_loading_from_it(home):
    here = home('model = "MODEL"\n[sampling]\nmax_tokens = 3\ntemperature = 0\n[load]\nctx = 64\n')
    answer = json.loads(tinychat("run", "say hi", "--json", **here).stdout)
    assert (answer["finish_reason"], answer["stats"]["generated_tokens"]) == ("length", 3)
    answer = json.loads(tinychat("run", "say hi", "--json", "--max-tokens", "2", **here).stdout)
    assert answer["stats"]["generated_tokens"] == 2
    r = tinychat("run", "say hi " * 200, "--json", **here)
    assert "the context holds 64" in r.stderr


def test_a_mistake_names_its_line_and_stops_the_command(home):
    r = tinychat("run", "say hi", **home("\nctx = 5\n"))
    assert r.returncode == 2
    assert "config.toml, line 2: ctx is not known there." in r.stderr


def test_config_shows_who_says_what(home):
    here = home('model = "MODEL"\nsystem = "Be kind."\n[sampling]\ntop_k = 7\n[models.x.load]\nkv_bits = 8\n')
    lines = tinychat("config", **here).stdout.splitlines()
    found = {line.split()[0]: line for line in lines if line.strip()}
    assert found["system"].split("  ")[-1] == "config.toml"
    assert found["sampling.top_k"].split()[1:] == ["7", "config.toml"]
    assert "built in" in found["load.kv_bits"]
    x = tinychat("config", "x", **here).stdout
    assert '8                 config.toml, [models."x"]' in x
    assert "asked for" in x


def test_a_prompt_of_one_s_own_is_asked_by_name(home, tmp_path):
    here = home("[sampling]\nmax_tokens = 3\n")
    (tmp_path / "home" / "prompts").mkdir()
    prompt = tmp_path / "home" / "prompts" / "up.md"
    prompt.write_text(
        f'+++\nmodel = "{tmp_path / "model"}"\nsampling.max_tokens = 2\n+++\nShout: {{{{input}}}}!'
    )
    answer = json.loads(tinychat("run", "-p", "up", "--json", stdin="softly", **here).stdout)
    assert answer["stats"]["generated_tokens"] == 2
    again = json.loads(tinychat("run", tmp_path / "model", "Shout: softly!", "--json", **here).stdout)
    assert again["stats"]["prompt_tokens"] == answer["stats"]["prompt_tokens"]
    word = json.loads(tinychat("run", "-p", "up", "softly", "--json", "--max-tokens", "1", **here).stdout)
    assert word["stats"]["generated_tokens"] == 1
    assert word["stats"]["prompt_tokens"] == answer["stats"]["prompt_tokens"]
    r = tinychat("run", "-p", "down", "softly", **here)
    assert "There is no prompt down." in r.stderr


def test_config_shows_keys_and_refuses_what_is_none(home):
    here = home('vi = true\n[keys]\nsend = ["ctrl+s", "f5"]\n')
    lines = [line.split() for line in tinychat("config", **here).stdout.splitlines()]
    assert ["vi", "true", "config.toml"] in lines
    assert ["keys.send", "ctrl+s,", "f5", "config.toml"] in lines
    r = tinychat("config", **home('[keys]\nsned = "f5"\n'))
    assert (r.returncode, "config.toml, line 2: sned is the name of no key" in r.stderr) == (2, True)
