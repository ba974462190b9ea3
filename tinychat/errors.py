"""What can go wrong in front of a user: one line saying what is wrong, one saying what to do."""

from __future__ import annotations


class TinychatError(Exception):
    """An error a user can act on. `what`: what is wrong; `todo`: what to do about it; each one line."""

    exit_code = 1

    def __init__(self, what: str, todo: str):
        self.what, self.todo = _line(what), _line(todo)
        super().__init__(f"{self.what}\n{self.todo}")


def _line(text: str) -> str:
    """One line of bearable length, whatever a damaged file made the message quote."""
    text = " ".join(text.splitlines())
    return text if len(text) <= 1000 else f"{text[:700]}…{text[-200:]}"


class UsageError(TinychatError):
    """The request itself does not make sense (a flag, a parameter, an impossible combination)."""

    exit_code = 2


class ModelNotFoundError(TinychatError):
    """No alias, folder, file or repository of that name."""

    exit_code = 3


class MemoryBudgetError(TinychatError):
    """The model, its cache or its working buffers do not fit in the memory that is free."""

    exit_code = 4


class MissingPackageError(TinychatError):
    """A package that only some of tinychat needs is not installed. `package`: the name that is imported."""

    def __init__(self, package: str, requirement: str, purpose: str):
        super().__init__(
            f"{purpose} needs {package}, which is not installed.", f'Install it: pip install "{requirement}"'
        )
        self.package = package


class DeviceLostError(TinychatError):
    """A GPU failed in the middle of its work; this process cannot use it any more, another one may."""


class DamagedWeightsError(DeviceLostError):
    """Weights rotted under a running model; this process cannot use them any more, another one makes them
    anew.
    """


class CheckpointError(TinychatError):
    """A model file is damaged, hostile, or of a kind that tinychat does not read."""


class UnsupportedModelError(CheckpointError):
    """The file is sound, but its architecture, quantization or rope scaling is not supported; names it."""


class DownloadError(TinychatError):
    """A download failed or its content does not have the promised hash."""
