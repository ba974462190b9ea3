"""The thread pool: several callers, fork, more threads than cores, and quiet when idle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from programs import Bench, random_linear, run_linear

from tinychat.backends.cpu_pack import pack
from tinychat.kernels_cpu import _native


def program(threads: int, seed: int = 0):
    """A linear with many tiles; returns (bench, input buffer, output buffer, weight)."""
    rng = np.random.default_rng(seed)
    w = pack(random_linear(rng, "zeros", 2000, 128, 64))
    b = Bench(threads=threads)
    source = b.p.floats(128)
    mid = b.p.rows(128, False, 8, 64)
    out = b.p.floats(2000)
    b.p.quantize(source, None, mid, False)
    b.p.linear([(w.native, mid, 0)], out, None)
    return b, source, out, w


def test_callers_on_several_threads_take_turns():
    b, source, out, w = program(3)
    x = np.random.default_rng(1).normal(size=(4, 128)).astype(np.float32)
    b.p.array(source)[:4] = x
    expected = run_linear([w], x)
    failures = []

    def call():
        for _ in range(50):
            b.run(4)
            if not np.array_equal(b.view(out, 4), expected):
                failures.append("differs")

    callers = [threading.Thread(target=call) for _ in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_step_works_in_a_forked_child_and_afterwards_in_the_parent():
    b, source, out, _ = program(2)
    x = np.random.default_rng(2).normal(size=(3, 128)).astype(np.float32)
    b.p.array(source)[:3] = x
    b.run(3)
    expected = b.view(out, 3)
    pid = os.fork()
    if pid == 0:  # the child has no pool threads; it must make its own
        code = 1
        try:
            b.p.array(out)[:3] = 0
            for _ in range(5):
                b.run(3)
            code = 0 if np.array_equal(b.view(out, 3), expected) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0
    b.run(3)
    np.testing.assert_array_equal(b.view(out, 3), expected)


def test_idle_threads_use_no_cpu():
    b, *_ = program(4)
    b.run(2)
    time.sleep(0.05)  # past the spin
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_more_threads_than_cores_agree_and_never_hang():
    x = np.random.default_rng(3).normal(size=(5, 128)).astype(np.float32)
    b, source, out, w = program(9)
    b.p.array(source)[:5] = x
    expected = run_linear([w], x, threads=1)
    for _ in range(300):  # an op dealt out twice, or a lost wake-up, shows within a few dozen
        b.p.array(out)[:5] = 0
        b.run(5)
        np.testing.assert_array_equal(b.view(out, 5), expected)


def test_programs_come_and_go():
    def thread_count():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("Threads"))

    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    b, *_ = program(3)
    b.run(1)
    del b
    before = thread_count()
    for i in range(30):
        b, *_ = program(3, i)
        b.run(1)
        del b
    deadline = time.monotonic() + 5  # a thread that was joined may still be on its way out of the kernel
    while thread_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread_count() <= before


@pytest.mark.parametrize("name", ["avx9", "neon" if _native.isas()[0] != "neon" else "avx2"])
def test_an_isa_that_does_not_run_here_is_an_error(name):
    code = "from tinychat.kernels_cpu import _native; _native.isa()"
    r = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TINYCHAT_ISA": name}, capture_output=True, text=True
    )
    assert r.returncode == 1
    assert f"TINYCHAT_ISA={name} is unknown or this CPU does not run it." in r.stderr
    assert "scalar" in r.stderr


def test_cores_follow_the_affinity():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from tinychat.kernels_cpu import _native; print(_native.cores())"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == "1"
