"""Calls of tools, line by line: on a terminal each is asked for; elsewhere only what was allowed is run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tinychat.base.terminal import one_line

if TYPE_CHECKING:
    from tinychat.base.events import Event
    from tinychat.mcp.toolbox import Call, Toolbox
    from tinychat.mcp.tools import Tool

START = 30.0  # seconds that one answer waits for its servers
ANSWERS = {"o": "once", "a": "always", "n": "never", "once": "once", "always": "always", "never": "never"}


@contextmanager
def toolbox_of(allowed: Sequence[str], alone: bool) -> Iterator[Toolbox]:
    """The user's toolbox, with servers that run. alone: for one answer, which is offered what is allowed, and
    waits for it; else whatever there is.

    Raises TinychatError for one answer whose tools are not there.
    """
    from tinychat.mcp.toolbox import Toolbox

    if alone and not allowed:
        yield Toolbox()
        return
    toolbox = Toolbox.found(allowed, alone)
    if toolbox.problem is not None and alone:
        raise toolbox.problem
    try:
        toolbox.start()
        if alone:
            toolbox.servers.settle(START)
            toolbox.check(allowed)
        yield toolbox
    finally:
        toolbox.close()


def results(
    toolbox: Toolbox,
    session: Any,
    ask: Callable[[Tool, Call], str | None],
    stopped: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """What the calls at the end of a conversation gave; None: the user stopped there, which the model is told
    when it is asked again.
    """
    from tinychat.mcp.toolbox import STOPPED

    found: list[str] = []
    calls = session.tree.unanswered()
    try:
        for call in calls:
            click.echo(f"({_said(toolbox, call)})", err=True)
            text = toolbox.result(call, session.model.n_ctx, ask, stopped)
            if text is None:
                break
            found.append(text)
    except KeyboardInterrupt:
        click.echo("(stopped)", err=True)
    if len(found) == len(calls):
        return found
    session.add_results([*found, *[STOPPED] * (len(calls) - len(found))])
    return None


def to_the_end(
    toolbox: Toolbox,
    session: Any,
    events: Generator[Event, None, None],
    follow: Callable[[Generator[Event, None, None]], Iterator[Event]],
) -> Iterator[Event]:
    """The events of an answer and, where it calls tools, of those to the results; Done of the last. Nobody is
    asked: what is not allowed does not run.
    """
    from tinychat.base.events import Done, TextDelta
    from tinychat.mcp.toolbox import MOST_ROUNDS

    for n in range(MOST_ROUNDS + 1):
        done = None
        for event in follow(events):
            if isinstance(event, Done) and event.finish_reason == "tool_calls" and n < MOST_ROUNDS:
                done = event
            else:
                yield event
        if done is None:
            return
        if done.completion.text:
            yield TextDelta("\n\n", None)
        found = results(toolbox, session, lambda tool, call: None, lambda: session.cancelled)
        if found is None:
            yield done
            return
        events = session.send_results(found)


def offer(toolbox: Toolbox, session: Any) -> None:
    """Tell a conversation of the tools that there are now; those of servers that start are waited for."""
    from tinychat.mcp.toolbox import PATIENCE

    model = session.model
    if not getattr(model, "takes_tools", model.template is not None):
        return
    if toolbox.waits_for:
        toolbox.servers.settle(PATIENCE)
    if session.tools != (tools := toolbox.offered()):
        session.tools = tools


def ask(tool: Tool, call: Call) -> str | None:
    """Ask on the terminal; None: Ctrl+C or Ctrl+D, which stop."""
    from tinychat.mcp.toolbox import shown_arguments

    about = one_line(tool.description)
    click.echo(f"The model wants to call {tool.where}{f' ({about})' if about else ''} with", err=True)
    click.echo(shown_arguments(call), err=True)
    while True:
        try:
            said = (
                input("[o]nce, [a]lways (this tool, as it is now), [n]ever, Ctrl+C stops: ").strip().lower()
            )
        except (EOFError, KeyboardInterrupt):
            click.echo("\n(stopped)", err=True)
            return None
        if said in ANSWERS:
            return ANSWERS[said]


def _said(toolbox: Toolbox, call: Call) -> str:
    tool = toolbox.find(call)
    where = one_line(call["function"]["name"]) if tool is None else tool.where
    return f"calls {where} {one_line(call['function']['arguments'])[:200]}"
