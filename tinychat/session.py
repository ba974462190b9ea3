"""A conversation with a model of this machine: the token ids it was held in, and one KV branch."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.async_dialogue import AsyncDialogue
from tinychat.base import arguments
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.events import Done, Event, TextDelta
from tinychat.conversation import Message
from tinychat.dialogue import Segments
from tinychat.engine.eviction import SMALLEST
from tinychat.engine.guide import Guide, guide_for
from tinychat.engine.memory.branch import common_prefix
from tinychat.engine.penalties import check_bias
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.wishes import NOTHING, Begun
from tinychat.losses import given_up
from tinychat.text import grammar
from tinychat.text import response_format as formats
from tinychat.text.markers import beginning
from tinychat.text.oversized import refuse_oversized
from tinychat.text.repeating import Circle
from tinychat.text.response_format import Form
from tinychat.text.stopping import cut_ids
from tinychat.text.tokenizer import SOME_TEXT

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tinychat.engine.chat_model import ChatModel
    from tinychat.engine.engine import OwnedBranch
    from tinychat.keywords import SamplingKeywords
    from tinychat.text.calls.caller import Caller

__all__ = ["Message", "Session"]

SPELLINGS = 512  # of answers with calls, that a conversation remembers


class Session(AsyncDialogue):
    """One conversation with one model. Writes nothing anywhere unless told to (`save`).

    `send`, `regenerate` and `edit` yield events (TextDelta, Notice, then Done). Whatever was generated before
    a cancel, an error or a closed iterator stays in the conversation. Coroutines use `asend` and the like.
    """

    def __init__(
        self,
        model: ChatModel,
        system: str | None = None,
        draft: str | None = None,
        kv_budget: int | None = None,
        kv_policy: str | None = None,
        response_format: Mapping[str, Any] | Form | None = None,
        **sampling: Unpack[SamplingKeywords],
    ):
        if not hasattr(model, "engine"):
            raise UsageError(f"The model is {arguments.shown(model)}.", "Give what tinychat.load returned.")
        self.model = model
        self.ends_circles = False  # whether an answer that only repeats itself ends ("repeating")
        super().__init__(system, model.default_sampling.but(**sampling))
        self._form: Form | None = None
        self._guide: Guide | None = None  # of the last answer
        self._caller: Caller | None = None
        self._spelled: OrderedDict[tuple[str, str, int], str] = OrderedDict()
        self.response_format = response_format  # type: ignore[assignment]  # it takes more than it gives
        self.speculator = model.speculator(draft)
        self._eviction = model.eviction(kv_budget, kv_policy, chat=True)
        self._strict = bool(kv_budget or model.kv_budget)  # a budget was asked for
        self._branch = model.engine.branch(self._eviction)
        self._before: OwnedBranch | None = (
            None  # as it was before the last answer, for the next one in its place
        )

    def __repr__(self) -> str:
        n, here = len(self.nodes), len(self.path())
        said = f"{here} message{'s' * (here != 1)}" + (f" of {n}" if n > here else "")
        busy = ", answering" if self._claim.generator is not None else ""
        return f"<Session with {self.model.name}: {said}{busy}>"

    # The prompt

    def count_tokens(self) -> int:
        """Tokens that the present conversation takes, with everything its template adds."""
        path = self.path()
        if not path:
            return 0
        generating = self.nodes[path[-1]].role != "assistant"
        return sum(len(ids) for _, ids in self._prompt(path, generating))

    def _asked(self, question: int) -> Segments:
        """The prompt for a question, in segments. Refuses what can never fit before it is tokenized."""
        said = [self._system or "", self.nodes[question].as_read()]
        if self._tools:
            said.append(json.dumps(self._tools, ensure_ascii=False))
        refuse_oversized(self.model.tokenizer, said, self.model.n_ctx, self._branch.ledger is not None)
        return self._prompt(self.path(question), True)

    def _generate(self, question: int, segments: Segments, params: SamplingParams) -> Iterator[Event]:
        return self._events_of(segments, params, NOTHING)

    def _generate_more(
        self, answer: Message, question: int, segments: Segments, params: SamplingParams
    ) -> Iterator[Event]:
        ids = answer.ids
        if not ids or not self.model.tokenizer.knows(ids):  # another model wrote it
            ids = self.model.tokenizer.encode(answer.whole, after=SOME_TEXT)
        return self._events_of(segments, params, Begun(ids, answer.whole))

    def _events_of(self, segments: Segments, params: SamplingParams, begun: Begun) -> Iterator[Event]:
        check_bias(params, self.model.config.vocab_size)
        prompt = [i for _, part in segments for i in part]
        self._go_back([*prompt, *begun.ids])
        template = self.model.template
        splitter = template.splitter(segments[-1][0]) if template else None
        form, caller = self._form, None
        if self._tools and template:
            caller = template.tools.caller(self._tools)
            form = template.tools.form(self._tools, False, True, form)
        guide = guide_for(self.model.tokenizer, template, splitter, form, params.think_budget)
        self._guide, self._caller = guide, caller
        events = self.model.engine.generate(
            self._branch, prompt, params, self._cancel, self.speculator, splitter, begun, caller, guide
        )
        return self._until_circle(events) if self.ends_circles else events

    def _ends(self, done: Done, segments: Segments) -> None:
        ledger = self._branch.ledger
        if self._branch.evicted and ledger is not None and ledger.shape[0]:
            done.stats.given_up = given_up(ledger, self.tree.messages(), segments, len(self._branch))

    def _until_circle(self, events: Iterator[Event]) -> Iterator[Event]:
        """End an answer that runs in a circle, as a cancel would end it."""
        circle = Circle()
        for event in events:
            if isinstance(event, TextDelta) and event.token_id is not None:
                if circle.push(event.token_id, event.written):
                    self._cancel.set()
            elif isinstance(event, Done) and circle.closed and event.finish_reason == "cancelled":
                completion = replace(event.completion, finish_reason="repeating")
                event = Done("repeating", event.stats, completion)
            yield event

    def end_thought(self) -> None:
        """Have the running answer close its thought, if it is thinking, and begin the answer proper."""
        if (guide := self._guide) is not None:
            guide.hurried = True

    @property
    def response_format(self) -> Form | None:
        """Form that the next answers are held to, as in `Model.request`; None: they are free."""
        return self._form

    @response_format.setter
    def response_format(self, value: Mapping[str, Any] | Form | None) -> None:
        form = formats.response_format(value)
        if form is not None:
            grammar.matcher(form, self.model.tokenizer)  # says now what is wrong with it
        self._form = form

    def _cut_ids(self, ids: list[int], text: str) -> list[int]:
        return cut_ids(self.model.tokenizer, ids, text, self._caller.shown if self._caller else frozenset())

    def _check_tools(self, tools: list[dict[str, Any]]) -> None:
        if tools and self.model.template is None:
            raise UsageError(
                f"{self.model.name} has no chat template, and knows no tools.", "Choose a chat model."
            )

    def _go_back(self, prompt: list[int]) -> None:
        """Have the branch that continues into `prompt`, although eviction may have begun since."""
        if self._eviction is None:
            return
        pinned = self._count_pinned(prompt)
        if not self._strict:
            pinned = min(pinned, self._eviction.budget - SMALLEST)
        policy = self._eviction.with_pinned(pinned)
        with self.model.engine.changing():  # forks hold blocks of a pool that other conversations use
            branch, before = self._branch, self._before
            if branch.may_rewind(prompt):
                return
            if (
                before is not None
                and before.ids
                and common_prefix(branch.ids, prompt) < len(branch.ids)
                and common_prefix(before.ids, prompt) == len(before.ids)
            ):
                branch = before.fork()
            assert branch.ledger is not None  # it was made with a policy
            branch.ledger.policy = policy
            self._branch, self._before = branch, branch.fork()

    def _count_pinned(self, prompt: list[int]) -> int:
        """Tokens that say what the system prompt and the tools say: never given up."""
        if (self._system is None and not self._tools) or self.model.template is None:
            return 0
        head = {"role": "user", "content": ""}
        if self._system is not None:
            head = {"role": "system", "content": self._system}
        try:
            text = self._rendered([head], False)
        except TinychatError:  # some templates want a user's message
            return 0
        bos = int(self.model.needs_bos(text))
        return bos + common_prefix(self.model.template.encode(text), prompt[bos:])

    def _prompt(self, path: list[int], generating: bool) -> list[tuple[str, list[int]]]:
        """The conversation along `path` as (text, ids) segments; the last one is new.

        What was generated keeps the ids it was generated in, and only what the template adds is tokenized.
        Where the template writes history differently (strips reasoning, trims), everything from there on is
        tokenized anew.
        """
        nodes = [self.nodes[i] for i in path]
        messages: list[dict[str, Any]] = []
        if self._system is not None:
            messages.append({"role": "system", "content": self._system})
        n_before, template = len(messages), self.model.template
        messages += map(self._as_rendered, nodes)
        encode: Callable[..., list[int]]
        if template is None:
            text, encode = "".join(m["content"] for m in messages), self.model.tokenizer.encode
        else:
            text, encode = self._rendered(messages, generating), template.encode
        segments: list[tuple[str, list[int]]] = []
        bos = self.model.tokenizer.bos_id
        if bos is not None and self.model.needs_bos(text):
            segments.append(("", [bos]))
        at = 0
        for i, node in enumerate(nodes):
            if node.role != "assistant" or not node.ids:
                continue
            forms: Iterable[str] = (node.whole,)
            if template and node.tool_calls:
                forms = self._spellings(node, text, at, messages[: n_before + i + 1])
            elif template:
                forms = template.renderings(node.content, node.prompt_text)
            said = next((f for f in forms if text.startswith(node.prompt_text + f, at)), None)
            if said is None:
                break
            known = [(node.prompt_text, node.prompt_ids), (said, node.ids)]
            if not all(self.model.tokenizer.knows(ids) for _, ids in known):
                break  # from a damaged file
            segments += known
            at += len(node.prompt_text) + len(said)
        # A beginning-of-text token alone leaves the text what it is: the first.
        after = next((ids[-1] for said, ids in reversed(segments) if said and ids), None)
        return [*segments, (text[at:], encode(text[at:], after=after))]

    def _as_rendered(self, node: Message) -> dict[str, Any]:
        """A message as templates are given it."""
        template = self.model.template
        if node.tool_calls:
            reasoning, text = node.split()
            thought = {} if reasoning is None else {"reasoning_content": reasoning}
            return {"role": node.role, "content": text, **thought, "tool_calls": node.tool_calls}
        if template is None or node.role != "assistant":
            called = {"tool_call_id": node.tool_call_id} if node.tool_call_id else {}
            return {"role": node.role, "content": node.as_read(), **called}
        return template.answer(node.content, node.prompt_text)

    def _rendered(self, messages: list[dict[str, Any]], generating: bool) -> str:
        """The conversation's text. Templates treat one with tools in a way of its own."""
        template = self.model.template
        assert template is not None
        if self._tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            return template.tools.render(messages, self._tools, generating)
        return template.render(messages, generating)

    def _spellings(self, node: Message, text: str, at: int, messages: list[dict[str, Any]]) -> Iterator[str]:
        """How an answer with calls, the last of the messages, may stand in the conversation's text behind
        `at`: as its model wrote it, or as the template writes such calls, which is found out once.
        """
        template = self.model.template
        if template is None or not node.written or not text.startswith(node.prompt_text, at):
            return
        at += len(node.prompt_text)
        if (form := beginning(text[at:], node.written)) is not None:
            yield form
            return
        key = (node.written, node.prompt_text, at)
        if key not in self._spelled:
            whole = node.finish_reason == "tool_calls"
            forms = template.tools.renderings(messages, self._tools, text[:at], node.written, whole)
            self._spelled[key] = next(forms, "")
            while len(self._spelled) > SPELLINGS:
                self._spelled.popitem(last=False)
        if form := self._spelled[key]:
            yield form

    # Keeping it

    def save(self, path: str | Path, memory: bool = True) -> None:
        """Write the conversation as JSON, atomically.

        memory: keep its KV cache beside it too (`….kv`), within the model's `kv_disk_budget`, so that it goes
        on at once when it is loaded. The JSON is complete without that file.
        """
        arguments.flag("memory", memory)
        path = self._write(path, self.model.name)
        if memory:
            from tinychat.engine import kv_file

            with suppress(TinychatError):  # it only saves time; the conversation itself is safe
                kv_file.save(kv_file.beside(path), self.model, self._branch, stored=False)

    def save_kv(self, path: Path) -> bool:
        """Keep the KV cache in a file, so that the conversation goes on at once when it is resumed; whether
        it is worth it. Raises TinychatError when the disk is full.
        """
        from tinychat.engine import kv_file

        return kv_file.save(path, self.model, self._branch)

    def load_kv(self, path: Path, stored: bool = True) -> int:
        """Take the KV cache from a file that `save_kv` or (not `stored`) `save` wrote; how many tokens that
        are. What does not fit is not used, and a damaged file is set aside: the next answer then says so and
        reads the conversation again.
        """
        from tinychat.engine import kv_file

        try:
            return kv_file.load(path, self.model, self._branch, stored)
        except kv_file.DamagedKvError as e:
            self._notices.append(f"{e.what} {e.todo}")
            return 0

    @classmethod
    def load(cls, path: str | Path, model: ChatModel | None = None) -> Session:
        """Read a saved conversation. Without `model`, the one it was held with is loaded.

        Raises TinychatError if the file is not a saved conversation.
        """
        from tinychat.engine import kv_file

        if model is not None and not hasattr(model, "engine"):
            raise UsageError(f"The model is {arguments.shown(model)}.", "Give what tinychat.load returned.")
        path, saved, params = cls.read_saved(path)
        if model is None:
            import tinychat

            model = tinychat.load(saved.model)  # what loads models stands above this file
        session = cls(model, saved.system)
        session.params, session.tree = params, saved.tree
        known, nodes = range(model.config.vocab_size), saved.tree.nodes
        if saved.model != model.name or any(i not in known for n in nodes for i in (*n.ids, *n.prompt_ids)):
            # Another model's ids mean nothing to this one; its texts are tokenized anew.
            for n in nodes:
                n.forget_ids()
        session.load_kv(kv_file.beside(path), stored=False)
        return session
