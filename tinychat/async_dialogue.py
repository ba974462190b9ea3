"""A conversation for programs with an event loop: `async for event in session.asend("…")`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinychat.base.aside import Aside, Work
from tinychat.base.events import Event
from tinychat.dialogue import Dialogue

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tinychat.keywords import SamplingKeywords


class AsyncDialogue(Dialogue):
    """Base of conversations that coroutines hold too.

    Each answer is made in a thread of its own, a few events ahead of the reader at most. What is wrong is
    raised with the first event. Cancelling the task that reads stops the answer between two steps, and so
    does a `break`; what was said stays, and the next message waits until the answer has stopped.
    """

    def __init__(self, system: str | None, params: Any):
        super().__init__(system, params)
        self._works: list[Work[Event]] = []  # in the order in which they began

    def asend(
        self,
        text: str,
        *,
        attachments: Sequence[dict[str, str]] = (),
        tools: Iterable[Callable[..., Any] | Mapping[str, Any]] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> Aside[Event]:
        """`send` for coroutines."""
        return self._aside(lambda: self.send(text, attachments=attachments, tools=tools, **sampling))

    def asend_results(
        self, results: Mapping[str, str] | Iterable[str], **sampling: Unpack[SamplingKeywords]
    ) -> Aside[Event]:
        """`send_results` for coroutines."""
        return self._aside(lambda: self.send_results(results, **sampling))

    def aregenerate(self, **sampling: Unpack[SamplingKeywords]) -> Aside[Event]:
        """`regenerate` for coroutines."""
        return self._aside(lambda: self.regenerate(**sampling))

    def ago_on(self, **sampling: Unpack[SamplingKeywords]) -> Aside[Event]:
        """`go_on` for coroutines."""
        return self._aside(lambda: self.go_on(**sampling))

    def aedit(
        self,
        node: int,
        text: str,
        *,
        attachments: Sequence[dict[str, str]] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> Aside[Event]:
        """`edit` for coroutines."""
        return self._aside(lambda: self.edit(node, text, attachments=attachments, **sampling))

    def _aside(self, make: Callable[[], Generator[Event, None, None]]) -> Aside[Event]:
        return Aside(make, self.cancel, self._begun)

    def _begun(self, work: Work[Event]) -> None:
        self._works = [*(w for w in self._works if w.is_alive()), work]

    def _check_free(self) -> None:
        """Raise UsageError while an answer is being made. One that was cancelled, or whose reader is gone, is
        waited for: that is one step.
        """
        for work in self._works:
            if work is threading.current_thread():
                break
            if work.left or self._cancel.is_set():
                work.finish()
        super()._check_free()
