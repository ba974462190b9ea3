"""A conversation with somebody who answers: the tree of messages, a system prompt, sampling parameters, and
one answer at a time. Who answers is said by what stands on it: `Session`, a model of this machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tinychat.answer import AnswerInTheMaking
from tinychat.base import arguments
from tinychat.base import tools as checked_tools
from tinychat.base.characters import whole
from tinychat.base.claims import Claim
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.events import Done, Event, FinishReason, Notice, Reading
from tinychat.base.files import MAX_TEXT, read_text, write_atomically
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Settings
from tinychat.conversation import Message, Saved, Tree
from tinychat.text.attachments import are_sound

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tinychat.keywords import SamplingKeywords

Segments = list[tuple[str, list[int]]]  # a prompt's pieces with their token ids, where those are known


class Dialogue:
    """Base of conversations; a subclass answers. Writes nothing anywhere unless told to (`save`).

    `send`, `regenerate` and `edit` yield events (TextDelta, Notice, then Done). Whatever was generated before
    a cancel, an error or a closed iterator stays in the conversation.
    """

    PARAMS: ClassVar[type[Settings]] = SamplingParams

    def __init__(self, system: str | None, params: Any):
        self.system = system
        self.params = params
        self._notices: list[str] = []  # to be said with the next answer
        self._cancel = threading.Event()
        self._claim = Claim()  # of the answer that is being made
        self._claiming = threading.Lock()

    # Who answers

    @property
    def continues(self) -> bool:
        """Whether an answer that was stopped or cut can go on."""
        return True

    def _asked(self, question: int) -> Segments:
        """The prompt for a question, in segments; the last one is new. Refuses what cannot be answered."""
        raise NotImplementedError

    def _generate(self, question: int, prompt: Segments, params: Any) -> Iterator[Event]:
        """The answer's events, as they come; Done last."""
        raise NotImplementedError

    def _generate_more(
        self, answer: Message, question: int, prompt: Segments, params: Any
    ) -> Iterator[Event]:
        """The events of an answer that goes on."""
        raise UsageError("Here an answer cannot go on.", "Ask for the rest of it.")

    def _cut_ids(self, ids: list[int], text: str) -> list[int]:
        """The ids of an answer that was cut to `text`."""
        raise NotImplementedError

    # What was said

    @property
    def system(self) -> str | None:
        """The system prompt; None leaves it to the chat template. Setting it holds from the next answer."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = None if text is None else whole(arguments.text("The system prompt", text, empty=True))

    @property
    def params(self) -> Any:
        """How the tokens of the next answers are chosen: of the class `PARAMS`."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        if not isinstance(params, self.PARAMS):
            raise UsageError(f"The parameters are {arguments.shown(params)}.", "Use session.params.but(…).")
        self._params = params

    @property
    def tools(self) -> list[dict[str, Any]]:
        """What the next answers may call, in OpenAI's form. Setting it takes functions and schemas; it raises
        UsageError.
        """
        return self._tools

    @tools.setter
    def tools(self, value: Any) -> None:
        found = checked_tools.tools(value)
        self._check_tools(found)
        self._tools = found

    @cached_property
    def _tools(self) -> list[dict[str, Any]]:
        """As they were set; none at first."""
        return []

    def _check_tools(self, tools: list[dict[str, Any]]) -> None:
        """Raises UsageError where whoever answers cannot be given these."""

    @cached_property
    def tree(self) -> Tree:
        """The messages; empty at first."""
        return Tree()

    @property
    def nodes(self) -> list[Message]:
        """Every message of every branch, a parent before its children."""
        return self.tree.nodes

    @nodes.setter
    def nodes(self, nodes: list[Message]) -> None:
        self.tree.nodes = nodes

    @property
    def leaf(self) -> int | None:
        """Index of the message at the end of the present branch."""
        return self.tree.leaf

    @leaf.setter
    def leaf(self, node: int | None) -> None:
        self.tree.leaf = node

    def path(self, leaf: int | None = None) -> list[int]:
        """Node indexes from the first message to `leaf` (default: the present one)."""
        return self.tree.path(None if leaf is None else self._node(leaf))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The present branch as `{"role", "content"}` dicts, the system prompt first if there is one; what an
        answer thought before is its "reasoning", what it called its "tool_calls".
        """
        out: list[dict[str, Any]] = []
        if self._system is not None:
            out.append({"role": "system", "content": self._system})
        for node in self.tree.messages():
            reasoning, text = node.split()
            more: dict[str, Any] = {} if reasoning is None else {"reasoning": reasoning}
            if node.tool_calls:
                more["tool_calls"] = node.tool_calls
            if node.role == "tool":
                more["tool_call_id"] = node.tool_call_id
            out.append({"role": node.role, "content": text, **more})
        return out

    def siblings(self, node: int) -> list[int]:
        """The alternatives at a place (regenerated answers, edited messages), oldest first, `node` among
        them.
        """
        return self.tree.siblings(self._node(node))

    def switch(self, node: int) -> None:
        """Make the branch through `node` the present one, down to its newest leaf."""
        self.tree.switch(self._node(node))

    def _node(self, node: int) -> int:
        try:
            return arguments.integer("The message", node, 0, len(self.nodes) - 1)
        except UsageError:
            raise UsageError(
                f"There is no message {arguments.shown(node)}.", "Use an index of `nodes`."
            ) from None

    # Saying more

    def send(
        self,
        text: str,
        *,
        attachments: Sequence[dict[str, str]] = (),
        tools: Iterable[Callable[..., Any] | Mapping[str, Any]] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> Generator[Event, None, None]:
        """Say something and stream the answer. Sampling parameters given here hold for this answer only.

        attachments: files that go with it, each `{"name", "text"}`; with some, the text may be empty. tools:
        functions or schemas, in place of `tools`, which has them from here on. An answer that calls some ends
        for the reason "tool_calls", and `send_results` goes on.
        """
        message = self._message(text, None, attachments)
        params = self.params.but(**sampling)
        if tools is not None:
            self._check_free()
            self.tools = tools
        return self._answer([message], params, follows=True)

    def add_results(self, results: Mapping[str, str] | Iterable[str]) -> None:
        """Give the results of the calls at the end of the conversation, and ask for no answer."""
        self._check_free()
        for m in self._results(results):
            m.parent = self.leaf
            self.tree.append(m)

    def send_results(
        self, results: Mapping[str, str] | Iterable[str], **sampling: Unpack[SamplingKeywords]
    ) -> Generator[Event, None, None]:
        """Give the results of the calls at the end of the conversation, and stream the answer to them.

        results: a text for each call, by its id or in their order. Raises UsageError where one is missing.
        """
        return self._answer(self._results(results), self.params.but(**sampling), follows=True)

    def _results(self, results: Mapping[str, str] | Iterable[str]) -> list[Message]:
        """Messages with what the calls gave that have no result yet. Raises UsageError."""
        calls = [c["id"] for c in self.tree.unanswered()]
        if not calls:
            raise UsageError("No call waits for a result.", "Send a message.")
        if isinstance(results, Mapping):
            given = dict(results)
        else:
            texts = arguments.items("results", results, "texts")
            given = dict(zip(calls, texts, strict=False)) if len(texts) == len(calls) else {}
        if set(given) != set(calls):
            raise UsageError(
                f"{len(calls)} calls wait for their results.", "Give a text for each, by its id or in order."
            )
        texts = [whole(arguments.text("A result", given[id], empty=True)) for id in calls]
        return [Message("tool", t, tool_call_id=id) for id, t in zip(calls, texts, strict=True)]

    @staticmethod
    def _message(text: str, parent: int | None, attachments: Sequence[dict[str, str]]) -> Message:
        if not are_sound(
            files := arguments.items("attachments", attachments, 'files: [{"name": …, "text": …}]')
        ):
            raise UsageError(
                "The attachments make no sense.", 'Give a list with a {"name": NAME, "text": TEXT} for each.'
            )
        text = whole(arguments.text("The message", text, empty=bool(files)))
        files = [{k: whole(v) for k, v in a.items()} for a in files]
        return Message("user", text, parent, attachments=files)

    def regenerate(self, **sampling: Unpack[SamplingKeywords]) -> Generator[Event, None, None]:
        """Answer the last message again, as a new branch beside the old answer."""
        question, leaf = self.tree.question, self.leaf
        if question is None or leaf is None:
            raise UsageError("There is nothing to regenerate.", "Send a message first.")
        params = self.params.but(**sampling)
        if params.seed is not None and sampling.get("seed") is None and self.nodes[leaf].role == "assistant":
            # The same seed would say the same again.
            params = params.but(seed=params.seed + len(self.tree.siblings(leaf)))
        return self._answer(question, params)

    def go_on(self, **sampling: Unpack[SamplingKeywords]) -> Generator[Event, None, None]:
        """Go on with the last answer, which was stopped, cut by its length or interrupted; only what is new
        is said. `max_tokens` counts from here; a seed gives the text that it would have given in one go.
        """
        if self.leaf is None or self.nodes[self.leaf].role != "assistant":
            raise UsageError("There is no answer to go on with.", "Send a message first, or regenerate.")
        answer = self.nodes[self.leaf]
        if answer.parent is None or answer.finish_reason in ("stop", "tool_calls"):
            raise UsageError("The answer came to its end by itself.", "Ask for more, or regenerate.")
        return self._answer(answer.parent, self.params.but(**sampling), before=answer)

    def edit(
        self,
        node: int,
        text: str,
        *,
        attachments: Sequence[dict[str, str]] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> Generator[Event, None, None]:
        """Say `text` in place of the user message `node`, as a new branch, and stream the answer. The files
        that went with it stay, unless others are given.
        """
        old = self.nodes[self._node(node)]
        if old.role != "user":
            raise UsageError(f"Message {node} is not one of yours.", "Edit a user message.")
        files = old.attachments if attachments is None else attachments
        return self._answer([self._message(text, old.parent, files)], self.params.but(**sampling))

    def cancel(self) -> None:
        """Stop the running answer at the next step; what it has said stays. May be called from any thread."""
        self._cancel.set()

    @property
    def cancelled(self) -> bool:
        """Whether the last answer was told to stop."""
        return self._cancel.is_set()

    def end_thought(self) -> None:
        """Have the running answer close its thought and begin the answer proper, where that can be done. May
        be called from any thread.
        """

    # An answer

    def _answer(
        self,
        question: list[Message] | int,
        params: Any,
        follows: bool = False,
        before: Message | None = None,
    ) -> Generator[Event, None, None]:
        """question: its place, or new messages, one behind the other. follows: they go behind what was said
        last when the answer begins. before: the answer that goes on.
        """
        self._check_free()
        self._cancel.clear()  # a cancel from here on counts, even before the first event is asked for
        claim = Claim()
        return claim.of(self._events(question, params, claim, follows, before))

    def _check_free(self) -> None:
        """Raises UsageError while an answer is being made. One that was cancelled and that nobody asks for
        its last events ends here.
        """
        running = self._claim.generator
        if running is None:
            return
        if self._cancel.is_set():
            with suppress(ValueError):  # its thread is at work on it
                running.close()
                return
        raise UsageError("This conversation is still answering.", "Cancel it, or wait for its last event.")

    def _ends(self, done: Done, segments: Segments) -> None:
        """Add to the last event what is known of the conversation then."""

    def _events(
        self, question: list[Message] | int, params: Any, claim: Claim, follows: bool, before: Message | None
    ) -> Generator[Event, None, None]:
        with self._claiming:
            self._check_free()
            self._claim = claim
        leaf, n_nodes = self.leaf, len(self.nodes)
        answer: AnswerInTheMaking | None = None
        ended: FinishReason = "error"  # unless Done comes or the listener leaves
        try:
            if isinstance(question, list):
                if follows:
                    question[0].parent = leaf
                for i, m in enumerate(question):
                    m.parent = m.parent if i == 0 else n_nodes + i - 1
                self.nodes += question
                question = len(self.nodes) - 1
            segments = self._asked(question)
            while self._notices:
                yield Notice(self._notices.pop(0))
            if before is None:
                events = self._generate(question, segments, params)
            else:
                events = self._generate_more(before, question, segments, params)
            for event in events:
                if answer is None and isinstance(event, (Notice, Reading)):
                    yield event
                    continue
                if answer is None:
                    # From here on the question stands, whatever happens.
                    answer = AnswerInTheMaking(question, *segments[-1], before)
                    if before is None:
                        self.tree.append(answer.message)
                if isinstance(event, Done):
                    self._ends(event, segments)
                answer.hear(event)
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            ended = "cancelled"
            raise
        finally:
            if answer is None:
                del self.nodes[n_nodes:]
                self.leaf = leaf
            else:
                answer.end(ended, self._cut_ids)

    # Keeping it

    def _write(self, path: str | Path, model: str) -> Path:
        """Write the conversation as JSON, atomically; where that is."""
        path = arguments.path("The path", path)
        content = self.tree.as_dict(model, self._system, self._params_as_kept())
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1).encode(errors="replace"))
        return path

    def _params_as_kept(self) -> dict[str, Any]:
        """The sampling parameters as a file has them: what `SamplingParams` takes."""
        return dict(vars(self.params))

    @staticmethod
    def read_saved(path: str | Path) -> tuple[Path, Saved, SamplingParams]:
        """A saved conversation. Raises TinychatError for whatever is none."""
        path = arguments.path("The path", path)
        try:
            saved = Tree.from_dict(json.loads(read_text(path, MAX_TEXT)))
            return path, saved, SamplingParams(**saved.params)
        except OSError as e:
            raise TinychatError(
                f"Cannot read {path}: {e.strerror}.", "Give the path of a saved conversation."
            ) from e
        except (ValueError, TypeError, RecursionError, UsageError) as e:
            raise TinychatError(
                f"{path} is not a conversation that tinychat saved ({_one_line(e)}).",
                "Give a file that Session.save or /save wrote.",
            ) from e


def _one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}".rstrip(": .")
