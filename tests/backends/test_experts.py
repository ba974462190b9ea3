"""The CPU engine's experts: only those that are taken are read, and a row never depends on its neighbours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import expert_layers
import numpy as np
import pytest
from expert_layers import EXPERTS, HIDDEN, TAKEN, layer
from programs import FORMS, ISAS, Bench, quantize_rows

from tinychat.backends.cpu_pack import pack
from tinychat.network.weights import DenseLinear


def run(weights, x, scores, *, isa, threads=2, act_bits=16, normalize=True, residual=None):
    """The experts of a layer, recorded as the backend records a model: float32 [rows, HIDDEN]."""
    from tinychat.backends.cpu_recorder import Buffer, Recorder, Value

    packed = [[pack(w) for w in expert] for expert in weights]
    r = Recorder((), act_bits)
    b = Bench(isa, threads)
    value, columns = Value(HIDDEN, rows=Buffer(HIDDEN, rows=True)), Buffer(EXPERTS)
    out = Buffer(HIDDEN)
    r._record([value.rows, columns, out], lambda p: None)  # what ops before this layer would write
    routes = r.route(Value(EXPERTS, floats=columns), TAKEN, normalize)
    h = r.silu_mul(r.expert_linear(value, [e[:2] for e in packed], routes))
    r.expert_sum(r.expert_linear(h, [e[2:] for e in packed], routes), routes, Value(HIDDEN, floats=out))
    r.records[-1].uses += [value.rows, columns]
    r.build(b.p)
    b.p.array(value.rows.native.floats)[: len(x)] = x
    b.p.array(columns.native)[: len(x)] = scores
    b.p.array(out.native)[: len(x)] = 0 if residual is None else residual
    b.run(len(x))
    return b.view(out.native, len(x))


def truth(weights, x, scores, act_bits, normalize=True):
    """With activations quantized as the kernels do."""

    def seen(w, v):
        if isinstance(w, DenseLinear):
            return v
        perm = getattr(w, "perm", None)
        order = np.arange(len(v)) if perm is None else perm
        out = np.empty_like(v, np.float64)
        out[order] = quantize_rows(v[order][None], act_bits)[0]
        return out

    return expert_layers.truth(weights, x, scores, seen, normalize)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [*FORMS, "fp32", "bf16", "mixed", "act-order"])
def test_experts_compute_what_they_should(kind, isa):
    rng = np.random.default_rng(3)
    weights = layer(rng, kind)
    x = rng.normal(size=(11, HIDDEN)).astype(np.float32)
    scores = rng.normal(size=(11, EXPERTS)).astype(np.float32)
    for act_bits, tolerance in ((16, 2e-3), (8, 2e-2)):
        want = truth(weights, x, scores, act_bits)
        got = run(weights, x, scores, isa=isa, act_bits=act_bits)
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)
    residual = rng.normal(size=(11, HIDDEN)).astype(np.float32)
    got = run(weights, x, scores, isa=isa, normalize=False, residual=residual)
    want = residual + truth(weights, x, scores, 16, normalize=False)
    assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["zeros", "int8", "bf16", "act-order"])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_a_row_is_the_same_alone_and_in_company(kind, act_bits, isa):
    rng = np.random.default_rng(4)
    weights = layer(rng, kind)
    x = rng.normal(size=(40, HIDDEN)).astype(np.float32)
    scores = rng.normal(size=(40, EXPERTS)).astype(np.float32)
    scores[10:30] = scores[10]  # a crowd at three experts
    options = dict(isa=isa, act_bits=act_bits)
    whole = run(weights, x, scores, threads=3, **options)
    for rows in (slice(0, 1), slice(7, 8), slice(5, 16), slice(11, 40)):
        part = run(weights, x[rows], scores[rows], threads=1, **options)
        np.testing.assert_array_equal(part, whole[rows])


def test_experts_that_are_level_are_taken_in_their_order():
    rng = np.random.default_rng(5)
    weights = layer(rng, "fp32")
    x = rng.normal(size=(2, HIDDEN)).astype(np.float32)
    scores = np.array([[0, 1, 0, 1, 1, 1, 0], [2] * EXPERTS], np.float32)
    got = run(weights, x, scores, isa=ISAS[0])
    ahead = scores.copy()
    ahead[0, 5], ahead[1, 3:] = 0.5, 0
    want = truth(weights, x, np.where(ahead == scores, scores, -50), 16)
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.skipif("avx512vnni" not in ISAS, reason="needs a CPU with AVX-512-VNNI")
@pytest.mark.parametrize("kind", ["zeros", "int8"])
def test_a_crowd_at_an_expert_is_the_same_in_tiles(kind):
    rng = np.random.default_rng(5)
    weights = layer(rng, kind)
    x = rng.normal(size=(40, HIDDEN)).astype(np.float32)
    scores = np.repeat(rng.normal(size=(2, EXPERTS)), 20, axis=0).astype(np.float32)
    tiles, vectors = (run(weights, x, scores, isa=i, act_bits=8) for i in ("amx-emulated", "avx512vnni"))
    np.testing.assert_array_equal(tiles, vectors)


def test_scores_that_are_no_numbers_stay_in_their_row():
    rng = np.random.default_rng(6)
    weights = layer(rng, "zeros")
    x = rng.normal(size=(4, HIDDEN)).astype(np.float32)
    scores = rng.normal(size=(4, EXPERTS)).astype(np.float32)
    clean = run(weights, x, scores, isa=ISAS[0])
    scores[1], scores[2, 3] = np.nan, np.nan
    got = run(weights, x, scores, isa=ISAS[0])
    np.testing.assert_array_equal(got[[0, 3]], clean[[0, 3]])
    assert not np.isfinite(got[1]).any()


GUARDED = """
import ctypes, json, sys
from pathlib import Path
import numpy as np
from tinychat.backends import pack_store
from tinychat.backends.interface import Step
from tinychat.backends.cpu import CpuBackend
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weight_policy import WeightPolicy

loaded = []
opened = pack_store.opened
pack_store.opened = lambda *a: loaded.append(opened(*a)) or loaded[-1]
checkpoint = HFCheckpoint(Path(sys.argv[1]))
cpu = CpuBackend(checkpoint, WeightPolicy("rtn"), threads=2, act_bits=16)
ids, table = np.arange(30, 50, dtype=np.int32), np.arange(4, dtype=np.int32)
cpu.allocate_kv(4)
cpu.step(Step.of(ids[:19], 0, 0, table, 19))
before = cpu.step(Step.of(ids[19:], 19, 19, table, 0))
libc, guarded = ctypes.CDLL(None, use_errno=True), 0
for layer, experts in enumerate(json.loads(sys.argv[2])):
    for e in set(range(checkpoint.config.n_experts)) - set(experts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            entry = loaded[0].index["linears"][f"model.layers.{layer}.mlp.experts.{e}.{part}"]
            data = loaded[0].array(entry["data"], np.uint8)
            assert data.ctypes.data % 4096 == 0
            pages = ctypes.c_size_t(-(-data.nbytes // 4096) * 4096)
            assert libc.mprotect(ctypes.c_void_p(data.ctypes.data), pages, 0) == 0
            guarded += 1
after = cpu.step(Step.of(ids[19:], 19, 19, table, 0))
np.testing.assert_array_equal(before, after)
print(guarded)
"""


def taken_by_the_last_token(checkpoint) -> list[list[int]]:
    """Of each layer, by the reference: what the child's last step takes."""
    from tinychat.backends.interface import Step
    from tinychat.backends.reference import ReferenceBackend
    from tinychat.network.weight_policy import WeightPolicy

    taken = []

    class Watched(ReferenceBackend):
        def route(self, scores, n, normalize, *args, **named):
            experts, weights = super().route(scores, n, normalize, *args, **named)
            taken.append(experts[-1].tolist())
            return experts, weights

    b = Watched(checkpoint, WeightPolicy("rtn"), kv_bits=16)
    b.allocate_kv(4)
    b.step(Step.of(np.arange(30, 50, dtype=np.int32), 0, 0, np.arange(4, dtype=np.int32), 19))
    return taken


def test_decoding_reads_no_byte_of_experts_that_no_token_takes(tmp_path):
    """Their pages are made unreadable: a load from one ends the process, as it does for one that is taken."""
    from families import CASES, random_model

    from tinychat.formats.hf import HFCheckpoint

    random_model("Qwen3MoeForCausalLM", **CASES["qwen3moe"][1]).save_pretrained(tmp_path / "model")
    taken = taken_by_the_last_token(HFCheckpoint(tmp_path / "model"))
    environment = os.environ | {"TINYCHAT_HOME": str(tmp_path)}

    def decode(readable: list[list[int]]) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", GUARDED, str(tmp_path / "model"), json.dumps(readable)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    done = decode(taken)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3 * 12 * 3  # layers, experts not taken, linears
    assert decode([taken[0], taken[1][1:], taken[2]]).returncode == -signal.SIGSEGV
