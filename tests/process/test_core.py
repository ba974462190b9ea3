"""What an engine behind the protocol does while it answers."""

from __future__ import annotations

from speaker import QWEN, speaker, thinker

from tinychat.conversation import Message
from tinychat.process.core import Core
from tinychat.process.protocol import Answer, EndThought, Finished, Load, Text


def test_a_thought_ends_when_its_hearer_wants_the_answer(monkeypatch):
    told: list = []
    say = thinker()

    def wish(said):
        if len(said) == 60:  # as if a key was pressed now
            core.take(EndThought())
        return say(said)

    model = speaker(monkeypatch, QWEN, wish)
    core = Core(told.append, lambda name, options, progress: model)
    core.take(EndThought())  # nobody answers
    core.take(Load("tiny", {"keep_kv": False}))
    core.take(Answer("chat", [Message("user", "Well?")], None, {"temperature": 0, "max_tokens": 300}))
    core.requests.put(None)
    core.run()
    (done,) = [e.message for e in told if isinstance(e, Finished)]
    assert done.finish_reason == "stop"
    assert done.content.endswith("</think>\n\nWell, yes.")
    assert 60 <= done.content.index("</think>") < 90
    assert any(isinstance(e, Text) and e.thought for e in told)
