"""The GPU's self-check: a sound device passes, faults are found and named, and a child may end in any way."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from itertools import count

import numpy as np
import pytest
from click.testing import CliRunner
from emulation import bench, cache, controls, driver, needs_emulation
from tiny import tiny_folder

import tinychat
from tinychat import gpu_check
from tinychat.backends import cuda_device, cuda_proof, cuda_record
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.cuda_record import VARIANTS, Record, Variant
from tinychat.base.errors import TinychatError
from tinychat.kernels_cuda import linear
from tinychat.kernels_cuda.attention import Attention
from tinychat.kernels_cuda.driver import Device, DeviceError, Graph, LostError, SharedMemory
from tinychat.kernels_cuda.modules import Modules


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# The trials, in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def fewer(monkeypatch):
    """Small weights of two forms, and few repetitions."""
    monkeypatch.setattr(gpu_check, "CHECKED", ("gptq4", "q8_0"))
    monkeypatch.setattr(gpu_check, "ROWS", (1, 5, 16))
    monkeypatch.setattr(gpu_check, "SHAPE", (48, 256))
    monkeypatch.setattr(gpu_check, "REPLAYS", 4)


@lru_cache
def trials() -> list[gpu_check.Trial]:
    """Under `fewer`: a model is made once for all tests."""
    return list(gpu_check.trials(bench().modules))


def tried(*wanted: str) -> dict[str, str]:
    """What each trial whose name begins so comes to: nothing, or what is wrong."""
    results = {}
    for name, trial in trials():
        if name.startswith(wanted):
            model = getattr(trial, "__self__", None)
            if model is not None and model._gpu is not None:
                model._gpu._steps.graphs.clear()  # a fault is in what is launched
            try:
                trial()
                results[name] = ""
            except Exception as e:  # as the child has it
                results[name] = f"{type(e).__name__}: {e}"
    return results


def wrong_for(rows: int, spoil):
    launch = linear.launch

    def spoiled(modules, w, x, y, n, *rest, **options):
        launch(modules, w, x, y, n, *rest, **options)
        if n == rows:
            b = bench()
            b.device.upload(y, spoil(b.get(y, (n, w.shape.n))))

    return spoiled


def spoiled(method, spoil):
    """A method of the backend whose results are spoiled by `spoil(result, step, backend)`."""
    whole = getattr(CudaBackend, method)

    def run(self, step, *rest):
        return spoil(whole(self, step, *rest), step, self)

    return CudaBackend, method, run


def fails(error):
    def raises(*_, **__):
        raise error

    return raises


def of_rows(rows, change):
    """Changes what steps of so many rows come to."""
    return lambda got, step, _: change(got) if len(got) == rows else got


def first(found):
    """The largest logits with the first two in the wrong order."""
    for f in found:
        f.ids[:2] = f.ids[1::-1]
    return found


def unseen(self, size):
    """Shared memory of which the device sees zeros, whatever is put there."""
    memory = SharedMemory(self.pinned((size,), np.uint8))
    memory.bytes[:] = 0
    memory.bytes = np.empty_like(memory.bytes)
    return memory


CALLS = count()
FAULTS = {
    "the device does not see what the host has written": (
        (Device, "shared", unseen),
        "weights in RAM",
        "other bits than with weights on the device",
    ),
    "prefill is off": (
        spoiled("step", of_rows(40, lambda a: a * np.float32(1.1))),
        "prefill, 16",
        "logits are off by",
    ),
    "prefill is off with an 8-bit cache": (
        spoiled("step", of_rows(40, lambda a: np.roll(a, 1, 1))),
        "prefill, 8",
        "logits are off by",
    ),
    "infinite logits": (
        spoiled("step", of_rows(40, lambda a: a + np.float32(np.inf))),
        "prefill, 16",
        "logits are off by",
    ),
    "one row alone has other bits": (
        spoiled("step", of_rows(1, lambda a: np.nextafter(a, np.float32(99)))),
        "rows, 16",
        "rows in several steps: other bits",
    ),
    "five rows have other bits with an 8-bit cache": (
        spoiled("step", of_rows(5, lambda a: np.nextafter(a, np.float32(99)))),
        "rows, 8",
        "rows in several steps: other bits",
    ),
    "the wrong token is the largest": (
        spoiled("step_greedy", lambda got, *_: got + 1),
        "choice, 16",
        "argmax: other bits",
    ),
    "the largest logits are in the wrong order": (
        spoiled("step_largest", lambda got, *_: first(got)),
        "choice, 16",
        "the largest logits: other bits",
    ),
    "kernels that overlap read what is not there yet": (
        spoiled("step", lambda got, *_: got + np.float32(next(CALLS) % 2)),
        "overlap, 16",
        "kernels one after the other: other bits",
    ),
    "distances of values that nobody measures": (
        (CudaBackend, "value_spread", lambda self, table, weights: np.zeros_like(weights)),
        "eviction, 16",
        "distances of values are off",
    ),
    "an illegal address": (
        (linear, "launch", fails(LostError("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS"))),
        "linears of gptq4",
        "ILLEGAL_ADDRESS",
    ),
    "too little memory": (
        (Device, "allocate", fails(DeviceError("cuMemAlloc", 2, "CUDA_ERROR_OUT_OF_MEMORY"))),
        "linears of q8_0",
        "OUT_OF_MEMORY",
    ),
    "a device that is lost half-way": (
        (CudaBackend, "step", fails(LostError("cuStreamSynchronize", 719, "CUDA_ERROR_LAUNCH_FAILED"))),
        "rows, 16",
        "LAUNCH_FAILED",
    ),
    "one row count is wrong": (
        (linear, "launch", wrong_for(5, lambda a: a + np.float32(0.01))),
        "linears of gptq4",
        "5 rows are off by 0.01",
    ),
    "nothing is written": (
        (linear, "launch", wrong_for(16, np.zeros_like)),
        "linears of q8_0",
        "16 rows are off by",
    ),
    "not a number": (
        (linear, "launch", wrong_for(1, lambda a: a * np.float32(np.nan))),
        "linears of gptq4",
        "1 rows are off by nan",
    ),
    "another bit in the company of few": (
        (linear, "launch", wrong_for(5, lambda a: np.nextafter(a, np.float32(9)))),
        "linears of gptq4",
        "5 rows have other bits",
    ),
    "a graph that does nothing": (
        (Graph, "replay", lambda self: None),
        "graphs, 16",
        "a step that is repeated: other bits",
    ),
    "keys that do not turn": (
        (Attention, "turn", lambda self, *rest: None),
        "eviction, 16",
        "logits after eviction are off",
    ),
    "slots that do not move": (
        (Attention, "move", lambda self, *rest: None),
        "eviction, 16",
        "logits after eviction are off",
    ),
    "scores that nobody adds up": (
        (Attention, "score", lambda self, *rest: None),
        "eviction, 16",
        "scores are off",
    ),
}


@needs_emulation
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named_and_the_chat_is_the_cpus(fewer, fault, monkeypatch, folder):
    (where, what, instead), trial, message = FAULTS[fault]
    with monkeypatch.context() as m:
        m.setattr(where, what, instead)
        (result,) = tried(trial).items()
    assert message in result[1]
    Record(cuda_record.key_of(bench().modules), False, trials=dict([result])).store()
    monkeypatch.setattr("tinychat.loading.has_gpu", lambda: True)
    monkeypatch.setattr("tinychat.backends.cuda_device.open_modules", lambda tell=None: bench().modules)
    with pytest.warns(RuntimeWarning, match=f"The CPU is used: .* self-check .{result[0]}"):
        model = tinychat.load(folder)
    with model:
        assert model.describe()["backend"] == "cpu"
        assert list(model.generate("hello", max_tokens=2, temperature=0.0))


@needs_emulation
def test_a_sound_device_passes(fewer):
    assert set(tried("linears", "rows, 16", "graphs, 16", "eviction, 16").values()) == {""}


@needs_emulation
@pytest.mark.slow
def test_a_sound_device_passes_every_trial(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "REPLAYS", 3)
    gpu_check.main([json.dumps(vars(VARIANTS[0]))], lambda variant: bench().modules)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    results = {name: result for event in said for name, result in event.get("end", {}).items()}
    assert len(results) == len(gpu_check.CHECKED) + 12 + 1
    assert all(isinstance(result, float) for result in results.values()), results
    assert said[-1] == {"done": True}


@needs_emulation
def test_the_child_says_what_it_does_and_stops_at_what_is_wrong(capsys, monkeypatch):
    def wrong():
        raise gpu_check.WrongError("off by 3")

    trials = [("first", lambda: None), ("second", wrong), ("third", lambda: None)]
    monkeypatch.setattr(gpu_check, "trials", lambda modules: iter(trials))
    gpu_check.main(['{"hints": true, "overlap": false}'], lambda variant: bench().modules)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0]["key"] == cuda_record.key_of(bench().modules)
    assert [e["begin"] for e in said if "begin" in e] == ["first", "second"]
    assert {"end": {"second": "WrongError: off by 3"}} in said
    assert said[-1] == {"done": True}


# Children that end in any way

CHILD = """
import json, os, sys
mode, variant = sys.argv[1], json.loads(sys.argv[2])
sound = {"passes": True, "hints": not variant["hints"], "overlap": not variant["overlap"]}.get(mode, False)
def say(**event): print(json.dumps(event), flush=True)
if mode == "refused": say(refused=["There is no GPU.", "Use --device cpu."]); sys.exit()
say(key="a key", facts={"gpu": "GPU of tests"})
print("what a library says")
say(begin="first"); say(end={"first": 0.5})
say(begin="second")
if not sound:
    if mode == "wrong": say(end={"second": "WrongError: off by 3"}); say(done=True); sys.exit()
    if mode == "silent": sys.exit()
    if mode == "trap": print("illegal instruction", file=sys.stderr, flush=True); os.abort()
    sys.stdin = os.fdopen(os.pipe()[0]); sys.stdin.read()  # hangs
say(end={"second": 0.25}); say(done=True)
"""


def run(mode: str, seconds: float = 30, tell=None) -> Record:
    return cuda_proof.run([sys.executable, "-I", "-S", "-c", CHILD, mode], seconds, tell)


def test_a_device_that_passes_is_kept_as_it_is(home):
    record = run("passes")
    assert (record.passed, record.variant, record.key) == (True, Variant(), "a key")
    assert record.trials == {"first": 0.5, "second": 0.25}
    assert cuda_record.stored() == record
    assert list(home.iterdir()) == [home / "gpu-check.json"]


@pytest.mark.parametrize(
    ("mode", "variant"), [("overlap", VARIANTS[1]), ("hints", VARIANTS[2])], ids=["overlap", "hints"]
)
def test_what_hangs_is_ended_and_done_without(mode, variant):
    heard = []
    record = run(mode, 0.5, heard.append)
    assert (record.passed, record.variant) == (True, variant)
    assert heard[0] == "Checking the GPU."
    assert heard[-1] == f"Checking the GPU without {mode}."


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("wrong", "WrongError: off by 3"),
        ("silent", "the process ended (0)"),
        ("trap", "the process ended (-6)"),
    ],
)
def test_a_device_that_fails_in_every_way_is_not_trusted_and_the_trial_is_named(mode, why):
    record = run(mode)
    assert (record.passed, record.variant) == (False, VARIANTS[-1])
    assert record.trials == {"first": 0.5, "second": why}
    assert cuda_record.stored() == record
    assert ("illegal instruction" in record.facts.get("stderr", "")) == (mode == "trap")


def test_a_machine_without_a_gpu_is_said_and_nothing_is_kept(home):
    with pytest.raises(TinychatError, match="There is no GPU") as e:
        run("refused")
    assert "--device cpu" in e.value.todo
    assert not home.exists()


# What is done with the result


@needs_emulation
def test_the_kept_variant_is_run_with_the_same_kernels_only():
    controls().fake_device(12060, 1, 90, 8 << 30)
    device = Device(driver())
    try:
        opened = Modules(device, cache())
        kept = Record(cuda_record.key_of(opened), True, Variant(hints=False, overlap=False))
        for passed, key, expected in [
            (True, kept.key, kept.variant),
            (False, kept.key, VARIANTS[0]),
            (True, "another", VARIANTS[0]),
        ]:
            kept.passed, kept.key = passed, key
            kept.store()
            assert cuda_record.variant_for(opened) == expected
        assert device.overlaps
        Variant(hints=False, overlap=False).apply(opened)
        assert not device.overlaps
        assert opened._unit("rows.cu", {}) == ("rows.cu", (("HINTS", "0"),))
    finally:
        controls().fake_device(12060, 1, 86, 8 << 30)
        device.close()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"variant": {"x": 1}}', '{"variant": []}'])
def test_a_damaged_record_is_none(home, damage):
    home.mkdir()
    (home / "gpu-check.json").write_text(damage)
    assert cuda_record.stored() is None


@needs_emulation
def test_a_device_is_opened_as_its_check_has_found(monkeypatch):
    monkeypatch.setattr(cuda_device, "compilers", lambda version: iter([cache().compiler]))
    monkeypatch.setattr(cuda_device, "Cache", lambda folder, compiler: cache())
    monkeypatch.setattr(cuda_device, "check", lambda modules: None)
    kept = Record(cuda_record.key_of(bench().modules), True, Variant(hints=False))
    kept.store()
    assert not cuda_device._compiled(bench().device, None).hints
    assert cuda_device._compiled(bench().device, None, Variant()).hints


def test_doctor_shows_what_the_check_came_to(monkeypatch, home):
    from tinychat.cli.main import cli

    facts = {"gpu": "GPU of tests", "bandwidth_gb_s": 900.5}
    sound = Record("k", True, Variant(hints=False), {"linears of q4_k": 1.5}, facts)
    monkeypatch.setattr(cuda_proof, "run", lambda tell: sound)
    done = CliRunner().invoke(cli, ["doctor", "--gpu"])
    assert done.exit_code == 0, done.output
    assert "linears of q4_k" in done.output
    assert "GPU of tests copies 900.5 GB/s" in done.output
    assert "without hints" in done.output
    failed = Record("k", False, VARIANTS[-1], {"linears of q4_k": "the process ended (-6)"}, facts)
    monkeypatch.setattr(cuda_proof, "run", lambda tell: failed)
    done = CliRunner().invoke(cli, ["doctor", "--gpu"])
    assert done.exit_code == 1
    assert "the process ended (-6)" in done.output
    assert "--device cpu" in done.output
    assert str(home / "gpu-check.json") in done.output.replace("\n", "")
    done = CliRunner().invoke(cli, ["doctor", "--gpu", "--json"])
    assert json.loads(done.stdout)["passed"] is False
