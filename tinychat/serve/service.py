"""Everything that the endpoints have in common: models, turns, bodies, counts, and how an answer is begun."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tinychat.base.events import Done, Event
from tinychat.serve import problems
from tinychat.serve.answers import Answer, Work
from tinychat.serve.bodies import Bodies
from tinychat.serve.desk import Desk
from tinychat.serve.limits import Limits
from tinychat.serve.metrics import Metrics
from tinychat.serve.problems import ApiError
from tinychat.serve.rack import Lease, Rack
from tinychat.serve.replies import Reply

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.chat_request import ChatRequest, PromptRequest
    from tinychat.embedding import EmbeddingRequest
    from tinychat.model import Model

    Asking = ChatRequest | PromptRequest | EmbeddingRequest

TIDY_SECONDS = 1.0
SAVE_SECONDS = 15.0  # without work, until conversations are saved


class Service:
    """One server. Made and used on its event loop."""

    def __init__(self, rack: Rack, limits: Limits):
        self.rack, self.limits = rack, limits
        self.desk = Desk(limits.parallel, limits.waiting)
        self.bodies, self.metrics = Bodies(limits), Metrics()
        self._answers: set[Answer] = set()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._tidy())

    async def ask(self, model: str | None, make: Callable[[Model], Sequence[Asking]]) -> tuple[Answer, str]:
        """Begin the answers to requests that `make` makes for a model, on a thread, for it may take long; and
        the name by which the model is served.

        Raises ApiError, and what making the request raises.
        """
        lease = await self.rack.lease(model)
        answer: Answer | None = None
        try:
            requests = await asyncio.to_thread(make, lease.model)
            answer = self.begin(lease, [self._work(lease.model, request) for request in requests])
            return answer, lease.name
        finally:
            if answer is None:
                lease.end()

    def begin(self, lease: Lease, work: Sequence[Work]) -> Answer:
        """Begin answers that need a model; the lease ends with them. Raises ApiError."""

        def over() -> None:
            lease.end()
            self._answers.discard(answer)

        answer = Answer(self.desk, lease.model, work, over)
        self._answers.add(answer)
        return answer

    def _work(self, model: Model, request: Asking) -> Work:
        def work(cancel: threading.Event) -> Iterator[Event]:
            events: Iterator[Any] = request.events(model, cancel)
            try:
                for event in events:
                    if isinstance(event, Done):
                        self._call(self.metrics.done, event)
                    yield event
            except Exception as e:
                self._call(self._failed, model, e)
                raise

        return work

    def _failed(self, model: Model, error: BaseException) -> None:
        self._spawn(self.rack.lost(model, error))

    def _call(self, f: Callable[..., Any], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(f, *args)

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tidy(self) -> None:
        quiet = 0.0  # seconds without work
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            before, quiet = quiet, quiet + TIDY_SECONDS if not self.desk.running else 0.0
            if before < SAVE_SECONDS <= quiet:
                await self.rack.save()
            await self.rack.tidy()

    def interrupt(self) -> None:
        """Tell everybody who still waits for an answer that none will come."""
        for answer in list(self._answers):
            answer.end(ApiError(503, "The server is ending.", code="overloaded"))

    async def close(self) -> None:
        """End what is running, and close the models. Idempotent."""
        self.desk.close()
        self.interrupt()
        for answer in list(self._answers):
            answer.cancel.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.to_thread(self.desk.join)
        await self.rack.close()


def service_of(request: Request) -> Service:
    """The server that a request came to."""
    return request.app.state.service


def error_of(problem: ApiError) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    return problem.as_dict()


def endpoint(error: Callable[[ApiError], dict[str, Any]] = error_of) -> Callable:
    """A decorator of an endpoint: what it raises becomes an error as `error` writes it, and is counted."""

    def decorate(f: Callable) -> Callable:
        async def answered(request: Request) -> Response:
            service = service_of(request)
            try:
                response = await f(request)
            except Exception as e:
                problem = problems.of(e)
                response = Reply(error(problem), problem.status, problem.headers)
            finally:
                service.bodies.over(request)
            path = request.scope["route"].path
            service.metrics.count("tinychat_requests_total", path=path, status=str(response.status_code))
            return response

        return answered

    return decorate
