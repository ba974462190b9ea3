"""One answer to a whole conversation that the asker keeps: what `Model.chat` and a server's request are."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tinychat.base.events import Done, Event, TextDelta
from tinychat.base.sampling_params import SamplingParams
from tinychat.engine.guide import Guide, guide_for
from tinychat.engine.odds import Odds
from tinychat.engine.wishes import NOTHING, Begun
from tinychat.text.oversized import refuse_oversized
from tinychat.text.reasoning import CHANNEL, MESSAGE
from tinychat.text.response_format import Form

if TYPE_CHECKING:
    from tinychat.engine.chat_model import ChatModel
    from tinychat.engine.speculation.speculator import Speculator
    from tinychat.text.calls.caller import Caller
    from tinychat.text.known_text import Known
    from tinychat.text.reasoning import Splitter

BEGINNING = 200  # characters of a prompt's end that say whether the template itself opened a thought


@dataclass(frozen=True)
class ChatRequest:
    """What an answer follows from.

    messages  the conversation, each `{"role", "content"}`, checked by `arguments.messages`
    params    how its tokens are chosen
    draft     as in `tinychat.load`; None is the model's own
    tools     that the model may call, in OpenAI's form, checked by `tools.tools`
    tool_choice  "auto", "none", "required", or the name of the tool that must be called
    parallel_tool_calls  whether an answer may have several calls
    form      what the answer is held to, after a thought if there is one (`response_format`)
    think     whether the model reasons first, and
    effort    how much: where the template knows these; None is the model's own
    logprobs  log-probabilities that come with each token: of it and of so many of the likeliest; None: none
    begun     text of the answer that goes on, which stands behind the messages; None: one begins
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    draft: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    form: Form | None = None
    think: bool | None = None
    effort: str | None = None
    logprobs: int | None = None
    begun: str | None = None

    def events(self, model: ChatModel, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """The answer, as a session yields one: TextDelta, Notice and Reading, and Done last; and
        ToolCallDelta where the model calls tools. Of an answer that goes on, what is new.

        cancel: set by any thread, it ends the answer between two steps. Raises UsageError at once, before the
        first event is asked for, if the conversation does not fit the context, or the template refuses it.
        """
        speculator = model.speculator(self.draft)
        text, ids = self._read(model, model.eviction() is not None)
        splitter = None if model.template is None else model.template.splitter(text)
        written, caller = partial(self._written, model, text, ids), self._caller(model)
        begun = NOTHING if self.begun is None else _begun(model, text, ids, self.begun, splitter)
        guide = guide_for(model.tokenizer, model.template, splitter, self.form, self.params.think_budget)
        return made(model, ids, self, cancel, speculator, splitter, written, caller, guide, begun)

    def prompt(self, model: ChatModel) -> list[int]:
        """The ids that the model reads. Raises UsageError where the template refuses the messages, and for
        many times what the context holds.
        """
        text, ids = self._read(model, True)
        if self.begun is not None:
            splitter = None if model.template is None else model.template.splitter(text)
            ids = [*ids, *_begun(model, text, ids, self.begun, splitter).ids]
        return ids

    def _texts(self) -> Iterator[str]:
        """What is to be read, but for what the template adds."""
        yield self.begun or ""
        for m in self.messages:
            yield m["content"]
            yield from (call["function"]["arguments"] for call in m.get("tool_calls", ()))
        if self.tools:
            yield json.dumps(self.tools, ensure_ascii=False)

    @property
    def _callable(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        if self.tool_choice == "none":
            return []
        named = [t for t in self.tools if t["function"]["name"] == self.tool_choice]
        return named or self.tools

    def _caller(self, model: ChatModel) -> Caller | None:
        if not self._callable or model.template is None:
            return None
        return model.template.tools.caller(self._callable, None if self.parallel_tool_calls else 1)

    def _read(self, model: ChatModel, evicts: bool) -> tuple[str, list[int]]:
        """The prompt's text and ids. What the model read or wrote before keeps the ids that it had. evicts:
        as in `refuse_oversized`, which also looks at what the template makes of very many small messages.
        """
        template = model.template
        refuse_oversized(model.tokenizer, list(self._texts()), model.n_ctx, evicts)
        if template is None:
            text = "".join(m["content"] for m in self.messages)
            return text, model.encode_prompt(text)
        switches = template.switches(self.think, self.effort)
        if self.tools or any(m["role"] == "tool" or "tool_calls" in m for m in self.messages):
            text = template.tools.render(self.messages, self._callable, **switches)
        else:
            text = template.render(self.messages, **switches)
        refuse_oversized(model.tokenizer, [text], model.n_ctx, evicts)
        if known := model.known.find(text):
            last = known.ids[-1]
            return text, [*known.ids, *template.encode(text[known.characters :], after=last)]
        bos = [model.tokenizer.bos_id] if model.tokenizer.bos_id is not None and model.needs_bos(text) else []
        return text, bos + template.encode(text)

    def _written(self, model: ChatModel, text: str, ids: list[int], done: Done) -> list[Known]:
        """Remember the answer's ids, under each text that it may have when it comes back."""
        template, answer = model.template, done.completion
        written = answer.written
        if template is None or not answer.token_ids:
            return []
        forms = dict.fromkeys(template.renderings(written, text[-BEGINNING:]))
        if answer.tool_calls:
            messages = [*self.messages, answer.message()]
            whole = answer.finish_reason == "tool_calls"
            forms = dict.fromkeys(template.tools.renderings(messages, self._callable, text, written, whole))
        return [model.known.add(text + form, [*ids, *answer.token_ids]) for form in forms]


def _begun(model: ChatModel, text: str, ids: list[int], said: str, splitter: Splitter | None) -> Begun:
    """The beginning of an answer behind a prompt, as its model would have written it: behind a thought, where
    the template has opened one, and in the channel of answers. What the model did write keeps its ids.
    """
    template, before, guarded = model.template, "", said
    if template is not None:
        guarded = template.guard(said, spoken=True)
        if splitter is not None and splitter.thinking:
            before = template.closing(splitter.end)
        elif any(model.tokenizer.markers[i] == CHANNEL for i in template.openers):
            before = f"{CHANNEL}final{MESSAGE}"
    known = model.known.find(text + before + guarded)
    if known and known.characters > len(text) and known.ids[: len(ids)].tolist() == ids:
        found, rest = list(known.ids[len(ids) :]), (text + before + guarded)[known.characters :]
    else:
        found, rest = [], before + guarded
    encode = model.tokenizer.encode if template is None else template.encode
    return Begun([*found, *encode(rest, after=(ids + found)[-1])], before + said)


def made(
    model: ChatModel,
    ids: list[int],
    request: ChatRequest | PromptRequest,
    cancel: threading.Event | None,
    speculator: Speculator,
    splitter: Splitter | None = None,
    written: Callable[[Done], list[Known]] = lambda done: [],
    caller: Caller | None = None,
    guide: Guide | None = None,
    begun: Begun = NOTHING,
) -> Generator[Event, None, None]:
    """The events of an answer to ids, on a branch that has as much of them as is kept.

    begun: an answer that goes on; the events have what is new. written: is told of the end, and gives the
    texts whose ids are known now. Raises UsageError at once if the ids do not fit the context.
    """
    model.engine.check_prompt([*ids, *begun.ids], model.eviction() is not None)
    return _made(model, ids, request, cancel, speculator, splitter, written, caller, guide, begun)


def _made(
    model: ChatModel,
    ids: list[int],
    request: ChatRequest | PromptRequest,
    cancel: threading.Event | None,
    speculator: Speculator,
    splitter: Splitter | None,
    written: Callable[[Done], list[Known]],
    caller: Caller | None,
    guide: Guide | None,
    begun: Begun,
) -> Generator[Event, None, None]:
    branch = model.engine.branch(model.eviction()) if model.shelf is None else model.shelf.take(ids)
    params, generate = request.params, model.engine.generate
    odds = None if request.logprobs is None else Odds(request.logprobs)
    events = generate(branch, ids, params, cancel, speculator, splitter, begun, caller, guide, odds)
    texts: list[Known] = []
    done: Done | None = None
    said = Piece()
    try:
        for event in events:
            if isinstance(event, Done):
                done, texts = event, written(event)
                break
            said.hear(event)
            yield event
    finally:
        events.close()
        if model.shelf is not None:  # before anybody hears of the end, and comes back
            model.shelf.put(branch, texts)
    if done is not None:
        yield done if begun is NOTHING else said.end(done, len(begun.ids))


class Piece:
    """What is new of an answer that goes on."""

    def __init__(self) -> None:
        self._text, self._reasoning = io.StringIO(), io.StringIO()

    def hear(self, event: Event) -> None:
        """An event of it."""
        if isinstance(event, TextDelta):
            self._text.write(event.text)
            self._reasoning.write(event.reasoning)

    def end(self, done: Done, n_begun: int) -> Done:
        """The end, without the n_begun tokens that were there."""
        whole = done.completion
        text, reasoning, ids = self._text.getvalue(), self._reasoning.getvalue(), whole.token_ids[n_begun:]
        return replace(done, completion=replace(whole, text=text, reasoning=reasoning, token_ids=ids))


@dataclass(frozen=True)
class PromptRequest:
    """What the continuation of a bare prompt follows from: its ids, how tokens are chosen, who drafts."""

    ids: list[int]
    params: SamplingParams
    draft: str | None = None
    logprobs: int | None = None

    def events(self, model: ChatModel, cancel: threading.Event | None = None) -> Generator[Event, None, None]:
        """The continuation, as `ChatRequest.events` yields an answer."""
        return made(model, self.ids, self, cancel, model.speculator(self.draft))
