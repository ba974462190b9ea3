"""Bounds of what clients may take: sizes, numbers and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes are bytes, times are seconds.

    parallel      answers that are made at once
    waiting       answers that wait for their turn; beyond, requests are refused with 429
    body          of one request; beyond, it is refused with 413
    bodies        of all requests that are being read; beyond, they are refused with 503
    connections   that are open; beyond, new ones are refused with 503
    header_time   until a request's line and headers are there
    body_time     until its body is there
    idle_time     that a connection is kept open between two requests
    send_time     that a client may take no more of what is sent to it
    quiet_time    of a stream without a word, until a comment says that it is alive
    grace_time    that running answers have to come to their end when the server is told to stop
    choices       of one request (`n`)
    """

    parallel: int = 4
    waiting: int = 64
    body: int = 32 << 20
    bodies: int = 128 << 20
    connections: int = 512
    header_time: float = 10.0
    body_time: float = 60.0
    idle_time: float = 60.0
    send_time: float = 60.0
    quiet_time: float = 5.0
    grace_time: float = 10.0
    choices: int = 16
