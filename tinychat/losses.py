"""What eviction has taken of the messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tinychat.conversation import Message

if TYPE_CHECKING:
    from tinychat.engine.eviction import Ledger

AROUND = 20  # characters that a template writes around a message, about


def given_up(
    ledger: Ledger, path: Sequence[Message], segments: Sequence[tuple[str, list[int]]], n_ids: int
) -> list[tuple[int, int]]:
    """Of each message of the path how many of its tokens are gone, on average over layers and KV heads, and
    how many it has. The last one is the answer to the prompt, which is `segments` as sessions have them;
    n_ids: tokens of both.
    """
    edges = message_edges(path, segments, n_ids)
    edges[0] = min(ledger.policy.pinned, edges[1])  # the system prompt is no message
    edges = [min(edge, n_ids) for edge in edges]  # of a prompt that was cancelled not all was read
    sizes = [b - a for a, b in pairwise(edges)]
    kept = ledger.kept(edges)
    return [(max(0, round(n - k)), n) for n, k in zip(sizes, kept, strict=True)]


def message_edges(
    path: Sequence[Message], segments: Sequence[tuple[str, list[int]]], n_ids: int
) -> list[int]:
    """Where in the tokens the messages begin, and the last one ends. Answers of this model have segments of
    their own; messages that share one are told apart by their lengths in characters.
    """
    parts = list(segments)
    at = len(parts.pop(0)[1]) if len(parts) > 1 and not parts[0][0] else 0  # the token that begins a text
    edges, shared = [at], list[Message]()

    def share(end: int) -> None:
        nonlocal at
        weights = [len(m.as_read()) + AROUND for m in shared]
        for i in range(1, len(weights) + 1):
            edges.append(at + (end - at) * sum(weights[:i]) // sum(weights))
        shared.clear()
        at = end

    for m in path[:-1]:
        if m.role == "assistant" and m.ids and len(parts) >= 3:
            share(at + len(parts[0][1]))
            at += len(parts[1][1])
            edges.append(at)
            del parts[:2]
        else:
            shared.append(m)
    share(at + sum(len(ids) for _, ids in parts))
    return [*edges, max(n_ids, edges[-1])]
