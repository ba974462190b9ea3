"""Checks of what a checkpoint says about its network."""

from __future__ import annotations

import math

from tinychat.base.errors import CheckpointError

MOST_TAPS = 16  # tokens that a short convolution sees


def check_number(name: str, value: object, limit: int) -> None:
    """Raises CheckpointError unless `value` is a whole number from 1 to `limit`."""
    if type(value) is not int or not 1 <= value <= limit:
        raise CheckpointError(
            f"The checkpoint's {name} is {value!r}, outside 1…{limit}.",
            "The file is damaged or not a language model; pull it again.",
        )


def check_width(width: object) -> None:
    if type(width) is not int or not 2 <= width <= MOST_TAPS:
        raise damaged(f"The checkpoint has a convolution over {width!r} tokens, outside 2…{MOST_TAPS}.")


def check_scales(*scales: float | None) -> None:
    if not all(scale is None or (math.isfinite(scale) and scale > 0) for scale in scales):
        raise damaged(f"The checkpoint multiplies by {scales!r}, which are not all positive numbers.")


def check_caps(*caps: float) -> None:
    if not all(math.isfinite(cap) and cap >= 0 for cap in caps):
        raise damaged(f"The checkpoint caps scores or logits at {caps!r}.")


def damaged(what: str) -> CheckpointError:
    return CheckpointError(what, "The file is damaged; pull it again.")
