"""That the emulation is strict: what would be a race or undefined on a GPU is found, not smoothed over."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from emulation import HostCompiler, bench, needs_emulation

from tinychat.kernels_cuda import modules
from tinychat.kernels_cuda.driver import DeviceError

pytestmark = needs_emulation

SOURCE = """
#include "device.cuh"

// Every thread shows its number to its opposite in the block.
template <bool BARRIER>
DEVICE void swap(float* to) {
    __shared__ float shared[64];
    shared[threadIdx.x] = threadIdx.x;
    if constexpr (BARRIER) __syncthreads();
    to[threadIdx.x] = shared[63 - threadIdx.x];
    if constexpr (BARRIER) __syncthreads();
    shared[threadIdx.x] = -1;
}
extern "C" __global__ void good(float* to) { swap<true>(to); }
EXPORT(good)
extern "C" __global__ void no_barrier(float* to) { swap<false>(to); }
EXPORT(no_barrier)

extern "C" __global__ void divergent(float* to) {
    if (lane_id() < 20) to[threadIdx.x] = shuffle_xor(1.0f, 1);
}
EXPORT(divergent)

extern "C" __global__ void leaves_early(float* to) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    to[threadIdx.x] = 1;
}
EXPORT(leaves_early)

template <bool WAIT>
DEVICE void fetch(float* to, const float* from) {
    __shared__ float __align__(16) shared[4 * 64];
    shared[4 * threadIdx.x] = -1;
    copy_once<16>(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, evict_first());
    copy_commit();
    if (WAIT) copy_wait<0>();
    to[threadIdx.x] = shared[4 * threadIdx.x];
}
extern "C" __global__ void waits(float* to, const float* from) { fetch<true>(to, from); }
EXPORT(waits)
extern "C" __global__ void does_not_wait(float* to, const float* from) { fetch<false>(to, from); }
EXPORT(does_not_wait)
extern "C" __global__ void misaligned(float* to, const float* from) { fetch<true>(to, from + 1); }
EXPORT(misaligned)
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(kernel, *arguments)` with 64 threads: what they wrote."""
    folder = tmp_path_factory.mktemp("kernels")
    for name in ("device.cuh", "host.h"):
        shutil.copy(modules.SOURCES / name, folder)
    (folder / "strict.cu").write_text(SOURCE)
    image, _ = HostCompiler().compile(folder / "strict.cu", [], "host", {})
    b = bench()
    module = b.device.module(image)

    def run(name, *arguments):
        to = b.put(np.full(64, 7, np.float32))
        try:
            b.device.launch(b.device.kernel(module, name), (1,), 64, to, *arguments)
            return b.get(to, 64)
        finally:
            b.device.lost = None  # as if it had been a process of its own

    return run


def test_a_missing_barrier_shows(launch, monkeypatch):
    right = np.arange(63, -1, -1)
    np.testing.assert_array_equal(launch("good"), right)
    wrong = (launch("no_barrier") != right).any()
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    np.testing.assert_array_equal(launch("good"), right)
    assert wrong or (launch("no_barrier") != right).any()


@pytest.mark.parametrize("name", ["divergent", "leaves_early"])
def test_a_collective_that_not_all_reach_fails_and_the_next_launch_works(launch, name):
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        launch(name)
    np.testing.assert_array_equal(launch("good"), np.arange(63, -1, -1))


def test_what_is_copied_in_the_background_comes_when_waited_for(launch):
    numbers = np.arange(256, dtype=np.float32)
    source = bench().put(numbers)
    np.testing.assert_array_equal(launch("waits", source), numbers[::4])
    np.testing.assert_array_equal(launch("does_not_wait", source), -1)
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        launch("misaligned", source)


def test_device_memory_begins_as_nan():
    b = bench()
    assert np.isnan(b.get(b.device.allocate(400), 100)).all()
