"""The CUDA backend against the torch reference. Kernels, launches and graphs are the real ones; only the
device is emulated (emulation.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulation import bench, controls, needs_device, needs_emulation
from families import CASES, FromTransformers, random_model, relative_error
from programs import random_linear
from tiny import TinyCheckpoint, tiny_folder, tiny_model

import tinychat
from tinychat import kvfile, packs
from tinychat.backends import BLOCK, Step
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.reference import ReferenceBackend
from tinychat.config import RopeConfig
from tinychat.errors import MemoryBudgetError, TinychatError, UnsupportedModelError, UsageError
from tinychat.eviction import EvictionPolicy
from tinychat.formats import open_checkpoint
from tinychat.prepare import WeightPolicy
from tinychat.sampling import SamplingParams
from tinychat.speculation import Draft
from tinychat.speculation.control import Controller
from tinychat.speculation.speculator import Speculator
from tinychat.weights import QuantizedLinear

pytestmark = needs_device

BLOCKS = 24


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
IDS = np.random.default_rng(1).integers(0, 258, 300).astype(np.int32)


def cuda(checkpoint, policy=None, **options) -> CudaBackend:
    b = CudaBackend(checkpoint, policy, modules=bench().modules, **options)
    b.allocate_kv(BLOCKS)
    return b


def truth(checkpoint, policy=None, **options) -> ReferenceBackend:
    b = ReferenceBackend(checkpoint, policy, **options)
    b.allocate_kv(BLOCKS)
    return b


def run(backend, ids, cuts, greedy=False):
    """All logits (or ids), the rows fed in pieces of these sizes."""
    at, out = 0, []
    for n in cuts:
        step = Step(ids[at : at + n], at, at, TABLE, 0)
        out.append(backend.step_greedy(step) if greedy else backend.step(step))
        at += n
    return np.concatenate(out)


SHAPES = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "odd": dict(
        hidden_size=96, n_heads=6, n_kv_heads=3, head_dim=24, rope=RopeConfig(dim=24), intermediate_size=160
    ),
    "dense widths": dict(hidden_size=40, n_heads=2, n_kv_heads=1, head_dim=20, rope=RopeConfig(dim=20)),
}


@pytest.mark.parametrize(
    ("shape", "quantize"),
    [(s, q) for s in SHAPES for q in ("auto", "rtn", "none") if s == "odd" or q == "auto"],
)
def test_logits_are_the_references(shape, quantize):
    checkpoint, policy = TinyCheckpoint(3, **SHAPES[shape]), WeightPolicy(quantize)
    cuts = [40, 1, 1, 1, 5, 33]
    expected = run(truth(checkpoint, policy), IDS, cuts)
    got, spread = run(cuda(checkpoint, policy), IDS, cuts), expected.std()
    # Halves as activations, keys, values and probabilities, against fp32 everywhere.
    assert np.abs(got - expected).max() < 0.03 * spread
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.003 * spread


def test_an_8_bit_cache_is_the_references():
    checkpoint, cuts = TinyCheckpoint(3), [40, 1, 1, 5, 33]
    expected = run(truth(checkpoint, kv_bits=8), IDS, cuts)
    got, spread = run(cuda(checkpoint, kv_bits=8), IDS, cuts), expected.std()
    # A value at the border of two codes may fall to either side.
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.01 * spread


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_logits_have_the_same_bits_however_the_tokens_are_cut(kv_bits):
    checkpoint, n = TinyCheckpoint(5, context_length=512), 140
    whole = run(cuda(checkpoint, WeightPolicy("rtn"), kv_bits=kv_bits), IDS, [n])
    for cuts in ([70, *[1] * 20, *[10] * 5], [17, 64, 59]):
        b = cuda(checkpoint, WeightPolicy("rtn"), kv_bits=kv_bits)
        np.testing.assert_array_equal(run(b, IDS, cuts), whole)


# One of each family, with its oddities; the rest is slow.
FAMILIES = (
    "qwen2 window",
    "qwen3",
    "phi3 partial",
    "smollm3 window",
    "olmo2 mha",
    "granite tied",
    "gemma2 caps",
    "gemma3",
)


@pytest.mark.parametrize(
    "case", [c if c in FAMILIES else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_every_family_is_the_references(case):
    cls, changes = CASES[case]
    checkpoint = FromTransformers(random_model(cls, **changes))
    cuts = (60, 1, 7, 1, 20)
    expected = run(truth(checkpoint), IDS, cuts)
    assert relative_error(run(cuda(checkpoint), IDS, cuts), expected) < 5e-3


class Reordered(TinyCheckpoint):
    """4-bit weights whose inputs are permuted (GPTQ's desc_act), and some that are not."""

    def linear(self, name):
        w = super().linear(name)
        n, k = w.shape
        if "embed" in name or "q_proj" in name:
            return w
        rng = np.random.default_rng(len(name))
        q = random_linear(rng, "zeros", n, k, 32)
        perm = rng.permutation(k).astype(np.int32)
        return QuantizedLinear(q.codes, q.scales, zeros=q.zeros, perm=perm)


def test_permuted_inputs_are_put_in_order():
    checkpoint, cuts = Reordered(2), [20, 1, 3]
    expected = run(truth(checkpoint), IDS, cuts)
    assert relative_error(run(cuda(checkpoint), IDS, cuts), expected) < 5e-3


def test_biases_are_added_also_where_only_some_have_one():
    class Some(TinyCheckpoint):
        def linear(self, name):
            w = super().linear(name)
            bias = np.random.default_rng(len(name)).normal(size=w.shape[0]).astype(np.float32)
            return w if "k_proj" in name or "embed" in name else type(w)(w.weight, bias)

    checkpoint = Some(2)
    expected = run(truth(checkpoint), IDS, [20, 1])
    assert relative_error(run(cuda(checkpoint), IDS, [20, 1]), expected) < 5e-3


@needs_emulation
def test_a_whole_step_has_the_same_bits_with_warps_in_another_order(monkeypatch):
    checkpoint, cuts = TinyCheckpoint(6), [40, 1, 5]
    expected = run(cuda(checkpoint, kv_bits=8), IDS, cuts)
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    np.testing.assert_array_equal(run(cuda(checkpoint, kv_bits=8), IDS, cuts), expected)


def test_greedy_is_the_argmax():
    checkpoint, cuts = TinyCheckpoint(6), [80, 1, 5, 20]
    logits = run(cuda(checkpoint), IDS, cuts)
    np.testing.assert_array_equal(run(cuda(checkpoint), IDS, cuts, greedy=True), logits.argmax(axis=1))


def test_only_the_asked_rows_get_logits():
    b = cuda(TinyCheckpoint(7))
    full = b.step(Step(IDS[:20], 0, 0, TABLE, 0))
    np.testing.assert_array_equal(b.step(Step(IDS[:20], 0, 0, TABLE, 17)), full[17:])
    assert b.step(Step(IDS[:20], 0, 0, TABLE, 20)).shape == (0, 258)
    np.testing.assert_array_equal(b.step(Step(IDS[:9], 0, 0, TABLE, 7)), full[7:9])


def test_a_rejected_row_leaves_no_trace():
    b, c = cuda(TinyCheckpoint(8)), cuda(TinyCheckpoint(8))
    b.step(Step(IDS[:30], 0, 0, TABLE, 30))
    c.step(Step(IDS[:30], 0, 0, TABLE, 30))
    c.step(Step(IDS[100:105], 30, 30, TABLE, 5))  # a draft that is then rolled back
    step = Step(IDS[30:33], 30, 30, TABLE, 0)
    np.testing.assert_array_equal(c.step(step), b.step(step))


def test_a_copied_block_holds_what_the_first_held():
    b = cuda(TinyCheckpoint(9))
    b.step(Step(IDS[:20], 0, 0, TABLE, 20))
    expected = b.step(Step(IDS[20:21], 20, 20, TABLE, 0))
    other = TABLE.copy()
    other[1] = TABLE[5]
    b.copy_block(int(TABLE[1]), int(other[1]))
    np.testing.assert_array_equal(b.step(Step(IDS[20:21], 20, 20, other, 0)), expected)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_saved_blocks_can_be_put_elsewhere(kv_bits):
    b = cuda(TinyCheckpoint(9), kv_bits=kv_bits)
    b.step(Step(IDS[:40], 0, 0, TABLE, 40))
    step = Step(IDS[40:41], 40, 40, TABLE, 0)
    expected, saved = b.step(step), b.read_blocks(TABLE[:3])
    assert saved.shape == (3, b.kv_bytes_per_block())
    other = cuda(TinyCheckpoint(9), kv_bits=kv_bits)
    table = TABLE[::-1].copy()
    other.write_blocks(table[:3], saved)
    np.testing.assert_array_equal(other.step(Step(IDS[40:41], 40, 40, table, 0)), expected)


@needs_emulation
def test_a_step_that_was_seen_before_is_one_graph():
    b = cuda(TinyCheckpoint(1))
    b.step(Step(IDS[:20], 0, 0, TABLE, 20))
    for i in range(20, 22):  # run, then captured
        b.step_greedy(Step(IDS[i : i + 1], i, i, TABLE, 0))
    before = controls().fake_launches()
    for i in range(22, 40):
        b.step_greedy(Step(IDS[i : i + 1], i, i, TABLE, 0))
    assert controls().fake_launches() == before
    b.step_greedy(Step(IDS[40:45], 40, 40, TABLE, 0))  # another size
    assert controls().fake_launches() > before


@pytest.mark.parametrize(("rows", "watched", "apart"), [(1, 1, True), (5, 5, True), (40, 32, False)])
def test_scores_are_the_references(rows, watched, apart):
    checkpoint, scores = TinyCheckpoint(3), []
    for b in (truth(checkpoint), cuda(checkpoint)):
        b.step(Step(IDS[:50], 0, 0, TABLE, 50))
        s = np.full((watched if apart else 1, 2, 2, 50 + rows), 2, np.float32)
        b.step(Step(IDS[50 : 50 + rows], 50, 50, TABLE, rows, s, watched))
        scores.append(s - 2)  # they are added to what is there
    np.testing.assert_allclose(scores[1], scores[0], atol=3e-3 * (1 if apart else watched))
    assert scores[1].sum() == pytest.approx(watched * 2 * 4, rel=1e-3)  # layers · heads


@pytest.mark.parametrize("trained", [10**9, 110])
def test_logits_after_an_eviction_are_the_references(trained):
    """Sinks and the most recent: victims do not depend on roundings. 110: keys are turned as well."""
    out = []
    for backend in ("reference", "cuda"):
        with tiny_model(ctx=256, backend=backend) as m:
            m.engine.trained_context = trained
            branch = m.engine.branch(EvictionPolicy("window", 96, 4, 40))
            out.append([m.engine.run(branch, [int(t)], 0)[0] for t in IDS[:135]])
            assert branch.evicted >= 48
    assert relative_error(np.array(out[1]), np.array(out[0])) < 5e-3


class Foresight:
    """Drafts what an earlier run said, every fifth token wrong: windows of all lengths, accepted and not."""

    name = "foresight"

    def __init__(self, ids):
        self.ids = ids

    def begin(self, context):
        self.start = len(context)

    def propose(self, context, k, params, seed):
        at = len(context) - self.start
        return Draft([(t + 1) % 258 if i % 5 == 4 else t for i, t in enumerate(self.ids)][at : at + k])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_chunks_and_eviction_leave_the_answer_as_it_is(temperature, monkeypatch):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=45, top_k=2)
    prompt, answers = [int(t) for t in IDS[:144]], []
    for chunk in (None, 16):
        with tiny_model(ctx=256, backend="cuda", eos_ids=()) as m:
            m.tokenizer.eos_ids = frozenset()
            speculator = Speculator()
            if chunk:
                monkeypatch.setattr(m.engine, "chunk_size", lambda n=chunk: n)
                speculator = Speculator(Foresight(answers[0]), Controller(7))
            branch = m.engine.branch(EvictionPolicy.of("h2o", 112))
            *_, done = m.engine.generate(branch, prompt, params, speculator=speculator)
            answers.append(done.completion.token_ids)
            assert done.stats.evicted_tokens >= 64
    assert done.stats.accepted_tokens > 20
    assert done.stats.drafted_tokens - done.stats.accepted_tokens > 5
    assert len(answers[0]) == 45
    assert answers[0] == answers[1]


def test_the_prefix_cache_changes_nothing():
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        options = dict(temperature=0, max_tokens=20)
        prompt = [int(t) for t in IDS[:70]]
        *_, first = m.generate(prompt, **options)
        *_, again = m.generate(prompt, **options)
        assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, 64)
        assert first.completion.token_ids == again.completion.token_ids


class Unreadable(TinyCheckpoint):
    """A checkpoint whose weights must not be asked for."""

    def linear(self, name):
        raise AssertionError(f"{name} was read")

    vector = linear


def test_the_second_start_reads_the_pack_only(home):
    for policy in (WeightPolicy(), WeightPolicy("rtn")):
        first = run(cuda(TinyCheckpoint(1, tie_embeddings=False), policy), IDS, [9])
        again = run(cuda(Unreadable(1, tie_embeddings=False), policy), IDS, [9])
        np.testing.assert_array_equal(again, first)
    files = list((home / "packs").iterdir())
    assert len(files) == 2
    assert [packs.verify(f) for f in files] == [[], []]


def test_a_damaged_pack_is_made_again(home):
    expected = run(cuda(TinyCheckpoint(1)), IDS, [9])
    (file,) = (home / "packs").iterdir()
    sound = file.read_bytes()
    file.write_bytes(sound[:-1000])
    np.testing.assert_array_equal(run(cuda(TinyCheckpoint(1)), IDS, [9]), expected)
    assert file.read_bytes() == sound


def test_a_full_disk_is_a_warning_and_the_model_answers(home, monkeypatch):
    expected = run(cuda(TinyCheckpoint(1)), IDS, [9])
    (file,) = (home / "packs").iterdir()
    file.unlink()

    def full(self, a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packs._File, "put", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        got = run(cuda(TinyCheckpoint(1)), IDS, [9])
    np.testing.assert_array_equal(got, expected)


@needs_emulation
def test_what_runs_is_described():
    b = cuda(TinyCheckpoint(0))
    facts = b.describe()
    assert facts == dict(
        backend="cuda", isa="sm_86", act_bits=16, kv_bits=16, threads=None, gpu="Emulated GPU"
    )
    assert b.kv_bytes_per_block() == 2 * 2 * BLOCK * 2 * 32 * 2  # layers, heads, slots, K and V, 32 channels
    assert 0 < b.free_memory() < 8 << 30


def test_unknown_settings_and_wrong_steps_are_errors():
    with pytest.raises(UsageError):
        cuda(TinyCheckpoint(0), kv_bits=2)
    with pytest.raises(UnsupportedModelError, match="heads of 272") as e:
        cuda(TinyCheckpoint(0, head_dim=272, rope=RopeConfig(dim=272)))
    assert "--device cpu" in e.value.todo
    b = cuda(TinyCheckpoint(0))
    with pytest.raises(ValueError, match="vocabulary"):
        b.step(Step(np.array([258], np.int32), 0, 0, TABLE, 0))
    with pytest.raises(ValueError, match="cover"):
        b.step(Step(IDS[:20], 0, 0, TABLE[:1], 0))
    with pytest.raises(ValueError, match="not there"):
        b.step(Step(IDS[:20], 0, 0, TABLE + 1, 0))
    with pytest.raises(ValueError, match="513"):
        b.step(Step(np.zeros(513, np.int32), 0, 0, TABLE, 0))
    b.close()
    b.close()
    with pytest.raises(TinychatError, match="closed"):
        b.step(Step(IDS[:1], 0, 0, TABLE, 0))


@needs_emulation
def test_memory_is_given_back():
    import gc

    gc.collect()
    before = controls().fake_used()
    b = cuda(TinyCheckpoint(0))
    b.step(Step(IDS[:20], 0, 0, TABLE, 0))
    assert controls().fake_used() > before
    b.close()
    del b
    gc.collect()
    assert controls().fake_used() == before


# What goes wrong on a GPU


@needs_emulation
def test_no_room_for_the_weights_or_the_cache_is_said_with_numbers():
    controls().fake_fail(b"cuMemAlloc_v2", 2)
    with pytest.raises(MemoryBudgetError, match=r"not enough memory: .* are free") as e:
        cuda(TinyCheckpoint(0))
    assert "--device cpu" in e.value.todo
    b = cuda(TinyCheckpoint(0))
    with pytest.raises(MemoryBudgetError, match="not enough memory"):
        b.allocate_kv(1 << 22)
    b.allocate_kv(BLOCKS)  # a smaller one works after all
    assert b.step(Step(IDS[:3], 0, 0, TABLE, 2)).shape == (1, 258)


@needs_emulation
@pytest.mark.parametrize(
    "call", ["cuLaunchKernel", "cuGraphLaunch", "cuStreamSynchronize", "cuMemcpyHtoDAsync_v2"]
)
def test_a_gpu_that_fails_in_a_chat_is_said_and_the_conversation_is_kept(call):
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        s = m.session(temperature=0, max_tokens=12, draft="none")
        list(s.send("hi"))
        events = s.send("more")
        text = "".join(next(events).text for _ in range(6))
        controls().fake_fail(call.encode(), 719)
        m.backend._program._graphs.pop(next(reversed(m.backend._program._graphs)))  # something is launched
        if call == "cuGraphLaunch":
            text += next(events).text
        with pytest.raises(TinychatError, match="Emulated GPU failed") as e:
            text += "".join(event.text for event in events)
        assert "kept" in e.value.todo
        assert text
        assert [t["role"] for t in s.messages][-2:] == ["user", "assistant"]
        assert s.messages[-1]["content"] == text


def test_nothing_of_cuda_is_loaded_on_the_cpu_and_no_torch_on_cuda():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny import tiny_model\n"
        "import tinychat.model\n"
        "with tiny_model(backend='cpu') as m: m.logits([1, 2])\n"
        "loaded = [n for n in sys.modules if 'tinychat' in n and 'cuda' in n]\n"
        "assert not loaded, loaded\n"
    )
    tests = os.path.join(os.path.dirname(__file__), "..")
    subprocess.run([sys.executable, "-c", code, tests], check=True, env=os.environ)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import tinychat.backends.cuda\n"
        "heavy = {'torch', 'transformers', 'scipy', 'cuda'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, tests], check=True, env=os.environ)


@needs_emulation
def test_the_benchmark_measures_everything_that_it_promises():
    import importlib.util

    file = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", file)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    gpu.ROUNDS = gpu.WARM_UP = gpu.REPEAT = 1
    gpu.LINEAR_ROWS = (1, 5)
    b = CudaBackend(TinyCheckpoint(0, n_layers=1), WeightPolicy("rtn"), modules=bench().modules)
    b.copy_bandwidth = lambda: 100.0
    result = gpu.measure(b, 1000, [0, 20], 40, 1)
    assert (result["gpu"], result["driver"]) == ("Emulated GPU", "CUDA 12.6")
    assert [d["context"] for d in result["decode"]] == [0, 20]
    for d in result["decode"]:
        moved = 1000 + d["context"] * b.kv_bytes_per_block() / BLOCK
        assert d["gb_s"] == pytest.approx(moved / d["ms"] / 1e6)
        assert d["fraction_of_bandwidth"] == pytest.approx(d["gb_s"] / 100)
    assert set(result["step_ms_by_rows"]) == {"1", "2", "3", "4", "5", "8", "9", "16"}
    assert {(w["n"], w["k"]) for w in result["linears"]} == {
        (128, 64),
        (64, 64),
        (192, 64),
        (64, 96),
        (258, 64),
    }
    times = gpu.torch_products(b.cfg, (1, 4), "cpu", "float32")
    assert all(t > 0 for t in times.values())


def test_the_bandwidth_is_that_of_a_copy():
    b = cuda(TinyCheckpoint(0, n_layers=1))
    b.free_memory = lambda: 64 << 20
    assert 0.1 < b.copy_bandwidth() < 10_000


# The choice of device


@pytest.fixture
def machine_with_gpu(monkeypatch):
    """`open_modules` finds the device of these tests, or raises what it is told to."""
    found = {"error": None}

    def open_modules():
        if found["error"]:
            raise found["error"]
        return bench().modules

    monkeypatch.setattr("tinychat.backends.cuda_device.open_modules", open_modules)
    monkeypatch.setattr("tinychat.model.has_gpu", lambda: True)
    monkeypatch.setattr("tinychat.model.AUTO_GPU", True)
    return found


def test_auto_waits_until_the_engine_has_been_run_on_a_gpu(machine_with_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("tinychat.model.AUTO_GPU", False)
    with tinychat.load(tiny_folder(tmp_path / "tiny"), device="auto") as m:
        assert m.describe()["backend"] == "cpu"


def test_auto_takes_the_gpu_and_a_chat_is_kept_with_its_cache(machine_with_gpu, tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    with tinychat.load(folder, device="auto", draft="none") as m:
        assert m.describe()["backend"] == "cuda"
        branch = m.engine.branch()
        m.engine.run(branch, [int(t) for t in IDS[:200]], 200)
        assert kvfile.save(tmp_path / "kv", m, branch)
        with tinychat.load(folder, device="cuda") as again:
            other = again.engine.branch()
            assert kvfile.load(tmp_path / "kv", again, other) == 200
            np.testing.assert_array_equal(again.engine.run(other, [7], 0), m.engine.run(branch, [7], 0))


def test_auto_falls_back_to_the_cpu_and_says_why(machine_with_gpu, tmp_path):
    machine_with_gpu["error"] = UsageError("The GPU is from 2010.", "Use --device cpu.")
    folder = tiny_folder(tmp_path / "tiny")
    with pytest.warns(RuntimeWarning, match="CPU is used: The GPU is from 2010"):
        m = tinychat.load(folder, device="auto")
    assert m.describe()["backend"] == "cpu"
    m.close()
    with pytest.raises(UsageError, match="2010"):
        tinychat.load(folder, device="cuda")


def test_a_model_that_the_gpu_has_no_room_for_is_refused_before_it_is_read(
    machine_with_gpu, tmp_path, monkeypatch
):
    monkeypatch.setattr("tinychat.backends.cuda_device.free_memory", lambda device: 200_000_000)
    folder = tiny_folder(tmp_path / "tiny")
    with pytest.raises(MemoryBudgetError, match="200 MB are free"):
        tinychat.load(folder, device="cuda")
    with pytest.warns(RuntimeWarning, match="CPU is used"), tinychat.load(folder) as m:
        assert m.describe()["backend"] == "cpu"


@pytest.mark.slow
def test_the_demo_model_says_what_the_reference_says(demo_gguf):
    """Teacher-forced on real text: prefill of 96 rows, then a token. Two minutes under emulation."""
    checkpoint = open_checkpoint(demo_gguf)
    text = (Path(__file__).parents[2] / "README.md").read_text()
    ids = np.array(checkpoint.tokenizer().encode(text)[:97], np.int32)
    expected = run(truth(checkpoint), ids, [96, 1])
    got = run(cuda(checkpoint), ids, [96, 1])
    different = got.argmax(axis=1) != expected.argmax(axis=1)
    assert different.sum() <= 2
    best = np.sort(expected[different], axis=1)[:, -2:]  # where they differ, two were nearly alike
    assert (best[:, 1] - best[:, 0] < 0.02 * expected.std()).all()
    assert relative_error(got, expected) < 5e-3
