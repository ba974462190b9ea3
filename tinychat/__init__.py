"""tinychat: chat with a language model on your own machine.

    model = tinychat.load("smollm2-135m")
    print(model.chat([{"role": "user", "content": "hi"}]).text)

Importing loads nothing heavy; names below are imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if importlib.util.find_spec("tinychat.models") is None:
    raise ImportError(
        f"{__path__[0]} is tinychat's source folder, not an installed tinychat.\n"
        "Run from another folder, or install it there: pip install ."
    )

__version__ = "0.1.0"

_EXPORTS = {
    "load": "tinychat.model",
    "Model": "tinychat.model",
    "Session": "tinychat.session",
    "SamplingParams": "tinychat.sampling",
    "TextDelta": "tinychat.events",
    "Notice": "tinychat.events",
    "Done": "tinychat.events",
    "Completion": "tinychat.events",
    "Stats": "tinychat.events",
    "TinychatError": "tinychat.errors",
    "UsageError": "tinychat.errors",
    "ModelNotFoundError": "tinychat.errors",
    "MemoryBudgetError": "tinychat.errors",
    "CheckpointError": "tinychat.errors",
    "UnsupportedModelError": "tinychat.errors",
    "DownloadError": "tinychat.errors",
}


__all__ = [
    "CheckpointError",
    "Completion",
    "Done",
    "DownloadError",
    "MemoryBudgetError",
    "Model",
    "ModelNotFoundError",
    "Notice",
    "SamplingParams",
    "Session",
    "Stats",
    "TextDelta",
    "TinychatError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from tinychat.errors import (
        CheckpointError,
        DownloadError,
        MemoryBudgetError,
        ModelNotFoundError,
        TinychatError,
        UnsupportedModelError,
        UsageError,
    )
    from tinychat.events import Completion, Done, Notice, Stats, TextDelta
    from tinychat.model import Model, load
    from tinychat.sampling import SamplingParams
    from tinychat.session import Session


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tinychat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
