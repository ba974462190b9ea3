"""What NVRTC makes of the kernels, instruction by instruction on the CPU (ptx.py), against the reference; and
that this machine finds what compute-sanitizer would.

`TINYCHAT_TEST_DEVICE=ptx pytest tests/kernels_cuda tests/backends` runs every test of the kernels so.
"""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from backend_steps import BLOCKS, IDS, run, truth
from emulation import compiled, controls, driver, needs_emulation
from ptx import PtxCompiler, UnknownInstructionError, translate
from tiny import TinyCheckpoint

from tinychat.backends.cuda import CudaBackend
from tinychat.kernels_cuda import modules
from tinychat.kernels_cuda.driver import Device, DeviceError
from tinychat.kernels_cuda.nvrtc import CompilerMissingError
from tinychat.network.weight_policy import WeightPolicy

try:
    COMPILER, WHY = PtxCompiler(), ""
except CompilerMissingError as e:
    COMPILER, WHY = None, f"{e} pip install nvidia-cuda-nvrtc-cu12"

pytestmark = [needs_emulation, pytest.mark.skipif(COMPILER is None, reason=WHY)]

SOURCE = """
#include "device.cuh"

constexpr int THREADS = 64;
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name(float* to, const float* from)

// Every thread shows its number to its opposite in the block, or in its warp.
DEVICE void fill(float* shared) {
    shared[threadIdx.x] = -1;
    __syncthreads();
}
template <bool BARRIER>
DEVICE void swap(float* to, float* shared) {
    fill(shared);
    shared[threadIdx.x] = threadIdx.x;
    if (BARRIER) __syncthreads();
    to[threadIdx.x] = shared[63 - threadIdx.x];
}
template <bool BARRIER>
DEVICE void swap_in_warp(float* to, float* shared) {
    fill(shared);
    shared[threadIdx.x] = threadIdx.x;
    if (BARRIER) __syncwarp();
    to[threadIdx.x] = shared[threadIdx.x ^ 31];
}
KERNEL(swapped) { __shared__ float shared[64]; swap<true>(to, shared); }
KERNEL(no_barrier) { __shared__ float shared[64]; swap<false>(to, shared); }
KERNEL(swapped_in_warp) { __shared__ float shared[64]; swap_in_warp<true>(to, shared); }
KERNEL(no_warp_barrier) { __shared__ float shared[64]; swap_in_warp<false>(to, shared); }
// A warp's barrier does not hold the other warp.
KERNEL(too_small_a_barrier) {
    __shared__ float shared[64];
    fill(shared);
    shared[threadIdx.x] = threadIdx.x;
    __syncwarp();
    to[threadIdx.x] = shared[63 - threadIdx.x];
}
// Written again before everybody has read.
KERNEL(written_too_early) {
    __shared__ float shared[64];
    swap<true>(to, shared);
    shared[threadIdx.x] = -1;
    __syncthreads();
    to[threadIdx.x] += shared[threadIdx.x];
}
KERNEL(unwritten) {
    __shared__ float shared[64];
    if (threadIdx.x < 63) shared[threadIdx.x] = 1;
    __syncthreads();
    to[threadIdx.x] = shared[threadIdx.x];
}
KERNEL(divergent) { if (lane_id() < 20) to[threadIdx.x] = shuffle_xor(from[0], 1); }
KERNEL(leaves_early) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    to[threadIdx.x] = 1;
}
KERNEL(one_too_far) { to[threadIdx.x] = from[threadIdx.x * 4 + 4]; }
KERNEL(one_too_low) { to[static_cast<int>(threadIdx.x) - 1] = 1; }
KERNEL(not_aligned) {
    float2 v = reinterpret_cast<const float2*>(from + 1)[threadIdx.x];
    to[threadIdx.x] = v.x + v.y;
}

// to[thread] = from[4 · thread], by way of shared memory.
template <bool WAIT, bool BARRIER, int APART>
DEVICE void fetch(float* to, const float* from) {
    __shared__ float __align__(16) shared[4 * 64];
    copy_once<16>(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, evict_first());
    copy_commit();
    if (WAIT) copy_wait<0>();
    if (BARRIER) __syncthreads();
    to[threadIdx.x] = shared[4 * (threadIdx.x ^ APART)];
}
KERNEL(fetched) { fetch<true, false, 0>(to, from); }
KERNEL(fetched_for_another) { fetch<true, true, 1>(to, from); }
KERNEL(not_waited) { fetch<false, true, 0>(to, from); }
KERNEL(fetched_for_another_without_barrier) { fetch<true, false, 1>(to, from); }

KERNEL(blocks_that_race) { if (threadIdx.x == 0) to[blockIdx.x] = to[1 - static_cast<int>(blockIdx.x)] + 1; }
KERNEL(blocks_apart) { if (threadIdx.x == 0) to[blockIdx.x] = from[1 - static_cast<int>(blockIdx.x)] + 1; }
"""

OVERLAPPING = """
#include "device.cuh"

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(64) name(float* to, const float* from)
template <bool WAIT>
DEVICE void fetch(float* to, const float* from) {
    __shared__ float __align__(16) shared[4 * 64];
    let_next_start();
    copy_once<16>(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, evict_first());
    if (WAIT || lane_id()) wait_for_kernels();
    copy_commit();
    copy_wait<0>();
    if (WAIT) to[threadIdx.x] = shared[4 * threadIdx.x];
}
KERNEL(fetches_ahead) { fetch<true>(to, from); }
KERNEL(one_does_not_wait) { fetch<false>(to, from); }
KERNEL(reads_ahead) { float x = from[threadIdx.x]; start(); to[threadIdx.x] = x; }
KERNEL(writes_ahead) { to[threadIdx.x] = 1; start(); }
"""

RACE = "another thread (wrote|read), with no barrier between"  # which one depends on who runs first
WRONG = {
    "no_barrier": RACE,
    "no_warp_barrier": RACE,
    "too_small_a_barrier": RACE,
    "fetched_for_another_without_barrier": "unwritten|cp.async may be writing",
    "blocks_that_race": RACE,
    "written_too_early": RACE,
    "unwritten": "shared memory is read unwritten",
    "not_waited": "cp.async may be writing",
    "divergent": "disagree about a collective",
    "leaves_early": "ended before a barrier",
    "one_too_far": "outside of what is allocated",
    "one_too_low": "outside of what is allocated",
    "not_aligned": "not aligned",
    "one_does_not_wait": "has not waited for the kernels before",
    "reads_ahead": "touched before the kernels before have ended",
    "writes_ahead": "touched before the kernels before have ended",
}
BACKWARDS, TIMES_4 = np.arange(63, -1, -1), np.arange(64) * 4
RIGHT = {
    "swapped": BACKWARDS,
    "swapped_in_warp": np.arange(64) ^ 31,
    "fetched": TIMES_4,
    "fetched_for_another": TIMES_4[np.arange(64) ^ 1],
    "fetches_ahead": TIMES_4,
    "blocks_apart": np.r_[2, 1, np.full(62, 7)],
}


@pytest.fixture(scope="module")
def device():
    """A GPU on which kernels overlap."""
    controls().fake_device(12060, 1, 90, 8 << 30)
    yield Device(driver())
    controls().fake_device(12060, 1, 86, 8 << 30)


@pytest.fixture(scope="module")
def launch(tmp_path_factory, device):
    """`launch(kernel)`: two blocks' or one's work on 64 floats, from 256 that count up."""
    folder, d = tmp_path_factory.mktemp("kernels"), device
    for name in ("device.cuh", "host.h"):
        shutil.copy(modules.SOURCES / name, folder)

    def module(source, target):
        (folder / "strict.cu").write_text(source)
        image, _ = COMPILER.compile(folder / "strict.cu", [folder / "device.cuh"], target, {})
        return dict.fromkeys(re.findall(r"^KERNEL\((\w+)", source, re.M), d.module(image))

    kernels = module(SOURCE, "compute_80") | module(OVERLAPPING, "compute_90")

    def run(name):
        d.lost = None  # as in a process of its own
        to, source = d.allocate(256), d.allocate(1024)
        d.upload(to, np.full(64, 7, np.float32))
        d.upload(source, np.arange(256, dtype=np.float32))
        d.launch(d.kernel(kernels[name], name), (2 if name.startswith("blocks") else 1,), 64, to, source)
        out = np.empty(64, np.float32)
        d.download(out, to)
        return out

    return run


@pytest.mark.parametrize("name", RIGHT)
def test_sound_kernels_run(launch, name):
    np.testing.assert_array_equal(launch(name), RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_unsound_kernels_are_found_and_the_next_launch_works(launch, name, capfd):
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        launch(name)
    assert re.search(WRONG[name], capfd.readouterr().err)
    np.testing.assert_array_equal(launch("swapped"), BACKWARDS)


def test_an_unknown_instruction_is_named():
    text = ".target sm_80\n.visible .entry f(\n)\n.maxntid 32, 1, 1\n{\n\ttanh.approx.f32 \t%f1, %f2;\n}\n"
    with pytest.raises(UnknownInstructionError, match=r"tanh\.approx\.f32 %f1, %f2"):
        translate(text)


@pytest.mark.parametrize(
    "target",
    [pytest.param("compute_90", marks=pytest.mark.long), pytest.param("compute_120", marks=pytest.mark.slow)],
)
def test_a_compiled_model_is_the_references(device, target):
    """A whole step: 4-bit weights, an 8-bit head, an 8-bit cache; prefill, single tokens, a verification.

    For newer targets NVRTC has another way of writing PTX.
    """
    checkpoint, policy, cuts = TinyCheckpoint(3), WeightPolicy("rtn"), [18, 1, 5]
    machine = modules.Modules(device, compiled(COMPILER))
    machine.target = target

    def logits(cuts):
        backend = CudaBackend(checkpoint, policy, kv_bits=8, modules=machine)
        backend.allocate_kv(BLOCKS)
        return run(backend, IDS, cuts)

    before = controls().fake_overlaps()
    got, expected = logits(cuts), run(truth(checkpoint, policy, kv_bits=8), IDS, cuts)
    assert controls().fake_overlaps() > before + 50
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.01 * expected.std()
    np.testing.assert_array_equal(logits([sum(cuts)]), got)
