"""Commands that report, the help and the shell's completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from cli_helpers import assert_two_lines, tinychat
from tiny import byte_tokenizer


def test_ppl(folder, here):
    (here / "text.txt").write_text("It was a dark and stormy night. " * 20)
    out = tinychat("ppl", folder, "text.txt", "--json", "--ctx", "64", "--device", "reference")
    facts = json.loads(out.stdout)
    assert facts["ctx"] == 64
    ids = byte_tokenizer().encode((here / "text.txt").read_text())
    assert facts["n_tokens"] == len(ids) // 64 * 32
    assert 1 < facts["perplexity"] < 1e9
    plain = tinychat("ppl", folder, "text.txt", "--ctx", "64", "--device", "reference")
    assert float(plain.stdout.split()[0]) == pytest.approx(facts["perplexity"], abs=1e-3)
    default = json.loads(tinychat("ppl", folder, "text.txt", "--json").stdout)
    assert default["ctx"] == 256  # the model's own context is smaller than the usual 512
    (here / "empty.txt").write_text("")
    assert_two_lines(tinychat("ppl", folder, "empty.txt"), 2)


def test_doctor(here):
    out = tinychat("doctor", "--json")
    facts = json.loads(out.stdout)
    assert (out.returncode == 0) == (facts["problems"] == [])
    assert facts["cores"] == len(os.sched_getaffinity(0)) or facts["cores"] < os.cpu_count()
    assert facts["home"] == os.environ["TINYCHAT_HOME"]
    assert set(facts) >= {"tinychat", "python", "platform", "memory_free", "isa", "models"}
    assert not (here.parent / "home").exists()  # looking is not touching


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(here, shell):
    out = tinychat("completion", shell)
    assert out.returncode == 0
    assert "_TINYCHAT_COMPLETE" in out.stdout


def test_completion_offers_commands_and_models(here):
    env = {
        **os.environ,
        "_TINYCHAT_COMPLETE": "bash_complete",
        "COMP_CWORD": "1",
        "COMP_WORDS": "tinychat pu",
    }
    code = "import sys; sys.argv[0] = 'tinychat'; from tinychat.cli.main import main; main()"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "pull" in out.stdout
    env.update(COMP_CWORD="2", COMP_WORDS="tinychat run smol")
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "smollm2-135m" in out.stdout


def test_help_and_version(here):
    for args in (["--help"], ["run", "-h"], ["--version"]):
        out = tinychat(*args)
        assert (out.returncode, out.stderr) == (0, "")
        assert "tinychat" in out.stdout


@pytest.mark.parametrize("bits", ["16", "8"])
def test_bench_measures_what_it_says(folder, here, bits):
    sizes = ("-p", 32, "-n", 2, "--context", 0, "--context", 40, "--rounds", 1)
    out = tinychat("bench", folder, *sizes, "--kv-bits", bits, "--json")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["kv_bits"] == int(bits)
    assert [row["context"] for row in result["decode"]] == [0, 40]
    assert result["prefill"][0]["n_tokens"] == 32
    for row in result["decode"]:
        assert row["tok_s"] > 0
        assert row["fraction_of_bandwidth"] == pytest.approx(row["gb_s"] / result["read_bandwidth_gb_s"])
    assert result["weight_bytes_per_token"] > 0
