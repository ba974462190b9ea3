"""Commands that report, the help and the shell's completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from cli_helpers import assert_two_lines, in_process, tinychat
from tiny import byte_tokenizer


def test_ppl(folder, here):
    pytest.importorskip("torch", reason="needs torch")
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


def test_doctor_says_in_sentences_what_it_measured_and_decided_and_what_fits(here, monkeypatch):
    from tinychat.cli import doctor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, out, _ = in_process("doctor")
    lines = out.splitlines()
    starts = ("cores ", "kernels ", "memory ", "bandwidth ", "GPU ", "store ", "network ")
    found = {s: next(line for line in lines if line.startswith(s)) for s in starts}
    assert "threads" in found["cores "]
    assert "GB/s" in found["bandwidth "]
    assert "HF_HUB_OFFLINE" in found["network "]
    assert "free" in found["memory "]
    assert os.environ["TINYCHAT_HOME"] in found["store "]

    # Bandwidth divided by bytes, within the memory that is free.
    facts = {"read_bandwidth_gb_s": 20.0, "memory_free_bytes": 2_000_000_000, "models": []}
    fits = {row["name"]: row for row in doctor._fits(facts)}
    assert fits["qwen3-0.6b"]["tokens_per_s"] == pytest.approx(20e9 / 639e6, rel=0.01)
    assert "llama-3.1-8b" not in fits
    assert all(row["memory_bytes"] <= 2_000_000_000 for row in fits.values())
    assert doctor._fits(facts | {"memory_free_bytes": 1000}) == []


def test_doctor_says_which_kernels_were_chosen_and_why(here, monkeypatch):
    from tinychat.kernels_cpu import _native

    *_, slowest = _native.isas()
    monkeypatch.setattr(_native, "amx_problem", lambda: "the kernel does not give this process tiles")
    said = {}
    for isa in (slowest, "garbage"):
        monkeypatch.setenv("TINYCHAT_ISA", isa)
        said[isa] = in_process("doctor")
    assert f"{slowest}, " in said[slowest][1]
    assert "its AMX is not used: the kernel does not give" in " ".join(said[slowest][1].split())
    if len(_native.isas()) > 1:
        assert "as TINYCHAT_ISA says" in said[slowest][1]
    code, out, err = said["garbage"]
    assert (code, err) == (1, "")
    assert "problem: TINYCHAT_ISA=garbage" in out


def test_no_share_above_one_is_printed_without_its_reason(here, monkeypatch):
    from tinychat import bench

    row = {"context": 0, "tok_s": 300.0, "gb_s": 30.0, "spread": 0.1, "fraction_of_bandwidth": 1.5}
    result = {"model": "m", "backend": "cpu", "isa": "avx2", "threads": 2, "weight_bytes_per_token": 10**8}
    result |= {"read_bandwidth_gb_s": 20.0, "prefill": [], "forms": []}
    for cache, reason in ((32 << 20, "has room in the processor's cache of 33.6 MB"), (0, "other programs")):
        monkeypatch.setattr(bench, "cache_bytes", lambda cache=cache: cache)
        rows = [row | {"more_than_memory": bench._why_more(1e8)}]
        monkeypatch.setattr(bench, "run", lambda *_, seen=rows, **__: result | {"decode": seen})
        code, out, _ = in_process("bench", "m")
        assert code == 0
        assert "150% of the bandwidth (" in out
        assert reason in out


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
    sizes += ("--parallel", 2, "--parallel", 3) if bits == "8" else ("--rows", 5, "--rows", 9)
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
    assert ("parallel" in result, "rows" in result) == (bits == "8", bits == "16")
    for row, n in zip(result.get("rows", ()), (1, 5, 9), strict=False):
        assert row["rows"] == n
        assert row["times_one"] == pytest.approx(row["step_s"] / result["rows"][0]["step_s"])
    if bits == "8":
        one, *others = result["parallel"]
        assert (one["sequences"], one["times_one"]) == (1, 1.0)
        assert [row["sequences"] for row in others] == [2, 3]
        for row in others:
            assert row["times_one"] == pytest.approx(row["tok_s"] / one["tok_s"])


def test_bench_says_what_it_ran(here, monkeypatch):
    from tinychat import synthetic

    monkeypatch.setitem(synthetic.SHAPES, "tiny", synthetic._shape(512, 512, 2, 4, 2, 64, tied=True))
    code, out, err = in_process("bench", "--synthetic", "tiny", "--form", "q8_0", "-p", 8, "-n", 2, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["form"] == "q8_0"
    (form,) = result["forms"]
    assert form["given"] == form["runs_as"] == "8-bit, groups of 32, fp16 scale"
    assert form["bytes"] == form["given_bytes"] == result["weight_bytes_per_token"]
    code, out, err = in_process("bench", "--synthetic", "tiny", "-p", 8, "-n", 2)
    assert code == 0, err
    assert "4-bit, groups of 128, fp16 scale and zero point\n" in out
    assert "run as" not in out


def test_a_form_that_is_none_or_has_no_shape_is_refused(here):
    code, _, err = in_process("bench", "--synthetic", "llama-3.2-1b", "--form", "q9")
    assert (code, "q4_k" in err) == (2, True)
    code, _, err = in_process("bench", "m", "--form", "q4_k")
    assert (code, "tinychat bench --synthetic SHAPE --form q4_k" in err) == (2, True)
    code, _, err = in_process("bench", "--synthetic", "smollm2-135m", "--form", "q4_k")
    assert (code, "of 576" in err) == (2, True)


@pytest.mark.parametrize(
    ("variable", "said"), [("HTTPS_PROXY", "through the proxy http://["), ("HF_ENDPOINT", "is no address")]
)
def test_an_address_that_is_none_is_said_by_doctor(monkeypatch, variable, said):
    from tinychat.cli import doctor

    for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE", "TINYCHAT_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://[")
    assert said in doctor._network()


def test_bench_finds_the_number_of_threads(folder, monkeypatch):
    from tinychat.base import cores

    monkeypatch.setattr(cores, "cores", lambda: cores.Cores(threads=2, logical=2, physical=1))
    sizes = ["-p", "32", "-n", "32", "--rounds", "1"]
    found = json.loads(in_process("bench", folder, "--threads", "auto", "--json", *sizes)[1])
    assert [row["threads"] for row in found["tried"]] == [1, 2]
    assert all(row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0 for row in found["tried"])
    assert (found["default"], found["cores"]) == (2, "1 with 2 threads")
    text = in_process("bench", folder, "--threads", "auto", *sizes)[1]
    assert f"{found['tried'][1]['threads']} threads" in text
    assert "are the best" in text


def test_the_fewest_threads_that_are_nearly_as_fast_are_the_best():
    from tinychat.bench_threads import best

    assert best([(4, 99.0), (8, 100.0), (16, 80.0)]) == 4
    assert best([(4, 90.0), (8, 100.0), (16, 101.0)]) == 8


def test_bench_finds_threads_or_measures_more_not_both(folder):
    code, _, err = in_process("bench", folder, "--threads", "auto", "--rows", "5")
    assert code == 2
    assert "measures prefill and decode only" in err


def test_bench_takes_the_numbers_of_threads_that_loading_takes():
    from tinychat.base.load_options import LoadOptions
    from tinychat.cli.reports import ThreadCount

    setting, kind = LoadOptions.SETTINGS["threads"], ThreadCount()
    assert (kind.min, kind.max) == (setting.low, setting.high)
