"""What the backend says of itself and takes from the device: graphs, memory, what the benchmark measures."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backend_steps import IDS, TABLE, cuda
from emulation import bench, controls, needs_device, needs_emulation
from tiny import TinyCheckpoint

from tinychat.backends.cuda import CudaBackend
from tinychat.backends.interface import BLOCK, Step
from tinychat.base.errors import TinychatError, UnsupportedModelError, UsageError
from tinychat.network.config import RopeConfig
from tinychat.network.weight_policy import WeightPolicy

pytestmark = needs_device


@needs_emulation
def test_a_step_that_was_seen_before_is_one_graph():
    b = cuda(TinyCheckpoint(1))
    b.step(Step.of(IDS[:20], 0, 0, TABLE, 20))
    for i in range(20, 22):  # run, then captured
        b.step_greedy(Step.of(IDS[i : i + 1], i, i, TABLE, 0))
    before = controls().fake_launches()
    for i in range(22, 40):
        b.step_greedy(Step.of(IDS[i : i + 1], i, i, TABLE, 0))
    assert controls().fake_launches() == before
    b.step_greedy(Step.of(IDS[40:45], 40, 40, TABLE, 0))  # another size
    assert controls().fake_launches() > before


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
    with pytest.raises(UsageError, match="no KV cache in 4 bits yet"):
        cuda(TinyCheckpoint(0), kv_bits=4)
    with pytest.raises(UnsupportedModelError, match="heads of 272") as e:
        cuda(TinyCheckpoint(0, head_dim=272, rope=RopeConfig(dim=272)))
    assert "--device cpu" in e.value.todo
    b = cuda(TinyCheckpoint(0))
    with pytest.raises(ValueError, match="vocabulary"):
        b.step(Step.of(np.array([258], np.int32), 0, 0, TABLE, 0))
    with pytest.raises(ValueError, match="cover"):
        b.step(Step.of(IDS[:20], 0, 0, TABLE[:1], 0))
    with pytest.raises(ValueError, match="not there"):
        b.step(Step.of(IDS[:20], 0, 0, TABLE + 1, 0))
    with pytest.raises(ValueError, match="513"):
        b.step(Step.of(np.zeros(513, np.int32), 0, 0, TABLE, 0))
    b.close()
    b.close()
    with pytest.raises(TinychatError, match="closed"):
        b.step(Step.of(IDS[:1], 0, 0, TABLE, 0))


@needs_emulation
def test_memory_is_given_back():
    gc.collect()
    before = controls().fake_used()
    b = cuda(TinyCheckpoint(0))
    b.step(Step.of(IDS[:20], 0, 0, TABLE, 0))
    assert controls().fake_used() > before
    b.close()
    del b
    gc.collect()
    assert controls().fake_used() == before


def test_nothing_of_cuda_is_loaded_on_the_cpu_and_no_torch_on_cuda():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny import tiny_model\n"
        "import tinychat.loading\n"
        "with tiny_model(backend='cpu') as m: m.logits([1, 2])\n"
        "loaded = [n for n in sys.modules if 'tinychat' in n and 'cuda' in n]\n"
        "assert not loaded, loaded\n"
    )
    tests = str(Path(__file__).parents[2] / "support")
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
    file = Path(__file__).parents[3] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", file)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    gpu.ROUNDS = gpu.WARM_UP = gpu.REPEAT = 1
    gpu.LINEAR_ROWS = (1, 5)
    b = CudaBackend(TinyCheckpoint(0, n_layers=1), WeightPolicy("rtn"), modules=bench().modules)
    b.bandwidth = lambda: 100.0
    result = gpu.measure(b, 1000, [0, 20], 40, 1)
    assert (result["gpu"], result["driver"]) == ("Emulated GPU", "CUDA 12.6")
    assert [d["context"] for d in result["decode"]] == [0, 20]
    for d in result["decode"]:
        moved = 1000 + d["context"] * b.kv_bytes_per_block() / BLOCK
        assert d["gb_s"] == pytest.approx(moved / d["ms"] / 1e6)
        assert d["fraction_of_bandwidth"] == pytest.approx(d["gb_s"] / 100)
    assert set(result["token_ms_by_what_is_copied_back"]) == {"argmax", "largest", "whole row"}
    assert result["step_ms_with_kernels_one_after_the_other"] is None  # on sm_86
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
    assert 0.1 < b.bandwidth() < 10_000
