"""Words that are about to be said: text and files, and whether the model can read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tinychat.process.protocol import ChatEngine
from tinychat.text.attachments import as_read


@dataclass(frozen=True)
class Words:
    """A message before it is sent. `waited`: it stood in line, so the composer has something else by now."""

    text: str
    attachments: list[dict[str, str]]
    waited: bool = False

    @cached_property
    def as_read(self) -> str:
        """Text as the model reads it."""
        return as_read(self.text, self.attachments)

    def may_exceed(self, context: int) -> bool:
        """Whether it may have more tokens than that, without counting them: a token has at least a byte."""
        return 0 < context < len(self.as_read) * 4 and context < len(self.as_read.encode()) + 64

    async def beginning(self, tokens: int, engine: ChatEngine) -> Words:
        """Beginning that has that many tokens, with the question whole if it leaves room for the files."""
        text = self.text
        if not self.attachments:
            return replace(self, text=await engine.head(text, tokens) or "")
        left = tokens - (await engine.count(text) or 0)
        kept = []
        for a in self.attachments:
            if left <= 0:
                break
            n = await engine.count(a["text"]) or 0
            if n > left:
                part = await engine.head(a["text"], left) or ""
                a = {"name": f"{a['name']} (the first {left:,} of {n:,} tokens)", "text": part}
            kept.append(a)
            left -= n
        if not kept:
            text = await engine.head(text, tokens) or ""
        return replace(self, text=text, attachments=kept)
