"""Chat templates rendered by helper processes, which the system ends when they take too much.

The limits are those of the helper alone, so they hold for whatever a template does, and what this program
does meanwhile cannot touch them. A helper is started when it is first needed (or a little before, `prepare`),
kept, and used by one caller at a time.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tinychat.base.children import trusted_path
from tinychat.base.errors import CheckpointError, TinychatError, UsageError, shortage
from tinychat.text.rendering_helper import (
    ANSWER,
    ENDLESS,
    FAILED,
    FORBIDDEN,
    HEADER,
    KINDS,
    REFUSED,
    UNCOMPILED,
)

# What one rendering may take, and how much more for each byte of the conversation (as JSON).
# Some templates (Gemma 4's) look through all messages for each of them: 1.9 s for 1,000, 7.5 s for 2,000.
SECONDS, SECONDS_A_MEGABYTE, MOST_SECONDS = 2, 40, 25  # of processor time, and up to one more
MEMORY, MEMORY_A_BYTE = 1 << 29, 12
CHARACTERS, CHARACTERS_A_BYTE = 1 << 20, 8  # of text
PATIENCE = 20.0  # seconds of waiting beyond that, for a machine that does other things
LONG = 100_000  # bytes of a conversation that may be too much for an honest template
MAX_SOURCE = 1 << 20  # characters; the longest known templates have 30,000
MAX_REQUEST = 1 << 26
KEPT = 4  # helpers that wait for the next rendering
TEMPLATES = 16  # that one helper keeps compiled
LOOK = 0.05  # seconds between two looks at a helper's memory

_DISTRUST = "Do not trust this checkpoint."
_idle: list[Helper] = []


class HelperGoneError(Exception):
    """A helper process ended without an answer; `code` is its exit code, negative for a signal."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class HelperSlowError(Exception):
    """A helper process gave no answer although it had not used up its processor time."""


class Helper:
    """One process of `rendering_helper`, for one request at a time."""

    def __init__(self):
        self.known: dict[str, int] = {}  # sources that it has compiled, and their keys
        self.killed = False  # by us, for the memory it took
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rendering_helper.py"))]
        passed = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        try:
            self.process = subprocess.Popen(
                [*command, *_folders("jinja2", "markupsafe")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={name: os.environ[name] for name in passed if name in os.environ},
                start_new_session=True,  # the terminal's Ctrl+C is not for it
            )
        except (OSError, ValueError) as e:
            raise shortage(e) or TinychatError(
                f"The process that renders chat templates cannot be started ({_one_line(e)}).",
                "Close other programs, or raise the limit of processes (ulimit -u).",
            ) from e
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def ask(self, source: str, variables: str) -> tuple[bytes, str]:
        """Render (`variables` is JSON; `null`: compile only); the kind of answer and its text.

        Raises HelperGoneError, HelperSlowError; then the helper is no more.
        """
        key = self.known.get(source, len(self.known))
        new = "null" if source in self.known else json.dumps(source)
        data = f'{{"template": {key}, "source": {new}, "variables": {variables}}}'.encode()
        memory, _, characters = limits(len(data))
        seconds = limits(len(variables))[1]  # compiling has no more for a longer source
        until = time.monotonic() + seconds + PATIENCE
        try:
            self._write(HEADER.pack(len(data), memory, seconds, characters) + data, until)
            kind, length = ANSWER.unpack(self._read(ANSWER.size, until, memory))
            if kind not in KINDS or length > 4 * characters:
                raise HelperGoneError(0)
            text = self._read(length, until, memory).decode("utf-8", "surrogatepass")
        except BaseException:
            self.end()
            raise
        if kind != UNCOMPILED:
            self.known[source] = key
        return kind, text

    def end(self) -> int:
        """End the process, unless it has ended; its exit code."""
        with suppress(OSError):
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()
        return self.process.wait()

    def abandon(self) -> None:
        """Let go of a process that belongs to the one that this one was forked from."""
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()
        self.process.returncode = 0  # nobody to wait for

    def _write(self, data: bytes, until: float) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self.process.stdin, select.POLLOUT, until, None)
            try:
                rest = rest[os.write(self.process.stdin.fileno(), rest[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise HelperGoneError(self._code()) from None

    def _read(self, length: int, until: float, memory: int) -> bytes:
        out = bytearray()
        while len(out) < length:
            self._wait(self.process.stdout, select.POLLIN, until, memory)
            try:
                more = os.read(self.process.stdout.fileno(), min(length - len(out), 1 << 20))
            except BlockingIOError:
                continue
            if not more:
                raise HelperGoneError(self._code())
            out += more
        return bytes(out)

    def _wait(self, pipe: Any, event: int, until: float, memory: int | None) -> None:
        """Until the pipe is ready. Ends a process that takes too much memory: not every system does."""
        poll = select.poll()
        poll.register(pipe.fileno(), event)
        while not poll.poll(LOOK * 1000):
            if time.monotonic() > until:
                raise HelperSlowError
            if memory is not None and _resident(self.process.pid) > memory + MEMORY // 4:
                self.killed = True
                self.process.kill()

    def _code(self) -> int:
        try:
            return self.process.wait(1)  # it has closed its side, so it is about to end
        except subprocess.TimeoutExpired:
            return self.end()


def limits(length: int) -> tuple[int, int, int]:
    """Bytes of memory, seconds and characters that a request of `length` bytes may take."""
    seconds = min(SECONDS + SECONDS_A_MEGABYTE * length // 1_000_000, MOST_SECONDS)
    return MEMORY + MEMORY_A_BYTE * length, seconds, CHARACTERS + CHARACTERS_A_BYTE * length


def prepare() -> None:
    """Have a helper ready soon, so that the first rendering does not wait for it."""
    if not _idle:
        with suppress(TinychatError):
            _idle.append(Helper())


def check(source: str) -> None:
    """Raises CheckpointError where a template does not compile."""
    if len(source) > MAX_SOURCE:
        raise CheckpointError(
            f"The chat template has {len(source)} characters; tinychat reads {MAX_SOURCE} at most.", _DISTRUST
        )
    render(source, None)


def render(source: str, variables: dict[str, Any] | None) -> str:
    """The text that a template makes of variables (JSON types).

    Raises UsageError when the template refuses them, CheckpointError when it is broken, computes without end
    or tries what the sandbox forbids, TinychatError when no helper can be had.
    """
    try:
        given = json.dumps(variables)
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(
            f"The messages cannot be handed to the chat template: {_one_line(e)}.",
            "Use strings, numbers, booleans, None, lists and dicts.",
        ) from e
    if len(given) > MAX_REQUEST:
        raise UsageError(
            f"The messages are {len(given) >> 20} MB long.", f"Say less than {MAX_REQUEST >> 20} MB."
        )
    for last in (False, True):
        helper = _take()
        try:
            answer = helper.ask(source, given)
        except HelperGoneError as e:
            if e.code == -signal.SIGXCPU or helper.killed:
                raise _endless(len(given)) from None
            if e.code == -signal.SIGSEGV:
                raise CheckpointError("The chat template crashes its interpreter.", _DISTRUST) from None
            if last:  # the first may have been killed while it waited, or as the system ran out of memory
                raise TinychatError(
                    f"The process that renders chat templates ended ({_reason(e.code)}).",
                    "Free some memory and try again; if it stays so, reinstall tinychat and jinja2.",
                ) from None
        except HelperSlowError:
            raise TinychatError(
                "The process that renders chat templates does not answer.",
                "The machine is very busy, or the process was stopped: try again.",
            ) from None
        else:
            _give_back(helper, answer[0])
            return _said(*answer, len(given))
    raise AssertionError("a request is tried twice")


def _give_back(helper: Helper, kind: bytes) -> None:
    if kind == ENDLESS or len(helper.known) > TEMPLATES or len(_idle) >= KEPT:
        helper.end()
    else:
        _idle.append(helper)


def _take() -> Helper:
    while _idle:
        with suppress(IndexError):  # another thread took it
            helper = _idle.pop()
            if helper.process.poll() is None:
                return helper
            helper.end()
    return Helper()


def _said(kind: bytes, text: str, length: int) -> str:
    if kind == ENDLESS:
        raise _endless(length)
    words = " ".join(text[:1000].split())[:200].rstrip(".") if kind in KINDS[1:] else ""
    if kind == UNCOMPILED:
        raise CheckpointError(
            f"The chat template does not compile: {words}.", "The checkpoint is damaged; pull it again."
        )
    if kind == REFUSED:
        raise UsageError(
            f"The model's chat template refuses these messages: {words}.",
            "Most templates want user and assistant to alternate, after at most one system message.",
        )
    if kind == FORBIDDEN:
        raise CheckpointError(
            f"The chat template tried something that the sandbox forbids: {words}.", _DISTRUST
        )
    if kind == FAILED:
        raise CheckpointError(
            f"The chat template failed: {words}.", "The checkpoint may be damaged; pull it again."
        )
    return text


def _endless(length: int) -> CheckpointError:
    if length < LONG:
        return CheckpointError("The chat template computes without end.", _DISTRUST)
    return CheckpointError(
        f"The chat template takes too much for a conversation of {length // 1000} KB.",
        "Begin a new conversation; if a short one fails too, do not trust this checkpoint.",
    )


def _folders(*packages: str) -> list[str]:
    """Folders of those packages, found without importing them, and not in the working directory."""
    out = []
    for name in packages:
        spec = PathFinder.find_spec(name, trusted_path())
        if spec is None or spec.origin is None:
            raise TinychatError(f"{name} is not installed.", f"Install it: pip install {name}")
        out.append(str(Path(spec.origin).absolute().parent.parent))
    return out


def _resident(pid: int) -> int:
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


def _reason(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:200].rstrip(".") or type(e).__name__


def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    while _idle:
        _idle.pop().abandon()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget)
