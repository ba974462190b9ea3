"""The engine as a child process: JSON lines on stdin and stdout (`python -m tinychat.process.worker`).

Whoever starts it talks to it through `tinychat.process.client`; what they say is in
`tinychat.process.protocol`. When stdin closes (the parent is gone, however it went) the process saves the KV
caches of its chats, if nothing is being answered, and ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import BinaryIO

from tinychat.process.core import Core, Loader, load_model
from tinychat.process.protocol import REQUESTS, EngineEvent, Failed, Reply, from_json, to_json

LAST_SECONDS = 1.5  # that saving may take when the parent is gone
# The engine fills every core, and the screen must wake up among its threads: so it waits half as long for one
# (key to paint p95 43 → 31 ms, p99 58 → 48; `benchmarks/tui_latency.py --only keys`). Alone it is as fast.
NICENESS = 3


class Worker:
    """Reads requests from `source`, writes events to `sink`; `load` as in `Core`."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, load: Loader):
        self.source, self.sink = source, sink
        self.core = Core(self._send, load, _end_without_device)
        self._writing = threading.Lock()

    def run(self) -> None:
        """Serve until the parent is gone; does not return."""
        threading.Thread(target=self._read, daemon=True).start()
        self.core.run()

    def _read(self) -> None:
        for line in self.source:
            try:
                request = from_json(line, REQUESTS)
                problem = "a request that it does not know"
            except ValueError as e:
                request, problem = None, str(e)
            if request is not None:
                self.core.take(request)
            else:
                what = f"The engine was asked something unintelligible ({problem})."
                self._send(Failed(what, "Start tinychat again: it was updated meanwhile.", "answer"))
        last = threading.Thread(target=self.core.save_if_idle, daemon=True)
        last.start()
        last.join(LAST_SECONDS)
        os._exit(0)

    def _send(self, said: EngineEvent | Reply) -> None:
        data = to_json(said)
        with self._writing:
            try:
                self.sink.write(data)
                self.sink.flush()
            except OSError:
                os._exit(0)


def _end_without_device(reason: str) -> None:
    """A new process may have a lost device again; these last words are the reason."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(1)


def serve(load: Loader = load_model) -> None:
    """Talk on stdin and stdout; does not return. What the engine prints goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Neither the engine nor a library may write between our lines, or wait for input.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    Worker(source, sink, load).run()


if __name__ == "__main__":
    serve()
