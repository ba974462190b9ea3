"""Finding the models of servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from tinychat.base.errors import ModelNotFoundError, UsageError
from tinychat.base.terminal import clean
from tinychat.process import remote
from tinychat.process.address import LONGEST_ID, Address, KeySource, full_name, split_name
from tinychat.process.remote import ATTEMPTS, Listed, ServedModel
from tinychat.process.server import AbortedError, Exchange, Server, ServerError

MOST_MODELS = 1000
_CTX = ("max_model_len", "context_length", "max_context_length", "context_window", "n_ctx")


class Connector:
    """Finds models of servers. Calls may come from any thread; `abort` ends those that wait.

    server: where models are whose names have no address.
    """

    def __init__(self, server: Address, keys: KeySource | None = None):
        self.server, self.keys = server, keys or KeySource(server)
        self._waiting: set[Exchange] = set()
        self._aborts = 0
        self._lock = threading.Lock()

    def __call__(
        self, name: str, options: dict[str, Any], progress: Callable[[str, int, int], None]
    ) -> ServedModel:
        """The model of that name: ID, ID@URL, or @URL for the only one there is. `options`: think.

        Raises TinychatError.
        """
        id, address = split_name(name)
        address = address or self.server
        if len(id) > LONGEST_ID:
            raise UsageError("That name is too long.", f"Use at most {LONGEST_ID} characters.")
        server = Server(address, *self.keys.key(address))
        progress(f"Asking {address.place} for its models", 0, 0)
        found = self._found(server, named=bool(id))
        if not id and len(found) != 1:
            names = ", ".join(list(found)[:8]) + (", …" if len(found) > 8 else "")
            raise ModelNotFoundError(
                f"{address} has {len(found)} models{': ' if found else ''}{names}.",
                "Name one: /model NAME, or tinychat run --server URL NAME.",
            )
        known = _match(id, found) if id else next(iter(found))
        think, effort = options.get("think"), options.get("effort")
        model = ServedModel(server, known or id, found.get(known or ""), think, effort)
        if known is None and found:
            near = get_close_matches(id, found, 1)
            hint = f" It lists {near[0]}." if near else ""
            model.notices.append(f"{address} does not list {clean(id)}: it is asked for it anyway.{hint}")
        return model

    def _found(self, server: Server, named: bool) -> dict[str, Listed]:
        """The models of a server, with a few attempts. One that does not list them may have them still."""
        aborts = self._aborts
        for attempt in range(ATTEMPTS):
            try:
                return self.models(server)
            except ServerError as e:
                if named and e.status in (404, 405, 501):
                    return {}
                if not e.again or attempt == ATTEMPTS - 1:
                    raise
                time.sleep(max(e.wait, remote.WAIT * 2**attempt) / 2)
            if self._aborts != aborts:
                break
        raise ServerError("Asking for models was stopped.", "/model asks again.")

    def models(self, server: Server) -> dict[str, Listed]:
        """A server's models by name."""
        exchange = Exchange()
        with self._lock:
            self._waiting.add(exchange)
        try:
            page = server.ask(exchange, "/models")
        except AbortedError:
            raise ServerError("Asking for models was stopped.", "/model asks again.") from None
        finally:
            with self._lock:
                self._waiting.discard(exchange)
        listed = page.get("data") if isinstance(page, dict) else None
        out: dict[str, Listed] = {}
        for m in listed[:MOST_MODELS] if isinstance(listed, list) else ():
            id = m.get("id") if isinstance(m, dict) else None
            if isinstance(id, str) and 0 < len(id) <= LONGEST_ID and id.isprintable():
                owner = m.get("owned_by")
                out[id] = Listed(_context(m), owner if isinstance(owner, str) else "")
        return out

    def list(self) -> dict[str, Any]:
        """The models of `server`, as the choice of models shows them."""
        found = self.models(Server(self.server, *self.keys.key(self.server)))
        installed = [
            {"name": full_name(id, self.server), "label": id, "ctx": m.n_ctx} for id, m in found.items()
        ]
        return {"installed": installed, "available": [], "server": str(self.server)}

    def abort(self) -> None:
        """Let nobody wait for a server any longer."""
        with self._lock:
            self._aborts += 1
            for exchange in self._waiting:
                exchange.abort()


def _match(id: str, found: dict[str, Listed]) -> str | None:
    """The listed model that a name means: the same, or ollama's and Hugging Face's short forms of it."""
    if id in found:
        return id
    short = [k for k in found if k == f"{id}:latest" or k.rpartition("/")[2].lower() == id.lower()]
    return short[0] if len(short) == 1 else None


def _context(m: dict[str, Any]) -> int:
    meta = m.get("meta")
    for values in (m, meta if isinstance(meta, dict) else {}):
        for key in _CTX:
            if type(n := values.get(key)) is int and 0 < n < 1 << 31:
                return n
    return 0
