"""Renders chat templates in a process of its own: Jinja2's immutable sandbox, with limits of memory and time.

A template is a stranger's code, and one call of it can take gigabytes or hours. So what it may take is
bounded where a bound holds: by the system, for a process that does nothing else. `tinychat.text.rendering`
starts this file as a script, isolated (`python -I -S`), with the folders of its libraries as arguments; it
imports nothing of tinychat. On stdin come requests, on stdout goes an answer to each:

    HEADER  length of the JSON that follows, bytes of memory, seconds of processor time, characters of text
    JSON    {"template": KEY, "source": TEXT or null, "variables": {…} or null}
            `source` comes with the first request of a key; without variables it is compiled only

    ANSWER  kind (one of KINDS), length of the UTF-8 that follows
    UTF-8   the rendered text, or what went wrong

The process ends when stdin does, when memory runs out (so that the next one starts clean), and by SIGXCPU.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import Any, BinaryIO

HEADER = struct.Struct("<QQIQ")
ANSWER = struct.Struct("<cQ")
TEXT, UNCOMPILED, REFUSED, FORBIDDEN, ENDLESS, FAILED = KINDS = (b"t", b"c", b"r", b"s", b"e", b"f")


class _RefusedError(Exception):
    """A template called raise_exception."""


class _EndlessError(Exception):
    """A template made something too large."""


def make_environment() -> Any:
    """Jinja2 as transformers sets it up for chat templates."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks what a model said, for training; here it is just its content."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja2 declares it)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise _RefusedError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    return environment


class Renderer:
    """Answers requests. `base`: bytes of address space that the process had before the first one."""

    def __init__(self, environment: Any, base: int):
        self.environment, self.base = environment, base
        self.templates: dict[int, Any] = {}

    def serve(self, source: BinaryIO, sink: BinaryIO) -> None:
        """Until the requests end."""
        while len(header := source.read(HEADER.size)) == HEADER.size:
            length, memory, seconds, characters = HEADER.unpack(header)
            self._limit(memory, seconds)
            kind, text = self._answer(source, length, characters)
            data = text.encode("utf-8", "surrogatepass")
            sink.write(ANSWER.pack(kind, len(data)) + data)
            sink.flush()
            if kind == ENDLESS:
                return

    def _limit(self, memory: int, seconds: int) -> None:
        """Let the system end this process beyond that; a limit that was there before is never raised."""
        _lower(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)
        if self.base:
            _lower(resource.RLIMIT_AS, self.base + memory)

    def _answer(self, source: BinaryIO, length: int, characters: int) -> tuple[bytes, str]:
        try:
            request = json.loads(source.read(length))
            kind, text = self._render(request)
            return (kind, text) if len(text) <= characters else (ENDLESS, "")
        except (MemoryError, RecursionError):
            return ENDLESS, ""

    def _render(self, request: dict[str, Any]) -> tuple[bytes, str]:
        from jinja2.exceptions import SecurityError

        key = request["template"]
        if request["source"] is not None:
            try:
                self.templates[key] = self.environment.from_string(request["source"])
            except MemoryError:
                raise
            except Exception as e:
                return UNCOMPILED, str(e) or type(e).__name__
        if request["variables"] is None:
            return TEXT, ""
        try:
            return TEXT, self.templates[key].render(request["variables"])
        except _RefusedError as e:
            return REFUSED, str(e)
        except SecurityError as e:
            return FORBIDDEN, str(e)
        except (MemoryError, RecursionError):
            raise
        except Exception as e:
            return FAILED, f"{type(e).__name__}: {e}"


def _lower(what: int, to: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        to = min(to, hard)
    with suppress(OSError, ValueError):  # some systems know no such limit; the other side watches
        resource.setrlimit(what, (to, hard))


def _address_space() -> int:
    """Bytes mapped by this process; 0 where the system does not tell (and limits it badly: macOS)."""
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def _warm_up(environment: Any) -> None:
    """Have all imported that Jinja2 and the library import when they need it: later no file can be opened."""
    import _strptime  # noqa: F401
    import encodings.idna
    import encodings.latin_1
    import encodings.punycode
    import encodings.utf_16  # noqa: F401
    import pprint  # noqa: F401
    import urllib.parse  # noqa: F401

    import jinja2.constants  # noqa: F401

    now = datetime.datetime.now().strftime("%c %Z")  # reads the time zone and the locale
    source = "{{ 'a\\n\\u00e9' | wordwrap(1) }}{{ x | tojson(indent=1) }}{{ x | pprint }}{{ nothing.at_all }}"
    with suppress(Exception):  # as a template that fails, with a traceback
        environment.from_string(source).render(x={"now": now})
    with suppress(Exception):
        environment.from_string("{% nonsense %}")
    for name in environment.filters:
        with suppress(Exception):  # many want more than a text
            environment.call_filter(name, "<b>a</b> &amp; http://b.c")


def main() -> None:
    """Serve on stdin and stdout."""
    sys.path += sys.argv[1:]
    source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # whoever started the program may have it ignored
    environment = make_environment()
    _warm_up(environment)
    # A sandbox that somebody escapes from is still in a process that can neither open nor write a file.
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    base = _address_space()
    _lower(resource.RLIMIT_NOFILE, 3)
    Renderer(environment, base).serve(source, sink)


if __name__ == "__main__":
    main()
