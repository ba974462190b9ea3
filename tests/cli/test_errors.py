"""What goes wrong is said in two lines, with the right exit code."""

from __future__ import annotations

import json
import os
import resource
import subprocess

import numpy as np
import pytest
from cli_helpers import GREEDY, TINYCHAT, assert_two_lines, tinychat
from tiny import tiny_folder
from tiny_gguf import write as write_gguf

from tinychat.network.config import RopeConfig


def test_usage_errors(folder, here):
    (here / "latin1.txt").write_bytes("café".encode("latin-1"))
    (here / "binary").write_bytes(bytes(range(256)))
    for args, stdin in [
        (["run", folder], None),
        (["run", folder], ""),
        (["run", folder, ""], "   \n"),
        (["run", folder, "--temp", "warm", "x"], None),
        (["run", folder, "--temp", "-1", "x"], None),
        (["run", folder, "--top-p", "nan", "x"], None),
        (["run", folder, "--top-p", "7", "x"], None),
        (["run", folder, "--ctx", "0", "x"], None),
        (["run", folder, "--ctx", "100000000", "x"], None),
        (["run", folder, "--threads", "0", "x"], None),
        (["run", folder, "--stop", "", "x"], None),
        (["run", folder, "--seed", "-3", "x"], None),
        (["run", folder, "--json", "--stream-json", "x"], None),
        (["run", folder, "--bogus", "x"], None),
        (["run", folder, "-f", "missing.txt", "x"], None),
        (["run", folder, "-f", "latin1.txt", "x"], None),
        (["run", folder], "café".encode("latin-1")),
        (["run", folder], bytes(range(256))),
        (["run", folder, "x" * 2000], None),
        (["ppl", folder, "binary"], None),
        (["ppl", folder, "missing.txt"], None),
        (["nonsense"], None),
        (["completion", "tcsh"], None),
        (["completion"], None),
        (["quantize", folder], None),
    ]:
        out = tinychat(*args, stdin=stdin)
        assert out.returncode == 2, (args, out.stderr)
        assert_two_lines(out, 2)
    assert sorted(p.name for p in here.iterdir()) == ["binary", "latin1.txt"]


@pytest.mark.parametrize(("flag", "value"), [("group-size", "128"), ("group-size", "0"), ("calib", "binary")])
def test_usage_errors_of_quantize(folder, here, flag, value):
    pytest.importorskip("torch", reason="needs torch")
    (here / "binary").write_bytes(bytes(range(256)))
    assert_two_lines(tinychat("quantize", folder, "--out", "out", f"--{flag}", value), 2)
    assert not (here / "out").exists()


def test_an_unknown_model_is_3(here):
    for name in ("no-such-model", "./no/such/folder", "no-such-file.gguf"):
        assert_two_lines(tinychat("run", name, "hi", "--offline"), 3)
    (here / "empty").mkdir()
    assert_two_lines(tinychat("run", "./empty", "hi"), 3)


def test_damaged_models_are_1(folder, here):
    weights = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())

    def broken(name, change):
        copy = tiny_folder(here / name)
        change(copy)
        return tinychat("run", f"./{name}", "hi")

    nan = weights[:-4] + np.array([np.nan], dtype=np.float32).tobytes()

    def pickled(f):
        (f / "model.safetensors").unlink()
        (f / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch stolen'\ntR.")

    cases = {
        "nan": lambda f: (f / "model.safetensors").write_bytes(nan),
        "pickle": pickled,
        "cut short": lambda f: (f / "model.safetensors").write_bytes(weights[: len(weights) // 2]),
        "not safetensors": lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100),
        "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
        "no json": lambda f: (f / "config.json").write_text("{"),
        "architecture": lambda f: (f / "config.json").write_text(
            json.dumps({**config, "architectures": ["FooForCausalLM"]})
        ),
        "rope": lambda f: (f / "config.json").write_text(
            json.dumps({**config, "rope_scaling": {"type": "mrope", "factor": 4}})
        ),
        "shape": lambda f: (f / "config.json").write_text(json.dumps({**config, "intermediate_size": 128})),
        "layers": lambda f: (f / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3})),
        "tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    }
    for name, change in cases.items():
        out = broken(name, change)
        assert out.returncode == 1, (name, out.stderr)
        assert_two_lines(out, 1)
    assert "FooForCausalLM" in broken("architecture", cases["architecture"]).stderr
    assert "mrope" in broken("rope", cases["rope"]).stderr
    assert not list(here.rglob("stolen"))
    (here / "file.gguf").write_bytes(b"GGUF but not really")
    assert_two_lines(tinychat("run", "./file.gguf", "hi"), 1)
    write_gguf(here / "whole.gguf")
    (here / "cut.gguf").write_bytes((here / "whole.gguf").read_bytes()[:-1000])
    assert_two_lines(tinychat("run", "./cut.gguf", "hi"), 1)
    (here / "model.pth").write_bytes(b"\x80\x04")
    assert_two_lines(tinychat("run", "./model.pth", "hi"), 1)


def test_a_context_that_does_not_fit_is_4(tmp_path, here):
    wide = dict(head_dim=512, n_kv_heads=4, rope=RopeConfig(dim=512), context_length=1 << 25)
    big = tiny_folder(tmp_path / "wide", **wide)
    out = tinychat("run", big, "hi", "--ctx", 1 << 25)
    assert_two_lines(out, 4)
    assert "--ctx" in out.stderr


def test_debug_shows_the_traceback(here, monkeypatch):
    monkeypatch.setenv("TINYCHAT_DEBUG", "1")
    out = tinychat("run", "no-such-model", "hi", "--offline")
    assert out.returncode == 3
    assert "Traceback" in out.stderr
    assert out.stderr.splitlines()[-2].startswith("Error: ")


def test_an_argument_that_is_not_utf8_is_answered(folder, here):
    out = subprocess.run(
        [*map(os.fsencode, TINYCHAT), b"run", os.fsencode(folder), b"caf\xe9", *map(os.fsencode, GREEDY)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert out.returncode == 0, out.stderr
    out.stdout.decode()


def test_little_memory_is_an_error_not_a_crash(folder, here):
    limit = 1 << 30

    def less():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    out = tinychat("run", folder, "hello", *GREEDY, "--threads", "1", preexec_fn=less)
    assert out.returncode in (0, 4), out.stderr
    if out.returncode == 4:
        assert_two_lines(out, 4)
