"""One answer to a whole conversation that the asker keeps: what `Model.chat` and a server's request are."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinychat.base.events import Event
from tinychat.base.sampling_params import SamplingParams
from tinychat.text.oversized import refuse_oversized

if TYPE_CHECKING:
    from tinychat.engine.chat_model import ChatModel
    from tinychat.text.reasoning import Splitter


@dataclass(frozen=True)
class ChatRequest:
    """What an answer follows from.

    messages  the conversation, each `{"role", "content"}`, checked by `arguments.messages`
    params    how its tokens are chosen
    draft     as in `tinychat.load`; None is the model's own
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    draft: str | None = None

    def events(self, model: ChatModel, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """The answer, as a session yields one: TextDelta, Notice and Reading, and Done last.

        cancel: set by any thread, it ends the answer between two steps. Raises UsageError before anything is
        computed if the conversation does not fit the context, or the template refuses it.
        """
        speculator = model.speculator(self.draft)
        refuse_oversized(
            model.tokenizer, [m["content"] for m in self.messages], model.n_ctx, model.eviction() is not None
        )
        ids, splitter = self.prompt(model)
        branch = model.engine.branch(model.eviction())
        yield from model.engine.generate(branch, ids, self.params, cancel, speculator, splitter)

    def prompt(self, model: ChatModel) -> tuple[list[int], Splitter | None]:
        """The ids that the model reads, and what tells its reasoning from its answer. Raises UsageError where
        the template refuses the messages.
        """
        if model.template is None:
            return model.encode_prompt("".join(m["content"] for m in self.messages)), None
        text = model.template.render(self.messages)
        bos = [model.tokenizer.bos_id] if model.tokenizer.bos_id is not None and model.needs_bos(text) else []
        return bos + model.template.encode(text), model.template.splitter(text)


@dataclass(frozen=True)
class PromptRequest:
    """What the continuation of a bare prompt follows from: its ids, how tokens are chosen, who drafts."""

    ids: list[int]
    params: SamplingParams
    draft: str | None = None

    def events(self, model: ChatModel, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """The continuation, as `ChatRequest.events` yields an answer."""
        branch = model.engine.branch(model.eviction())
        speculator = model.speculator(self.draft)
        yield from model.engine.generate(branch, self.ids, self.params, cancel, speculator)
