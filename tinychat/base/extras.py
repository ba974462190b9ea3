"""Packages that only some of tinychat needs: chatting works without them."""

from __future__ import annotations

import importlib
from types import ModuleType

from tinychat.base.errors import MissingPackageError

TORCH = "torch>=2.4"


def import_torch(purpose: str) -> ModuleType:
    """torch, for what needs it: quantizing, the reference backend, checkpoints that torch saved.

    purpose: what needs it, as the beginning of a sentence. Raises MissingPackageError.
    """
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise  # it is there, and one of its own parts is not
        raise MissingPackageError("torch", TORCH, purpose) from e
