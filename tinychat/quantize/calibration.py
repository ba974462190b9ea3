"""The text that quantization looks at, as windows of token ids.

The default is one half what a model writes and one half what people write. `calibration.jsonl` beside this
file is by SmolLM2-135M-Instruct: 64 answers in its chat format and 64 free texts (prose, lists, code,
questions), sampled at temperature 1, top-p 0.95 and a fixed seed by `benchmarks/calibration_text.py`. The
other half is the language reference that every Python carries (`pydoc_data`): without it rounding loses a
quarter more on real text, layer by layer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from tinychat.base.errors import UsageError
from tinychat.base.files import read_text
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer

DEFAULT = Path(__file__).with_name("calibration.jsonl")
LENGTH, COUNT = 512, 96
MAX_FILE = 256 << 20
PIECE = 6000  # characters of the reference in one document


def windows(
    tokenizer: Tokenizer, *, file: Path | None = None, count: int = COUNT, length: int = LENGTH, seed: int = 0
) -> np.ndarray:
    """Token ids int64 [n ≤ count, length]: documents joined in an order drawn from `seed`, then cut.

    file: plain UTF-8 text, or .jsonl with `{"text": …}` or `{"messages": […]}` a line (chats go through the
    model's chat template where it has one). Raises UsageError when it cannot be read or is shorter than 32
    tokens; a short text gives one shorter window.
    """
    sources = [_documents(file)] if file else [s for s in (_documents(DEFAULT), _reference()) if s]
    rng = random.Random(seed)
    template = ChatTemplate(tokenizer.chat_template, tokenizer) if tokenizer.chat_template else None
    ids: list[int] = []
    for i, documents in enumerate(sources, 1):
        if len(documents) > 1:
            rng.shuffle(documents)
        for d in documents:
            ids += [] if tokenizer.bos_id is None or not tokenizer.add_bos else [tokenizer.bos_id]
            ids += _encode(d, tokenizer, template)
            if len(documents) > 1 and len(ids) >= count * length * i // len(sources):
                break
    if len(ids) < 32:
        raise UsageError(
            f"{(file or DEFAULT).name} has {len(ids)} tokens of text; calibration needs 32 at least.",
            "Give a text of some thousand words in the language that the model will be used in.",
        )
    length = min(length, len(ids))
    all_windows = np.asarray(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    return all_windows[rng.sample(range(len(all_windows)), min(count, len(all_windows)))]


def _reference() -> list[dict]:
    """Python's language reference in pieces; none where a distribution has left it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [
        {"text": topics[k][i : i + PIECE]} for k in sorted(topics) for i in range(0, len(topics[k]), PIECE)
    ]


def _documents(file: Path) -> list[dict]:
    try:
        text = read_text(file, MAX_FILE)
        if file.suffix != ".jsonl":
            return [{"text": text}]
        documents = [json.loads(line) for line in text.splitlines() if line.strip()]
        for d in documents:
            if not isinstance(d, dict) or not (isinstance(d.get("text"), str) or _is_chat(d.get("messages"))):
                raise ValueError('a line is neither {"text": …} nor {"messages": […]}')
    except (OSError, ValueError, RecursionError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8" if isinstance(e, UnicodeError) else e
        raise UsageError(
            f"The calibration text {file} cannot be used: {why}.", "Give a UTF-8 text file, or .jsonl."
        ) from e
    return documents


def _is_chat(messages: object) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )


def _encode(document: dict, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    if "text" in document:
        return tokenizer.encode(document["text"])
    if template is not None:
        return template.encode(template.render(document["messages"], add_generation_prompt=False))
    return tokenizer.encode("\n\n".join(m["content"] for m in document["messages"]) + "\n\n")
