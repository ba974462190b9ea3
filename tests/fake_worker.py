"""`tinychat.worker` with a model that only plays one: run it as the engine's process.

It answers "slow N" with N words, 20 ms each; "die" by killing itself after three words; "lose" by losing its
device there; "think" with a reasoning; everything else with "echo: …".
"""

from __future__ import annotations

import os
import signal
import threading
import time

from tinychat.errors import DeviceLostError, UsageError
from tinychat.events import Completion, Done, Notice, Stats, TextDelta
from tinychat.sampling import SamplingParams
from tinychat.session import Message
from tinychat.worker import serve


class FakeTokenizer:
    def encode(self, text):
        return list(range(len(text.split())))


class FakeSession:
    def __init__(self, model, system):
        self.model, self.system = model, system
        self.nodes, self.leaf, self.params = [], None, None
        self._cancel = threading.Event()

    def cancel(self):
        self._cancel.set()

    def load_kv(self, path):
        return 0

    def save_kv(self, path):
        return False

    def regenerate(self):
        self._cancel.clear()
        question = self.nodes[self.leaf].content
        if question == "refuse":
            raise UsageError("This cannot be answered.", "Ask something else.")
        self.nodes.append(Message("assistant", "", self.leaf, f"<{question}>", [1, 2, 3]))
        self.leaf = len(self.nodes) - 1
        words = [f"echo: {question}"]
        delay = 0.0
        if question.startswith("slow"):
            words, delay = [f"word{i} " for i in range(int(question.split()[1]))], 0.02
        if question in ("die", "lose"):
            words = ["one ", "two ", "three ", None]
        if question == "think":
            words = ["<think>", "hidden ", "thought", "</think>", "\n\n", "shown"]
        said, reason = [], "stop"
        yield Notice("noted") if question == "notice" else TextDelta("", None)
        for i, word in enumerate(words):
            if word is None and question == "lose":
                raise DeviceLostError("The GPU failed (cuLaunchKernel: LOST).", "Start again.")
            if word is None:
                time.sleep(0.2)  # what was said is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            said.append(word)
            yield TextDelta(word, i)
            if self._cancel.wait(delay):
                reason = "cancelled"
                break
        node = self.nodes[self.leaf]
        node.content, node.ids, node.finish_reason = "".join(said), list(range(len(said))), reason
        stats = Stats(
            prompt_tokens=3 * len(self.nodes), generated_tokens=len(said), decode_tps=50.0, ttft_s=0.1
        )
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
