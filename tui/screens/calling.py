"""Calls of tools on the chat screen: asked for, run, their results given back, until the model answers in
words.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tinychat.mcp.permissions import NEVER
from tinychat.mcp.toolbox import DENIED, MOST_ROUNDS, STOPPED
from tinychat.mcp.tools import cut
from tinychat.process.protocol import Finished
from tinychat.tui.screens.hearing import Hearing


class Calling(Hearing):
    """Runs what an answer calls, and nothing that was not allowed."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.calling = False  # whether calls are asked for or run
        self._halted = False
        self._waited_for: asyncio.Future[Any] | None = None

    @property
    def answering(self) -> bool:
        """Whether an answer is being made or waited for, or what it called is at work."""
        return super().answering or self.calling

    async def _finished(self, event: Finished) -> None:
        calls = super().answering and event.message.finish_reason == "tool_calls"
        if calls:
            self.calling, self._halted = True, False
        await super()._finished(event)
        if calls:
            self.run_worker(self._answer_calls(), group="calls")

    def action_stop(self) -> None:
        """Esc: calls, too."""
        if not self.calling:
            super().action_stop()
            return
        self._halted = True
        if self._waited_for is not None:
            self._waited_for.cancel()

    async def _answer_calls(self) -> None:
        """Results for the calls at the end of the conversation, then the next answer."""
        conversation = self.conversation
        try:
            for call in conversation.tree.unanswered():
                text = STOPPED if self._halted else await self._result(call)
                conversation.add_result(call["id"], text)
                await self.show_conversation()
        finally:
            self.calling = False
        self.status.tell(state="ready" if self.ready else "loading")
        leaf = conversation.tree.leaf
        if self._halted or leaf is None:
            self.composer.take_back()
            self.say("Stopped: the model is told when you go on.")
        elif self._rounds() >= MOST_ROUNDS:
            self.composer.take_back()
            self.say(f"{MOST_ROUNDS} answers in a row called tools: /regen lets the model go on.", error=True)
        else:
            await self.answer(leaf)

    def _rounds(self) -> int:
        """How many answers with calls came since the user said something."""
        path = self.conversation.path()
        last = max((i for i, m in enumerate(path) if m.role == "user"), default=-1)
        return sum(bool(m.tool_calls) for m in path[last + 1 :])

    async def _result(self, call: dict[str, Any]) -> str:
        """What the model is told of a call."""
        toolbox = self.app.toolbox
        tool = toolbox.find(call)
        if tool is None:
            return toolbox.unknown(call)
        answer = toolbox.permissions.of(tool)
        if answer is None:
            answer = await self._ask_for(tool, call)
        if answer is None:
            self._halted = True
            return STOPPED
        if answer == NEVER:
            return DENIED
        self.status.tell(state=f"{tool.where} runs")
        future = toolbox.run(tool, call)
        try:
            self._waited_for = asyncio.wrap_future(future)
            return cut((await self._waited_for).text, self.context)
        except asyncio.CancelledError:
            if self._halted:
                return STOPPED
            if self.app._exit:
                raise
            return f"Error: {tool.where} was stopped."  # /mcp off
        finally:
            future.cancel()
            self._waited_for = None

    async def _ask_for(self, tool: Any, call: dict[str, Any]) -> str | None:
        """Ask the user, who may have the answer kept."""
        from tinychat.tui.screens.allowing import AllowingScreen

        self.status.tell(state="asks you")
        answer = await self.app.push_screen_wait(AllowingScreen(tool, call["function"]["arguments"]))
        self.app.toolbox.keep(tool, answer)
        return answer

    def command_mcp(self, rest: str) -> Any:
        """Servers, tools, and what is allowed."""
        return self._mcp(rest)

    async def _mcp(self, rest: str) -> None:
        from tinychat.tui.screens.servers import ServersScreen

        lines = await asyncio.to_thread(self.app.toolbox.command, rest)
        if len(lines) == 1:
            self.say(lines[0])
        else:
            self.app.push_screen(ServersScreen(lines))
