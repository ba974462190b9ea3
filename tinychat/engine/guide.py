"""What an answer may say, token by token: a form that it is held to, and a thought of bounded length.

A guide looks at what was written and says of the next token that it is free, that it is one of some, or
which one it is. That depends on nothing but the tokens before it, so a window of drafts is verified against
the same choices that would have been offered one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tinychat.base.errors import TinychatError, UsageError
from tinychat.text import grammar
from tinychat.text.grammar import Matcher
from tinychat.text.reasoning import CHANNEL, END, Splitter
from tinychat.text.response_format import Form
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import SOME_TEXT, StreamDecoder, Tokenizer


@dataclass
class Guide:
    """Guidance at one place of an answer.

    matcher   holds the answer proper to a form, or (`throughout`) the thought as well; None: it is free
    budget    tokens after which a thought is closed; None: never
    template  says how thoughts are begun and closed
    openers   tokens that may begin a thought where the answer could begin
    n         tokens that were written
    first     index of the answer's first token, once it is known; only where there is a form
    script    tokens that have to come, from index `since` on
    """

    tokenizer: Tokenizer
    matcher: Matcher | None
    budget: int | None
    template: ChatTemplate | None
    openers: Collection[int]
    decoder: StreamDecoder
    splitter: Splitter | None
    n: int = 0
    first: int | None = None
    script: list[int] | None = None
    since: int = 0

    throughout: bool = False
    hurried: bool = False  # somebody wants a thought to end now; set by any thread

    def __post_init__(self) -> None:
        if self.n == 0:
            self.first = 0 if self.throughout else None
            self._look()

    def fork(self) -> Guide:
        """Another one at the same place, which goes on by itself."""
        other = copy.copy(self)
        other.matcher = self.matcher and self.matcher.fork()
        if self.first is None or self.throughout:  # else only the form matters any more
            other.decoder, other.splitter = self.decoder.fork(), self.splitter and self.splitter.fork()
        return other

    @property
    def reads(self) -> bool:
        """Whether choosing a token may take more of its row of logits than the largest one."""
        return self.matcher is not None

    @property
    def over(self) -> bool:
        """Whether everything that may come is free."""
        settled = self.splitter is None or self.splitter.settled
        return self.matcher is None and self.script is None and settled

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing can be added."""
        return self.first is not None and self.matcher is not None and self.matcher.finished

    def next(self) -> int | np.ndarray | None:
        """The token that has to come, or which ones may (bool [tokens]), or None: any."""
        if self.script is not None:
            return self.script[self.n - self.since]
        if self.matcher is None:
            return None
        if self.first is not None:
            return self.matcher.allowed()
        if self._place == "beginning":
            allowed = self.matcher.allowed()
            allowed[list(self.openers)] = True
            return allowed
        return self._not_the_end()

    def forced(self, most: int) -> list[int]:
        """The tokens that have to come, as far as that is known: at most so many."""
        if self.script is not None:
            return self.script[self.n - self.since :][:most]
        if self.first is not None and self.matcher is not None and most > 0:
            return self.matcher.forced()[:most]
        return []

    def fitting(self, tokens: list[int]) -> int:
        """How many of these guesses may be right; where that is not known, all."""
        if self.script is not None:
            due = self.script[self.n - self.since :]
            return next((i for i, (a, b) in enumerate(zip(tokens, due, strict=False)) if a != b), len(tokens))
        if self.first is not None and self.matcher is not None:
            return self.matcher.accepts(tokens)
        return len(tokens)

    def push(self, token: int) -> bool:
        """That token was written. Whether it is the first of the answer that is held to a form."""
        at, self.n = self.n, self.n + 1
        if self.script is not None and self.script[at - self.since] != token:
            self.script = None  # an answer that goes on was written under other settings
        unscripted = self.matcher is not None and self.first is None and self.script is None
        if unscripted and self._place == "beginning" and token not in self.openers:
            self.first = at
        if self.first is not None and self.matcher is not None:
            self.matcher.push(token)
            if not self.throughout:
                return at == self.first
        if self.splitter is not None:
            self.splitter.push(self.decoder.push(token))
        self._look()
        return False

    def recall(self, token: int) -> bool:
        """`push` for an answer that goes on. Raises UsageError where its form has no such beginning."""
        try:
            return self.push(token)
        except TinychatError as e:
            raise UsageError(
                "The answer so far does not begin as the form has it that it is to be held to.",
                "Let it answer anew, or take the form away.",
            ) from e

    def hurry(self) -> None:
        """Close a thought now, if one is open."""
        self.hurried = False
        if self._place == "thought" and self.script is None:
            self.budget = self.n
            self._look()

    @property
    def _place(self) -> str:
        return self.splitter.place if self.splitter is not None else "answer"

    def _look(self) -> None:
        """Whether a script begins or the answer does, from what was written."""
        if self.script is not None and self.n - self.since < len(self.script):
            return
        self.script, place = None, self._place
        if place == "thought" and self.budget is not None and self.n >= self.budget:
            self._begin(self._closing())
        if self.matcher is None or self.first is not None:
            return
        if place == "beginning" and self._channels:
            self._begin(CHANNEL)
        elif place == "gap":
            self._begin(self._rest_of_gap())
        if self.script is None and place in ("gap", "answer"):
            self.first = self.n

    def _begin(self, text: str) -> None:
        """Have this text written next."""
        ids = self.tokenizer.encode(text, special=True, after=SOME_TEXT) if text else []
        if ids:
            self.script, self.since = ids, self.n

    @property
    def _channels(self) -> bool:
        return any(self.tokenizer.markers.get(i) == CHANNEL for i in self.openers)

    def _closing(self) -> str:
        assert self.splitter is not None  # there is a thought
        assert self.template is not None
        if self.throughout:  # the form says what comes then
            return END
        closing = self.template.closing(self.splitter.end)
        return closing.removeprefix("\n") if self.splitter.at_line_start else closing

    def _rest_of_gap(self) -> str:
        """What the template writes behind the end of a thought and was not written yet."""
        assert self.splitter is not None
        assert self.template is not None
        end, written = self.splitter.end, self.splitter.gap
        gap = self.template.closing(end).partition(end)[2] if end else ""
        return gap[len(written) :] if gap.startswith(written) else ""

    def _not_the_end(self) -> np.ndarray:
        """Every token but those that end an answer."""
        assert self.matcher is not None
        allowed = np.ones(self.matcher.n_tokens, bool)
        allowed[[i for i in self.tokenizer.eos_ids if i < len(allowed)]] = False
        return allowed


def guide_for(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    splitter: Splitter | None,
    form: Form | None = None,
    budget: int | None = None,
) -> Guide | None:
    """Guidance of the answer that begins where `splitter` is; None if nothing may ever have to be said about
    it. Raises UsageError as `grammar.matcher` does.
    """
    matcher = grammar.matcher(form, tokenizer) if form is not None else None
    thinks = template is not None and splitter is not None and (splitter.thinking or template.thinks)
    if matcher is None and not thinks:
        return None
    openers = template.openers if template is not None else ()
    decoder, fork = StreamDecoder(tokenizer, continued=True), splitter and splitter.fork()
    throughout = form is not None and form.throughout
    return Guide(tokenizer, matcher, budget, template, openers, decoder, fork, throughout=throughout)
