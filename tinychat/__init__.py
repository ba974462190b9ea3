"""tinychat: chat with a language model on your own machine.

    model = tinychat.load("smollm2-135m")
    print(model.chat("hi").text)

Importing loads nothing heavy; names below are imported on first use.
"""

# `python -m tinychat` has the working directory on its path until `__main__` runs: nothing is imported here
# that Python itself has not loaded by then.
import importlib
import importlib.util
import sys


def _installed_instead() -> None:
    """Put the installed tinychat in place of this source folder, which only shadows it for those who stand in
    the checkout. Raises ImportError where none is installed.
    """
    here, path = __path__[0], sys.path
    checkout = here.rpartition("/")[0]
    sys.path = [p for p in path if (p or ".") not in (checkout, ".")]
    try:
        sys.modules.pop(__name__)
        sys.modules[__name__] = importlib.import_module(__name__)
    except ModuleNotFoundError:
        raise ImportError(
            f"{here} is tinychat's source folder, not an installed tinychat.\nInstall it there: pip install ."
        ) from None
    finally:
        sys.path = path


if importlib.util.find_spec("tinychat.models") is None:
    _installed_instead()

__version__ = "0.1.0"

_EXPORTS = {
    "Aside": "tinychat.base.aside",
    "load": "tinychat.loading",
    "Model": "tinychat.model",
    "Session": "tinychat.session",
    "LoadOptions": "tinychat.base.load_options",
    "SamplingParams": "tinychat.base.sampling_params",
    "TextDelta": "tinychat.base.events",
    "Notice": "tinychat.base.events",
    "Reading": "tinychat.base.events",
    "Done": "tinychat.base.events",
    "Event": "tinychat.base.events",
    "Completion": "tinychat.base.events",
    "ToolCall": "tinychat.base.events",
    "ToolCallDelta": "tinychat.base.events",
    "arun_tools": "tinychat.tool_loop",
    "run_tools": "tinychat.tool_loop",
    "Stats": "tinychat.base.events",
    "SamplingKeywords": "tinychat.keywords",
    "PromptKeywords": "tinychat.keywords",
    "ChatKeywords": "tinychat.keywords",
    "SessionKeywords": "tinychat.keywords",
    "LoadKeywords": "tinychat.keywords",
    "TinychatError": "tinychat.base.errors",
    "UsageError": "tinychat.base.errors",
    "ModelNotFoundError": "tinychat.base.errors",
    "MemoryBudgetError": "tinychat.base.errors",
    "CheckpointError": "tinychat.base.errors",
    "UnsupportedModelError": "tinychat.base.errors",
    "DownloadError": "tinychat.base.errors",
}


__all__ = [
    "Aside",
    "ChatKeywords",
    "CheckpointError",
    "Completion",
    "Done",
    "DownloadError",
    "Event",
    "LoadKeywords",
    "LoadOptions",
    "MemoryBudgetError",
    "Model",
    "ModelNotFoundError",
    "Notice",
    "PromptKeywords",
    "Reading",
    "SamplingKeywords",
    "SamplingParams",
    "Session",
    "SessionKeywords",
    "Stats",
    "TextDelta",
    "TinychatError",
    "ToolCall",
    "ToolCallDelta",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "arun_tools",
    "load",
    "run_tools",
]

TYPE_CHECKING = False  # as in typing, without importing it
if TYPE_CHECKING:
    from tinychat.base.aside import Aside
    from tinychat.base.errors import (
        CheckpointError,
        DownloadError,
        MemoryBudgetError,
        ModelNotFoundError,
        TinychatError,
        UnsupportedModelError,
        UsageError,
    )
    from tinychat.base.events import (
        Completion,
        Done,
        Event,
        Notice,
        Reading,
        Stats,
        TextDelta,
        ToolCall,
        ToolCallDelta,
    )
    from tinychat.base.load_options import LoadOptions
    from tinychat.base.sampling_params import SamplingParams
    from tinychat.keywords import (
        ChatKeywords,
        LoadKeywords,
        PromptKeywords,
        SamplingKeywords,
        SessionKeywords,
    )
    from tinychat.loading import load
    from tinychat.model import Model
    from tinychat.session import Session
    from tinychat.tool_loop import arun_tools, run_tools


if not TYPE_CHECKING:  # type checkers would believe in every name

    def __getattr__(name):
        if name in _EXPORTS:
            return getattr(importlib.import_module(_EXPORTS[name]), name)
        raise AttributeError(f"module 'tinychat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
