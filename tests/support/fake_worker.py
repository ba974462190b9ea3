"""`tinychat.process.worker` with a model that only plays one: run it as the engine's process.

It answers "slow N" with N words, 20 ms each; "die" by killing itself after three words; "lose" by losing its
device there; "think" with a reasoning; a question for a summary with one; "hostile" with everything that a
terminal could obey; everything else with "echo: …".
"""

from __future__ import annotations

import os
import signal
import threading
import time

from tinychat.base.errors import DeviceLostError, UsageError
from tinychat.base.events import Completion, Done, Notice, Stats, TextDelta
from tinychat.chats.summary import PROMPT
from tinychat.conversation import Message, Tree
from tinychat.engine.sampling import SamplingParams
from tinychat.process.worker import serve
from tinychat.text.reasoning import Splitter
from tinychat.text.stopping import Outlet

SUMMARY = PROMPT.partition("{")[0]

# Colours, a title, the clipboard, a link, another screen, the cursor elsewhere, mouse reports, questions that
# a terminal answers as if typed, C1 controls, directions, joined emoji, deep nesting, a megabyte in one line.
HOSTILE = (
    "\x1b[31;5mred\x1b[0m \x1b]0;stolen title\x07 \x1b]52;c;c3RvbGVu\x07 "
    "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\ "
    "\x1b[?1049l\x1b[2J\x1b[H \x1b[?1003h\x1b[6n\x1b[c \x07\x9b31m\x90q\n\n"
    "[@click=app.quit]quit[/] [click](javascript:alert) ![image](file:///etc/passwd) <script>\n\n"
    "\u202eשלום \u2066עולם\u2069 مرحبا 👨‍👩‍👧‍👦👩🏽‍🚀🇩🇪 e\u0301\u0301\u0301 \u200b\u2028\ufeff\U000e0041\n\n"
    + "> " * 300 + "deep\n\n" + "- " * 300 + "deep\n\n" + "x" * 1_000_000 + "\n\n"
    "```sh\nrm \x1b[1m-rf /tmp/nothing\n```\n\nthe end"
)  # fmt: skip


class FakeTokenizer:
    def encode(self, text):
        return list(range(len(text.split())))


class FakeSession:
    def __init__(self, model, system):
        self.model, self.system = model, system
        self.tree, self.params = Tree(), None
        self._cancel = threading.Event()

    def cancel(self):
        self._cancel.set()

    def load_kv(self, path):
        return 0

    def save_kv(self, path):
        return False

    def regenerate(self):
        self._cancel.clear()
        question = self.tree.messages()[-1].as_read()
        if question == "refuse":
            raise UsageError("This cannot be answered.", "Ask something else.")
        node = Message("assistant", "", self.tree.leaf, f"<{question}>", [1, 2, 3])
        self.tree.append(node)
        words = [f"echo: {question}"]
        delay = 0.0
        if question.startswith("slow"):
            words, delay = [f"word{i} " for i in range(int(question.split()[1]))], 0.02
        if question in ("die", "lose"):
            words = ["one ", "two ", "three ", None]
        if question == "hostile":
            words = [HOSTILE[i : i + 5000] for i in range(0, len(HOSTILE), 5000)]
        if question.startswith(SUMMARY):
            words = ["What was said, ", "in short."]
        if question == "think":
            words = ["<think>", "hidden ", "thought", "</think>", "\n\n", "shown"]
        said, reason, outlet, thought = [], "stop", Outlet(splitter=Splitter()), 0
        yield Notice("noted") if question == "notice" else TextDelta("", None)
        for i, word in enumerate(words):
            if word is None and question == "lose":
                raise DeviceLostError("The GPU failed (cuLaunchKernel: LOST).", "Start again.")
            if word is None:
                time.sleep(0.2)  # what was said is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            said.append(word)
            thinking = outlet.thinking
            heard = outlet.push(word)
            thought = i + 1 if thinking or outlet.thinking else thought
            yield TextDelta(heard.text, i, heard.reasoning, heard.written)
            if self._cancel.wait(delay):
                reason = "cancelled"
                break
        stats = Stats(
            prompt_tokens=3 * len(self.tree.nodes),
            generated_tokens=len(said),
            decode_tps=50.0,
            ttft_s=0.1,
            reasoning_tokens=thought,
        )
        node.content, node.ids, node.finish_reason = "".join(said), list(range(len(said))), reason
        node.stats = stats.as_dict()
        yield Done(reason, stats, Completion(node.content, node.ids, reason, stats))


class FakeModel:
    template = object()
    default_sampling = SamplingParams()
    tokenizer = FakeTokenizer()

    def __init__(self, name):
        self.name = name

    def session(self, system):
        return FakeSession(self, system)

    def describe(self):
        return {"model": self.name, "backend": "fake", "isa": "none", "ctx": 1000}

    def close(self):
        pass


def load(name, options, progress):
    progress(f"Loading {name}", 0, 0)
    if name == "missing":
        raise UsageError("There is no model missing.", "Choose another.")
    print("a library prints to stdout")
    return FakeModel(name)


if __name__ == "__main__":
    serve(load)
