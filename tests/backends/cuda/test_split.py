"""A model of which the CPU computes a part: the same rows whatever runs with them, one cache for the engine,
and answers as near to the GPU's as the CPU's own are.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
from backend_steps import BLOCKS, IDS, TABLE, run
from emulation import bench, controls, needs_emulation
from families import CASES, FromTransformers, random_model, usual_error
from memories import allocate, state_slot, step_of
from recurrent import RecurrentCheckpoint
from tiny import TinyCheckpoint, tiny_folder

import tinychat
from tinychat import fitting
from tinychat.backends.cuda import CudaBackend, opened_pack, refuse_unknown
from tinychat.backends.cuda_room import Division, Scales, divisible
from tinychat.backends.interface import MemorySpec, Step
from tinychat.backends.split import SplitBackend
from tinychat.formats import open_checkpoint
from tinychat.network.weight_policy import WeightPolicy

pytestmark = [needs_emulation, pytest.mark.usefixtures("small_memory")]

POLICY = WeightPolicy()
NEAR = 2e-3  # of the logits' deviation: 16-bit activations on the CPU, halves on the GPU
LAYERS = 4
LONG = "hi there, how are you? " * 4


@pytest.fixture(scope="module")
def windows_and_experts():
    cls, changes = CASES["gpt-oss"]
    return FromTransformers(random_model(cls, **changes))


@pytest.fixture(scope="module")
def expected(windows_and_experts, tmp_path_factory):
    """The GPU's logits of the first ids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYCHAT_HOME", str(tmp_path_factory.mktemp("home")))
        return run(on_gpu(windows_and_experts), IDS, [48])


class WithoutNorm(Division):
    """The CPU has the experts and not the norm before them, so that halves cross."""

    def has_cpu(self, name: str) -> bool:
        return ".mlp." in name


def tiny(**changes):
    return TinyCheckpoint(6, n_layers=LAYERS, **changes)


def on_gpu(checkpoint, **options):
    return allocate(CudaBackend(checkpoint, POLICY, modules=bench().modules, **options), BLOCKS)


def weighed(checkpoint, plan: Division, kv_bits=16) -> Division:
    memories = refuse_unknown(checkpoint, kv_bits)
    return Scales(opened_pack(checkpoint, POLICY), checkpoint.config, memories, kv_bits).weigh(plan)


def split(checkpoint, plan=None, kv_bits=16, **options) -> SplitBackend:
    """The last two layers on the CPU, or what the plan says."""
    division = weighed(checkpoint, plan or Division(layers=frozenset({2, 3})), kv_bits)
    more = {"modules": bench().modules, "kv_bits": kv_bits, "threads": 1, **options}
    return allocate(SplitBackend(checkpoint, POLICY, division, **more), BLOCKS)


PLANS = {
    "the last layer": Division(layers=frozenset({2})),
    "layers between": Division(layers=frozenset({1}), away=frozenset({"model.layers.0.self_attn.o_proj"})),
    "experts": Division(mixtures=frozenset({0, 1, 2})),
    "both": Division(mixtures=frozenset({0, 2}), layers=frozenset({2})),
    "experts without their norm": WithoutNorm(mixtures=frozenset({0, 1, 2})),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_rows_are_near_the_gpus_and_do_not_depend_on_each_other(windows_and_experts, expected, plan):
    gc.collect()
    bench().device.synchronize()
    before = controls().fake_used()
    division = weighed(windows_and_experts, plan)
    b = SplitBackend(windows_and_experts, POLICY, division, modules=bench().modules, threads=1)
    bench().device.synchronize()
    assert controls().fake_used() - before == division.device
    allocate(b, BLOCKS)
    got = run(b, IDS, [40, 1, 1, 1, 5])  # a step of many rows, and graphs
    assert 0 < usual_error(got, expected) < NEAR
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.95
    np.testing.assert_array_equal(run(allocate(b, BLOCKS), IDS, [25, 12, 1, 6, 4]), got)
    one = b.step_greedy(step_of(b, IDS[47:48], 47, 47, TABLE, 0))
    assert one == got[47].argmax()


def test_eight_bits_of_activations_are_farther_where_they_are_asked_for():
    expected = run(on_gpu(tiny()), IDS, [40])
    near, far = (usual_error(run(split(tiny(), act_bits=n), IDS, [40]), expected) for n in (16, 8))
    assert near < NEAR < far < 0.1


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_blocks_can_be_copied_saved_and_put_elsewhere(kv_bits):
    b, other = (split(tiny(), kv_bits=kv_bits) for _ in range(2))
    b.step(Step.of(IDS[:40], 0, 0, TABLE, 40))
    step = Step.of(IDS[40:41], 40, 40, TABLE, 0)
    expected, saved = b.step(step), b.read_blocks(TABLE[:3])
    assert saved.shape == (3, b.kv_bytes_per_block())
    table = TABLE[::-1].copy()
    other.write_blocks(table[:3], saved)
    np.testing.assert_array_equal(other.step(Step.of(IDS[40:41], 40, 40, table, 0)), expected)
    table[1], src = TABLE[5], int(table[1])
    other.copy_block(src, int(TABLE[5]))
    np.testing.assert_array_equal(other.step(Step.of(IDS[40:41], 40, 40, table, 0)), expected)


def test_votes_spread_and_moves_are_those_of_each_layer():
    whole, b = on_gpu(tiny()), split(tiny(), Division(layers=frozenset({1, 3})))
    found = []
    for backend in (whole, b):
        scores = np.ones((1, LAYERS, 2, 48), np.float32)
        backend.step(Step.of(IDS[:40], 0, 0, TABLE, 40, scores, 8))
        apart = np.zeros((3, LAYERS, 2, 48), np.float32)
        backend.step(Step.of(IDS[40:43], 40, 40, TABLE, 3, apart, 3))
        spread = backend.value_spread(TABLE, scores[0, :, :, :43])
        rng = np.random.default_rng(3)  # another choice for each layer and head
        dst = np.stack([rng.permutation(27)[:16] for _ in range(LAYERS * 2)]).reshape(LAYERS, 2, 16)
        src = np.broadcast_to(np.arange(27, 43), dst.shape)
        backend.move_slots(TABLE, src.astype(np.int32), dst.astype(np.int32), slots=43)
        delta = np.broadcast_to(-np.arange(27, dtype=np.int32) // 2, (LAYERS, 2, 27))
        backend.turn_keys(TABLE, np.ascontiguousarray(delta))
        after = backend.step(Step.of(IDS[43:46], 30, 27, TABLE, 0))
        found.append((scores, apart, spread, after))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-2, rtol=2e-2)
    assert found[0][0][0, 3].max() > 1.5  # somebody has voted in the last layer


def test_a_graph_without_room_in_the_middle_of_a_step_changes_nothing():
    def shown(b) -> list[np.ndarray]:
        out = []
        for i in range(4):
            scores = np.zeros((1, LAYERS, 2, 16), np.float32)
            out += [b.step(Step.of(IDS[i : i + 1], i, i, TABLE, 0, scores, 1)), scores]
        return out

    plan = Division(layers=frozenset({1, 3}))
    expected, b = shown(split(tiny(), plan)), split(tiny(), plan)
    replay, count = bench().device.capture(lambda: None).__class__.replay, []

    def fails_once(self):
        count.append(self)
        if len(count) == 5:
            controls().fake_fail(b"cuGraphLaunch", 2)
        replay(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinychat.kernels_cuda.driver.Graph.replay", fails_once)
        got = shown(b)
    assert len(count) >= 5
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_room_for_the_cache_is_what_the_scarcer_device_has(monkeypatch):
    b = split(tiny(), Division(layers=frozenset({3})))
    monkeypatch.setattr(b.cpu, "free_memory", lambda: 1000)
    quarter = b.kv_bytes_per_block() / b.cpu.kv_bytes_per_block()
    assert b.free_memory() == int(1000 * quarter)  # a quarter of each block lies there
    monkeypatch.setattr(b.cpu, "free_memory", lambda: 1 << 50)
    monkeypatch.setattr(b.gpu, "free_memory", lambda: 3000)
    assert b.free_memory() == pytest.approx(4000, rel=0.1)


# Loading


@pytest.fixture
def slow_bus(monkeypatch):
    """The CPU is the faster way to what the GPU has no room for."""
    monkeypatch.setattr("tinychat.backends.cuda_device.rates", lambda device: (1e4, 1e-3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", n_layers=LAYERS, tie_embeddings=False)


class Loaded:
    """A model with a small cache, of which `limit` GB may lie on the GPU, and what loading it said."""

    def __init__(self, folder, limit, draft="none"):
        self.said: list[str] = []
        self.model = tinychat.load(
            folder, draft=draft, device="cuda", ctx=256, kv_budget=112, threads=1, gpu_memory=limit,
            progress=self.said.append,
        )  # fmt: skip
        self.model.tokenizer.eos_ids = frozenset()
        self.session = self.model.session(temperature=0, max_tokens=10)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.model.close()

    def send(self, text: str) -> str:
        return "".join(e.text for e in self.session.send(text))


def test_a_conversation_over_two_devices_drafts_evicts_is_kept_and_goes_on(
    machine_with_gpu, slow_bus, folder, tmp_path
):
    checkpoint = open_checkpoint(folder)
    options = tinychat.LoadOptions(ctx=256)
    how = fitting.Fitting(checkpoint, POLICY, options, refuse_unknown(checkpoint, 16))
    limit = (how.scales().weigh().device + how.cache(256) - 60_000) / 1e9
    with Loaded(folder, limit) as m:
        assert "computed by the CPU: " in " ".join(m.said)
        facts = m.model.describe()
        assert (facts["backend"], facts["beside"]["act_bits"], facts["beside"]["experts"]) == ("cuda", 16, [])
        assert facts["beside"]["layers"] in ([2, 3], [1, 2, 3])
        first = m.send(LONG)
        m.session.save(tmp_path / "kept.json")
        plain = m.send("more of it")
        assert m.session._branch.evicted
    with Loaded(folder, limit, "ngram") as m:
        assert [m.send(LONG), m.send("more of it")] == [first, plain]
    with Loaded(folder, limit) as m:
        m.session = tinychat.Session.load(tmp_path / "kept.json", m.model)
        assert m.send("more of it") == plain


def test_what_cannot_cross_is_known_before_anything_is_loaded(windows_and_experts):
    class Odd(Division):
        def has_cpu(self, name: str) -> bool:
            return ".experts." in name  # the router stays: its choice would have to cross

    with pytest.raises(NotImplementedError, match="routes do not cross"):
        weighed(windows_and_experts, Odd(mixtures=frozenset({0})))
    cfg, memories = windows_and_experts.config, refuse_unknown(windows_and_experts, 16)
    assert divisible(cfg, memories)
    assert not divisible(replace(cfg, streams=2, laurel=4), memories)
    assert not divisible(cfg, (*memories, MemorySpec("tail", (0,), of=0)))


def test_a_layer_with_attention_stays_and_a_layer_may_have_two_memories():
    cls, changes = CASES["falcon-h1"]
    checkpoint = FromTransformers(random_model(cls, **changes))
    cfg, memories = checkpoint.config, refuse_unknown(checkpoint, 16)
    assert divisible(cfg, memories)
    s = Scales(opened_pack(checkpoint, POLICY), cfg, memories, 16)
    plan = s.divide(s.whole.device - (s.whole.device - s.whole.work) * 3 // 4, by_cpu=True)
    assert plan.layers == frozenset(range(1, cfg.n_layers))
    b = allocate(SplitBackend(checkpoint, POLICY, plan, modules=bench().modules, threads=1), BLOCKS)
    assert [len(shares) for shares in b._shares] == [2, 2]
    expected = run(on_gpu(checkpoint), IDS, [20, 1, 1, 5])
    assert usual_error(run(b, IDS, [20, 1, 1, 5]), expected) < NEAR


def test_experts_leave_before_layers_and_layers_from_the_last(windows_and_experts):
    memories = refuse_unknown(windows_and_experts, 16)
    pack = opened_pack(windows_and_experts, POLICY)
    s = Scales(pack, windows_and_experts.config, memories, 16)
    whole, seen = s.weigh(), []
    for part in (0.1, 0.6, 0.9):
        plan = s.divide(whole.device - round(part * (whole.device - whole.work)), by_cpu=True)
        assert plan == s.weigh(replace(plan, spare=None))
        seen.append((sorted(plan.layers), sorted(plan.mixtures)))
    assert seen[0] == ([], [2])
    assert seen[1][1] == [0, 1, 2]
    assert seen[2][0][-1] == 2


def test_states_of_a_layer_lie_where_the_layer_is():
    checkpoint = RecurrentCheckpoint("qwen3_5")
    b = split(checkpoint, Division(layers=frozenset({2})))
    got = run(b, IDS[:40], [30, 1, 5, 4])
    assert usual_error(got, run(on_gpu(checkpoint), IDS[:40], [40])) < NEAR
    np.testing.assert_array_equal(
        run(split(checkpoint, Division(layers=frozenset({2}))), IDS[:40], [40]), got
    )
    memory = next(m for m, spec in enumerate(b.memories) if spec.kind == "state")
    saved = b.read_blocks(np.array([state_slot(40)], np.int32), memory)
    assert saved.shape == (1, b.memories[memory].state_bytes)
    b.write_blocks(np.array([7], np.int32), saved, memory)
    np.testing.assert_array_equal(b.read_blocks(np.array([7], np.int32), memory), saved)
