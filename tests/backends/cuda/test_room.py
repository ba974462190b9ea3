"""Models that are larger than the GPU: what stays in RAM, what is said of it before, and that no bit of the
answers depends on it.
"""

from __future__ import annotations

import gc
import shlex
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from backend_steps import BLOCKS, IDS, run
from cli_helpers import in_process
from emulation import bench, controls, needs_emulation
from families import CASES, FromTransformers, random_model
from family_gguf import Kind
from memories import allocate
from tiny import TinyCheckpoint, tiny_folder
from tiny_gguf import write

import tinychat
from tinychat import fitting
from tinychat.backends import cuda_pack
from tinychat.backends.cuda import CudaBackend, opened_pack, refuse_unknown
from tinychat.backends.cuda_room import Blocks, Outline, Scales
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.formats import open_checkpoint
from tinychat.network.config import ExpertsConfig
from tinychat.network.weight_policy import WeightPolicy

pytestmark = [needs_emulation, pytest.mark.usefixtures("small_memory")]

CUTS = [40, 1, 5, 1]
POLICY = WeightPolicy()


@pytest.fixture(scope="module")
def mixture():
    cls, changes = CASES["qwen3moe dense layers"]
    return FromTransformers(random_model(cls, **{**changes, "tie_word_embeddings": False}))


class Used:
    """Bytes of the GPU, and pinned ones of the host, that were taken since it was made."""

    def __init__(self):
        gc.collect()
        bench().device.synchronize()
        self.before = controls().fake_used(), controls().fake_host_used()

    def now(self) -> tuple[int, int]:
        bench().device.synchronize()
        return controls().fake_used() - self.before[0], controls().fake_host_used() - self.before[1]


def scales(checkpoint, pack=None) -> Scales:
    memories = refuse_unknown(checkpoint, 16)
    return Scales(pack or opened_pack(checkpoint, POLICY), checkpoint.config, memories, 16)


def loaded(checkpoint, division=None) -> CudaBackend:
    return CudaBackend(checkpoint, POLICY, modules=bench().modules, division=division)


def pinned(checkpoint) -> int:
    """Bytes of the host's that the backend has for results, wherever its weights are."""
    used = Used()
    backend = loaded(checkpoint)
    out = used.now()[1]
    backend.close()
    return out


def all_of(checkpoint, division=None) -> np.ndarray:
    return run(allocate(loaded(checkpoint, division), BLOCKS), IDS, CUTS)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_what_is_planned_is_allocated_and_no_bit_changes(mixture, share):
    """Experts moved; layers moved too."""
    s = scales(mixture)
    whole = s.weigh()
    weights = whole.device - whole.work
    division = s.divide(whole.device - round(share * weights))
    moved = {cuda_pack.EXPERT in name for name in division.away if name.startswith("model.layers.")}
    assert moved == ({True, False} if share > 0.5 else {True})
    assert division.in_ram >= share * weights
    results, used = pinned(mixture), Used()
    backend = loaded(mixture, division)
    on_device, on_host = used.now()
    assert (on_device, on_host - results) == (division.device, division.in_ram)
    assert backend.in_ram == division.in_ram
    np.testing.assert_array_equal(run(allocate(backend, BLOCKS), IDS, CUTS), all_of(mixture))


def test_experts_leave_before_layers_and_what_is_looked_up_before_both(mixture):
    s = scales(mixture)
    whole = s.weigh()
    gone = [s.divide(whole.device - n).away for n in range(1, whole.device - whole.work, 20_000)]
    assert gone[0] == {"model.embed_tokens"}
    for smaller, larger in pairwise(gone):
        assert smaller <= larger
    part = next(away for away in gone if any("mlp.experts" in name for name in away))
    assert all("mlp.experts" in name or name == "model.embed_tokens" for name in part)
    assert s.divide(whole.device - 1).reads == (whole.reads[0], 0, 0)


def test_a_token_reads_of_experts_as_many_as_it_takes(mixture):
    s, mlps = scales(mixture), [layer.mlp for layer in mixture.config.layers]
    read, taken = s.weigh().reads[0], {m.taken / m.n for m in mlps if isinstance(m, ExpertsConfig)}
    experts = sum(n for name, n in s.sizes.items() if ".experts." in name)
    rest = sum(s.sizes.values()) - experts - s.sizes["model.embed_tokens"]
    assert taken == {0.25}
    assert read == round(rest + experts / 4)


def test_memory_that_runs_out_while_weights_are_loaded_moves_them_to_ram():
    checkpoint = TinyCheckpoint(6, tie_embeddings=False)
    s = scales(checkpoint)
    whole = s.weigh()
    expected = all_of(checkpoint)
    cache = BLOCKS * Blocks(checkpoint.config, s.memories, 16).kv_bytes_per_block() + (1 << 20)
    used = Used()
    try:
        taken = controls().fake_used()
        controls().fake_device(12060, 1, 86, taken + whole.device + cache - 50_000)
        division = replace(whole, spare=whole.work + cache)
        backend = allocate(loaded(checkpoint, division), BLOCKS)
        assert 0 < backend.in_ram < whole.device - whole.work
        assert used.now()[0] <= whole.device + cache - 50_000
        np.testing.assert_array_equal(run(backend, IDS, CUTS), expected)
        with pytest.raises(MemoryBudgetError, match="not enough memory"):
            loaded(checkpoint, replace(division, spare=None))
    finally:
        controls().fake_device(12060, 1, 86, 8 << 30)


@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.MXFP4, Kind.BF16], ids=lambda k: k.name
)
def test_the_outline_of_a_pack_weighs_what_the_pack_does(tmp_path, kind):
    write(tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    cfg, memories = checkpoint.config, refuse_unknown(checkpoint, 8)
    outline = Scales(Outline(checkpoint, POLICY), cfg, memories, 8).weigh()
    assert outline == Scales(opened_pack(checkpoint, POLICY), cfg, memories, 8).weigh()


@pytest.mark.parametrize("case", ["qwen3.5", "falcon-h1"])
def test_the_outline_has_gates_convolutions_and_states(case, monkeypatch):
    cls, changes = CASES[case]
    checkpoint = FromTransformers(random_model(cls, **changes))
    monkeypatch.setattr(checkpoint, "stored", lambda name: (checkpoint.linear(name).form, 0), raising=False)
    cfg, memories = checkpoint.config.without_further, refuse_unknown(checkpoint, 16)
    outline = Scales(Outline(checkpoint, POLICY), cfg, memories, 16).weigh()
    assert outline == Scales(opened_pack(checkpoint, POLICY), cfg, memories, 16).weigh()


def test_ram_that_cannot_be_pinned_is_said_as_what_it_is(mixture):
    division = scales(mixture).divide(scales(mixture).weigh().device - 100_000)
    _, pinned_now = Used().before
    controls().fake_host(pinned_now + 50_000)
    try:
        with pytest.raises(MemoryBudgetError, match="does not pin as much of RAM") as e:
            loaded(mixture, division)
    finally:
        controls().fake_host(8 << 30)
    assert "--gpu-memory" in e.value.todo


# Loading


@pytest.fixture(autouse=True)
def fast_bus(monkeypatch):
    """What leaves the GPU is read by it, not computed by the CPU."""
    monkeypatch.setattr("tinychat.backends.cuda_device.rates", lambda device: (1e4, 1e3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", tie_embeddings=False)


def needs(folder, ctx=256) -> int:
    """Bytes of the GPU that all of it takes."""
    checkpoint = open_checkpoint(folder)
    how = fitting.Fitting(checkpoint, POLICY, tinychat.LoadOptions(ctx=ctx), refuse_unknown(checkpoint, 16))
    return how.scales().weigh().device + how.cache(ctx)


def answer(folder, **options):
    said = []
    with tinychat.load(folder, device="cuda", draft="none", ctx=256, progress=said.append, **options) as m:
        text = "".join(e.text for e in m.generate("a", max_tokens=8, temperature=0.9, seed=1))
        return text, m.describe().get("in_ram", 0), m.backend.free_memory(), said


def test_a_model_larger_than_its_share_of_the_gpu_says_the_same(machine_with_gpu, folder):
    text, in_ram, _, said = answer(folder)
    assert not in_ram
    limit = needs(folder) - 40_000
    again, in_ram, free, said = answer(folder, gpu_memory=limit / 1e9)
    assert again == text
    assert 40_000 <= in_ram < 150_000
    assert 0 < free < fitting.HEADROOM + 100_000  # what it may still take, whoever gives memory back
    (line,) = (line for line in said if "stay in RAM" in line)
    assert "read over the bus: the embedding, linears of" in line
    assert "tokens a second" in line


def test_what_ram_has_no_room_for_is_refused_before_it_is_loaded(machine_with_gpu, folder, monkeypatch):
    monkeypatch.setattr(fitting, "available_memory", lambda: 1_000_000)
    with pytest.raises(MemoryBudgetError, match=r"do not fit the GPU, and of RAM 1\.0 MB are free") as e:
        answer(folder, gpu_memory=(needs(folder) - 40_000) / 1e9)
    assert in_process(*shlex.split(e.value.todo.partition("tinychat ")[2]))[0] == 0


@pytest.mark.parametrize("wrong", [-1, 0, float("nan"), float("inf"), "8", "all", True, [8]])
def test_what_is_no_amount_of_memory_is_refused_before_anything_is_read(wrong):
    with pytest.raises(UsageError, match=r"gpu_memory") as e:
        tinychat.load("no-such-model", gpu_memory=wrong)
    assert "GB" in e.value.todo


def test_more_than_the_gpu_has_and_too_little_to_work_in_are_refused(machine_with_gpu, folder):
    with pytest.raises(MemoryBudgetError, match=r"asks for 64\.0 GB; of Emulated GPU's 8\.. GB") as e:
        answer(folder, gpu_memory=64)
    most = float(e.value.todo.split()[2])
    assert answer(folder, gpu_memory=most)[1] == 0  # the advice holds
    with pytest.raises(MemoryBudgetError, match="too little for what cannot lie in RAM"):
        answer(folder, gpu_memory=0.003)


def test_a_gpu_that_shares_the_memory_leaves_nothing_there(folder):
    checkpoint = open_checkpoint(folder)
    options = tinychat.LoadOptions(ctx=256)
    how = fitting.Fitting(checkpoint, POLICY, options, refuse_unknown(checkpoint, 16))
    with pytest.raises(MemoryBudgetError, match="Orin's memory"):
        how.division(fitting.Gpu("Orin", needs(folder) - 1, shares=True))
    assert how.division(fitting.Gpu("Orin", needs(folder), shares=True)).spare is None


def test_auto_takes_the_cpu_where_half_a_gpu_would_be_slower(machine_with_gpu, folder, monkeypatch):
    monkeypatch.setattr(fitting.Fitting, "rate", lambda self, division, gpu: 1e-3)
    limit = (needs(folder) - 40_000) / 1e9
    with pytest.warns(RuntimeWarning, match="CPU is used: .* would be slower with a part"):
        m = tinychat.load(folder, device="auto", ctx=256, gpu_memory=limit)
    assert m.describe()["backend"] == "cpu"
    m.close()
    assert answer(folder, gpu_memory=limit)[1] > 0  # who asks for it has it


# `tinychat show --fit`


def test_show_says_what_would_lie_where(folder):
    limit = (needs(folder) - 40_000) / 1e9
    code, out, _ = in_process("show", folder, "--fit")
    assert code == 0
    assert "runs on" in out
    code, out, _ = in_process("show", folder, "--fit", "--ctx", "256", "--gpu-memory", f"{limit!r}")
    assert "stay in RAM (read over the bus: the embedding" in out
    assert in_process("show", folder, "--ctx", "5")[0] == 2


def test_where_nothing_fits_show_names_what_would(demo_gguf, monkeypatch):
    checkpoint = open_checkpoint(demo_gguf)
    options = tinychat.LoadOptions(ctx=8192)
    cpu = fitting.Fitting(checkpoint, POLICY, options).on_cpu()
    need = cpu.weights + cpu.cache + fitting.HEADROOM
    monkeypatch.setattr(fitting, "available_memory", lambda: need - 60_000_000)
    advice = fitting.facts(checkpoint, options, None)["advice"]
    assert [line.split(":")[0].split()[0] for line in advice] == ["--ctx", "--kv-bits"]
    assert fitting.facts(checkpoint, options, None)["takes"] is None
    n = int(advice[0].split(":")[0].split()[1])
    for better in (tinychat.LoadOptions(ctx=n), tinychat.LoadOptions(ctx=8192, kv_bits=8)):
        assert fitting.facts(checkpoint, better, None)["takes"] == "cpu"
    monkeypatch.setattr(fitting, "available_memory", lambda: 1000)
    assert "other programs" in fitting.facts(checkpoint, options, None)["advice"][0]
