"""A conversation: a tree of messages, the token ids they were said in, one KV branch, one set of sampling
parameters.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.answer import AnswerInTheMaking
from tinychat.base import arguments
from tinychat.base.characters import whole
from tinychat.base.claims import Claim
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.events import Event, FinishReason, Notice, Reading
from tinychat.base.files import MAX_TEXT, read_text, write_atomically
from tinychat.conversation import Message, Tree
from tinychat.engine.eviction import SMALLEST
from tinychat.engine.memory.branch import common_prefix
from tinychat.engine.sampling import SamplingParams
from tinychat.text.attachments import are_sound
from tinychat.text.oversized import refuse_oversized

if TYPE_CHECKING:
    from tinychat.engine.chat_model import ChatModel
    from tinychat.engine.engine import OwnedBranch

__all__ = ["Message", "Session"]


class Session:
    """One conversation with one model. Writes nothing anywhere unless told to (`save`).

    `send`, `regenerate` and `edit` yield events (TextDelta, Notice, then Done). Whatever was generated before
    a cancel, an error or a closed iterator stays in the conversation.
    """

    def __init__(
        self,
        model: ChatModel,
        system: str | None = None,
        draft: str | None = None,
        kv_budget: int | None = None,
        kv_policy: str | None = None,
        **sampling: Any,
    ):
        if not hasattr(model, "engine"):
            raise UsageError(f"The model is {arguments.shown(model)}.", "Give what tinychat.load returned.")
        self.model = model
        params = model.default_sampling.but(**sampling)
        self.system = system
        self.speculator = model.speculator(draft)
        self._eviction = model.eviction(kv_budget, kv_policy, chat=True)
        self._strict = bool(kv_budget or model.kv_budget)  # a budget was asked for
        self.params = params
        self._branch = model.engine.branch(self._eviction)
        self._before: OwnedBranch | None = (
            None  # as it was before the last answer, for the next one in its place
        )
        self._notices: list[str] = []  # to be said with the next answer
        self._cancel = threading.Event()
        self._claim = Claim()  # of the answer that is being made
        self._claiming = threading.Lock()

    # What was said

    @property
    def system(self) -> str | None:
        """The system prompt; None leaves it to the chat template. Setting it holds from the next answer."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = None if text is None else whole(arguments.text("The system prompt", text, empty=True))

    @property
    def params(self) -> SamplingParams:
        """How the tokens of the next answers are chosen."""
        return self._params

    @params.setter
    def params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise UsageError(f"The parameters are {arguments.shown(params)}.", "Use session.params.but(…).")
        self._params = params

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
    def messages(self) -> list[dict[str, str]]:
        """The present branch as `{"role", "content"}` dicts, the system prompt first if there is one; what an
        answer thought before is its "reasoning".
        """
        out = [] if self._system is None else [{"role": "system", "content": self._system}]
        for node in self.tree.messages():
            reasoning, text = node.split()
            more = {} if reasoning is None else {"reasoning": reasoning}
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
        self, text: str, *, attachments: Sequence[dict[str, str]] = (), **sampling: Any
    ) -> Generator[Event, None, None]:
        """Say something and stream the answer. Sampling parameters given here hold for this answer only.

        attachments: files that go with it, each `{"name", "text"}`; with some, the text may be empty.
        """
        message = self._message(text, None, attachments)
        return self._answer(message, self.params.but(**sampling), follows=True)

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

    def regenerate(self, **sampling: Any) -> Generator[Event, None, None]:
        """Answer the last user message again, as a new branch beside the old answer."""
        question, leaf = self.tree.last("user"), self.leaf
        if question is None or leaf is None:
            raise UsageError("There is nothing to regenerate.", "Send a message first.")
        params = self.params.but(**sampling)
        if params.seed is not None and sampling.get("seed") is None and self.nodes[leaf].role == "assistant":
            # The same seed would say the same again.
            params = params.but(seed=params.seed + len(self.tree.siblings(leaf)))
        return self._answer(question, params)

    def edit(
        self, node: int, text: str, *, attachments: Sequence[dict[str, str]] | None = None, **sampling: Any
    ) -> Generator[Event, None, None]:
        """Say `text` in place of the user message `node`, as a new branch, and stream the answer. The files
        that went with it stay, unless others are given.
        """
        old = self.nodes[self._node(node)]
        if old.role != "user":
            raise UsageError(f"Message {node} is not one of yours.", "Edit a user message.")
        files = old.attachments if attachments is None else attachments
        return self._answer(self._message(text, old.parent, files), self.params.but(**sampling))

    def cancel(self) -> None:
        """Stop the running answer at the next step; what it has said stays. May be called from any thread."""
        self._cancel.set()

    def count_tokens(self) -> int:
        """Tokens that the present conversation takes, with everything its template adds."""
        path = self.path()
        if not path:
            return 0
        generating = self.nodes[path[-1]].role == "user"
        return sum(len(ids) for _, ids in self._prompt(path, generating))

    def _answer(
        self, question: Message | int, params: SamplingParams, follows: bool = False
    ) -> Generator[Event, None, None]:
        """follows: the question goes behind what was said last when its answer begins."""
        self._check_free()
        self._cancel.clear()  # a cancel from here on counts, even before the first event is asked for
        claim = Claim()
        return claim.of(self._events(question, params, claim, follows))

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

    def _events(
        self, question: Message | int, params: SamplingParams, claim: Claim, follows: bool
    ) -> Generator[Event, None, None]:
        with self._claiming:
            self._check_free()
            self._claim = claim
        leaf, n_nodes = self.leaf, len(self.nodes)
        answer: AnswerInTheMaking | None = None
        ended: FinishReason = "error"  # unless Done comes or the listener leaves
        try:
            if isinstance(question, Message):
                if follows:
                    question.parent = leaf
                self.nodes.append(question)
                question = n_nodes
            segments = self._asked(question)
            while self._notices:
                yield Notice(self._notices.pop(0))
            for event in self._generate(segments, params):
                if answer is None and isinstance(event, (Notice, Reading)):
                    yield event
                    continue
                if answer is None:
                    # From here on the question stands, whatever happens.
                    answer = AnswerInTheMaking(question, *segments[-1])
                    self.tree.append(answer.message)
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
                answer.end(ended, self.model.tokenizer)

    def _asked(self, question: int) -> list[tuple[str, list[int]]]:
        """The prompt for a question, in segments. Refuses what can never fit before it is tokenized."""
        said = [self._system or "", self.nodes[question].as_read()]
        refuse_oversized(self.model.tokenizer, said, self.model.n_ctx, self._branch.ledger is not None)
        return self._prompt(self.path(question), True)

    def _generate(self, segments: list[tuple[str, list[int]]], params: SamplingParams) -> Iterator[Event]:
        prompt = [i for _, part in segments for i in part]
        self._go_back(prompt)
        template = self.model.template
        splitter = template.splitter(segments[-1][0]) if template else None
        return self.model.engine.generate(
            self._branch, prompt, params, self._cancel, self.speculator, splitter
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
        """Tokens that say what the system prompt says: never given up."""
        if self._system is None or self.model.template is None:
            return 0
        try:
            text = self.model.template.render([{"role": "system", "content": self._system}], False)
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
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        template = self.model.template
        for node in (self.nodes[i] for i in path):
            if template is None or node.role != "assistant":
                messages.append({"role": node.role, "content": node.as_read()})
            else:
                messages.append(template.answer(node.content, node.prompt_text))
        encode: Callable[..., list[int]]
        if template is None:
            text, encode = "".join(m["content"] for m in messages), self.model.tokenizer.encode
        else:
            text, encode = template.render(messages, generating), template.encode
        segments: list[tuple[str, list[int]]] = []
        bos = self.model.tokenizer.bos_id
        if bos is not None and self.model.needs_bos(text):
            segments.append(("", [bos]))
        at = 0
        for node in (self.nodes[i] for i in path):
            if node.role != "assistant" or not node.ids:
                continue
            forms = template.renderings(node.content, node.prompt_text) if template else (node.content,)
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

    # Keeping it

    def save(self, path: str | Path, memory: bool = True) -> None:
        """Write the conversation as JSON, atomically.

        memory: keep its KV cache beside it too (`….kv`), within the model's `kv_disk_budget`, so that it goes
        on at once when it is loaded. The JSON is complete without that file.
        """
        arguments.flag("memory", memory)
        path = arguments.path("The path", path)
        content = self.tree.as_dict(self.model.name, self._system, asdict(self.params))
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1).encode(errors="replace"))
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

        path = arguments.path("The path", path)
        if model is not None and not hasattr(model, "engine"):
            raise UsageError(f"The model is {arguments.shown(model)}.", "Give what tinychat.load returned.")
        try:
            saved = Tree.from_dict(json.loads(read_text(path, MAX_TEXT)))
            params = SamplingParams(**saved.params)
        except OSError as e:
            raise TinychatError(
                f"Cannot read {path}: {e.strerror}.", "Give the path of a saved conversation."
            ) from e
        except (ValueError, TypeError, RecursionError, UsageError) as e:
            raise TinychatError(
                f"{path} is not a conversation that tinychat saved ({_one_line(e)}).",
                "Give a file that Session.save or /save wrote.",
            ) from e
        if model is None:
            import tinychat

            model = tinychat.load(saved.model)  # what loads models stands above this file
        session = cls(model, saved.system)
        session.params, session.tree = params, saved.tree
        known, nodes = range(model.config.vocab_size), saved.tree.nodes
        if saved.model != model.name or any(i not in known for n in nodes for i in (*n.ids, *n.prompt_ids)):
            # Another model's ids mean nothing to this one; its texts are tokenized anew.
            for n in nodes:
                n.ids, n.prompt_ids, n.prompt_text = [], [], ""
        session.load_kv(kv_file.beside(path), stored=False)
        return session


def _one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}".rstrip(": .")
