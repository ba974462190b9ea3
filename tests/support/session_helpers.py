"""What conversations on a tiny random Llama come to, in ids, computed by hand."""

from __future__ import annotations

from tiny import byte_tokenizer, tiny_model

from tinychat.base.events import Done

TOKENIZER = byte_tokenizer()
ID_OF = {TOKENIZER.token_bytes(i): i for i in range(256)}
START, END = 256, 257
GREEDY = dict(temperature=0, max_tokens=12)


def spell(text):
    """The ids of a text, one a byte."""
    return [ID_OF[bytes([b])] for b in text.encode()]


def turn(role, ids):
    """What the ChatML template makes of a message, in ids, computed by hand."""
    return [START, *spell(f"{role}\n"), *ids, END, *spell("\n")]


def opening():
    """What asks for an answer."""
    return [START, *spell("assistant\n")]


def say(session, text="hi", **sampling):
    """Done of one exchange; checks what holds for every one."""
    *events, done = session.send(text, **sampling)
    assert isinstance(done, Done)
    assert "".join(e.text for e in events) == done.completion.text
    assert session.messages[-1] == {"role": "assistant", "content": done.completion.text}
    return done


def alone(model, prompt, **sampling):
    """What a model that has seen nothing answers to these ids."""
    with tiny_model(ctx=model.n_ctx) as fresh:
        *_, done = fresh.generate(prompt, **{**GREEDY, **sampling})
        return done.completion.token_ids


def conversation_ids(session):
    """The ids of the present branch, ready for an answer, from what each answer was generated in."""
    ids = [] if session.system is None else turn("system", spell(session.system))
    for i in session.path():
        node = session.nodes[i]
        ids += turn(node.role, node.ids if node.role == "assistant" else spell(node.content))
    return ids
