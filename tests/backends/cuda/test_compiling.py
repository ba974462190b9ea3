"""The first time on a GPU: kernels are compiled while the model loads, and whoever waits is told why."""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import BLOCKS, IDS, TABLE
from click.testing import CliRunner
from emulation import bench, cache, needs_emulation
from tiny import TinyCheckpoint, tiny_folder

import tinychat
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.interface import Step
from tinychat.kernels_cuda.modules import Cache, Modules
from tinychat.network.weight_policy import WeightPolicy

pytestmark = needs_emulation


def message() -> str:
    return f"Compiling kernels for {bench().modules.target}, once for this GPU."


class Copying:
    """Compiles by taking what the tests have compiled already; counts."""

    name = "copying 1.0"

    def __init__(self):
        self.made, self.kept = [], cache()

    def target(self, capability):
        return self.kept.compiler.target(capability)

    def compile(self, source, headers, target, defines):
        self.made.append(source.name)
        return self.kept.image(source.name, defines, target), ""


@pytest.fixture
def first_time(tmp_path):
    """Modules with nothing compiled yet; called again: those of the next process."""
    return lambda: Modules(bench().device, Cache(tmp_path / "kernels", Copying()))


def test_loading_says_that_it_compiles_the_first_time_only(first_time, machine_with_gpu, tmp_path):
    folder, heard = tiny_folder(tmp_path / "tiny"), []
    for expected in ([message()], []):
        machine_with_gpu["modules"] = first_time()
        heard.clear()
        with tinychat.load(folder, device="cuda", progress=heard.append) as m:
            assert heard == expected
            assert m.chat([{"role": "user", "content": "hi"}], max_tokens=3, seed=1).token_ids
        assert heard == expected


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_left_to_compile_when_a_model_has_loaded(first_time, tied):
    modules = first_time()
    b = CudaBackend(TinyCheckpoint(3, tie_embeddings=tied), WeightPolicy("rtn"), modules=modules)
    made = sorted(modules.cache.compiler.made)
    assert len(made) >= 6
    b.allocate_kv(BLOCKS)
    scores = np.zeros((1, 2, 2, 80), np.float32)
    b.step(Step.of(IDS[:40], 0, 0, TABLE, 0))
    b.step_greedy(Step.of(IDS[:40], 40, 40, TABLE, 0, scores, 4))
    b.step_largest(Step.of(IDS[:5], 80, 80, TABLE, 0), 0.7)
    table = np.zeros((2, 2, 1), np.int32)
    b.move_slots(TABLE, table, table)
    b.turn_keys(TABLE, table)
    b.value_spread(TABLE, scores[0, ..., :40])
    assert sorted(modules.cache.compiler.made) == made


def test_the_command_line_says_it_beside_the_answer(first_time, machine_with_gpu, tmp_path):
    from tinychat.cli.main import cli

    machine_with_gpu["modules"] = first_time()
    args = ["run", str(tiny_folder(tmp_path / "tiny")), "hi", "--device", "cuda", "--max-tokens", "3"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    assert message() in done.stderr
    assert message() not in done.stdout


def test_the_screen_hears_it_as_it_hears_of_loading(first_time, machine_with_gpu, tmp_path, monkeypatch):
    from tinychat.hub import transfer
    from tinychat.process import worker

    monkeypatch.setattr(transfer, "listener", None)  # load_model sets it
    machine_with_gpu["modules"] = first_time()
    folder, heard = str(tiny_folder(tmp_path / "tiny")), []
    worker.load_model(folder, {"device": "cuda"}, lambda *event: heard.append(event)).close()
    assert heard.index((f"Loading {folder}", 0, 0)) < heard.index((message(), 0, 0))
