"""Fuzzing in child processes: each damaged input is read or refused in two lines, in little time and memory.

A `fuzz_*.py` beside this file names its cases and calls `run`; they are slow, so:

    TINYCHAT_FUZZ_MINUTES=60 TINYCHAT_FUZZ_SEED=1 pytest -m slow tests/fuzz/fuzz_gguf.py

Whatever goes wrong is listed with its case, seed and number, and its input is kept; `again` makes one anew.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinychat.base.errors import TinychatError

MEMORY = 2 << 30  # bytes that a case may take beyond what the process has
SECONDS = 30.0
READ, REFUSED = 0, 3  # exit codes of a child; anything else is a fault


@dataclass(frozen=True)
class Case:
    """`make` writes a damaged input into an empty folder and returns its path; `check` reads it."""

    make: Callable[[np.random.Generator, Path], Path]
    check: Callable[[Path], object]


@dataclass
class Report:
    """How many inputs were read and refused, and what went wrong: one text each."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(self.counts.items()))
        return "\n".join([f"{counts}; slowest {self.slowest:.1f} s", *self.faults])


def minutes(default: float = 0.5) -> float:
    """How long to go on: TINYCHAT_FUZZ_MINUTES."""
    return float(os.environ.get("TINYCHAT_FUZZ_MINUTES", default))


def first_seed() -> int:
    """TINYCHAT_FUZZ_SEED, 0 without it."""
    return int(os.environ.get("TINYCHAT_FUZZ_SEED", 0))


def again(case: Case, seed: int, number: int, folder: Path) -> Path:
    """The input that `run` made as `number` of `seed`."""
    return case.make(np.random.default_rng([seed, number]), folder)


def run(cases: Mapping[str, Case], seed: int, minutes: float, most_faults: int = 20) -> Report:
    """Damaged inputs of all cases in turn until the time is over, each read by a child of its own.

    A child may take MEMORY more address space than this process has, and SECONDS. A fault is any exception
    that is not a TinychatError, a message that calls itself a bug, a signal, and a limit that is reached.
    """
    report, names, number = Report(), sorted(cases), 0
    end = time.monotonic() + 60 * minutes
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    while time.monotonic() < end and len(report.faults) < most_faults:
        name = names[number % len(names)]
        folder = kept / f"{name}-{seed}-{number}"
        folder.mkdir()
        path = again(cases[name], seed, number, folder)
        began = time.monotonic()
        what = _in_child(cases[name].check, path)
        report.slowest = max(report.slowest, time.monotonic() - began)
        report.counts[f"{name} {what if what in ('read', 'refused') else 'fault'}"] += 1
        if what in ("read", "refused"):
            shutil.rmtree(folder)
        else:
            report.faults.append(f"{name}, seed {seed}, number {number}, kept as {path}:\n{what}")
        number += 1
    if not report.faults:
        shutil.rmtree(kept)
    return report


def _in_child(check: Callable[[Path], object], path: Path) -> str:
    """ "read", "refused", or what went wrong."""
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            _child(check, path, said.fileno())
        code = _wait(pid)
        said.seek(0)
        text = said.read()[-4000:].decode("utf-8", "replace")
    if code is None:
        return f"it took more than {SECONDS} s"
    if code < 0:
        return f"it ended by {signal.Signals(-code).name}\n{text}"
    return {READ: "read", REFUSED: "refused"}.get(code, text or f"it ended with code {code}")


def _child(check: Callable[[Path], object], path: Path, said: int) -> None:
    """Does not return."""
    code = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        with contextlib.suppress(OSError, ValueError):
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        check(path)
        code = READ
    except TinychatError as e:
        code = REFUSED
        if "bug" in e.todo or "\n" in e.what or "\n" in e.todo:
            code = 1
            os.write(2, str(e).encode("utf-8", "replace"))
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _wait(pid: int) -> int | None:
    """The exit code (negative: the signal), or None when it had to be killed for its time."""
    end, pause = time.monotonic() + SECONDS, 0.0005
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
