"""Errors for a user: one line saying what is wrong, one saying what to do."""

from __future__ import annotations

import errno


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


def shortage(e: BaseException) -> TinychatError | None:
    """Error that names what is short (memory, files, room on the disk), if `e` is about that."""
    number = e.errno if isinstance(e, OSError) else None
    if isinstance(e, MemoryError) or number == errno.ENOMEM:
        return MemoryBudgetError("Memory ran out.", "Choose a smaller model or a smaller --ctx.")
    if number in (errno.EMFILE, errno.ENFILE):
        return TinychatError("Too many files are open.", "Raise the limit: ulimit -n 1024")
    if number in (errno.ENOSPC, errno.EDQUOT):
        name = getattr(e, "filename", None)
        where = "while writing" if name is None else _line(str(name))
        return TinychatError(f"The disk is full ({where}).", "Free some space.")
    return None


def of(e: BaseException) -> TinychatError:
    """`e` as an error a user can act on. What the system and libraries raise wherever there is too little of
    something is said as what it is; anything else is a bug of ours.
    """
    said = _line(str(e))[:300]
    library = type(e).__module__.partition(".")[0]
    if isinstance(e, TinychatError):
        return e
    if (short := shortage(e)) is not None:
        return short
    if isinstance(e, ImportError):
        return TinychatError(
            f"A part of tinychat cannot be loaded: {said}.",
            "Install tinychat again, or give it more memory (ulimit -v) and files (ulimit -n).",
        )
    if isinstance(e, RuntimeError) and "can't start new thread" in said:
        return TinychatError("The system allows no more threads.", "Raise its limits (ulimit -u, ulimit -v).")
    if isinstance(e, OSError):
        return _of_system(e)
    if library == "sqlite3":
        return TinychatError(
            f"The stored chats cannot be used: {said}.",
            "Check the disk, or set TINYCHAT_HOME to a folder of yours; run --no-store needs none.",
        )
    if isinstance(e, RecursionError):
        return CheckpointError("A file is nested too deeply.", "It is damaged or hostile: use another one.")
    if isinstance(e, UnicodeError):
        return UsageError(f"A name or a text is not Unicode ({said}).", "Write it in UTF-8.")
    if library == "pyo3_runtime":  # a panic in tokenizers or safetensors
        return CheckpointError(f"The model cannot be used: {said}.", "It is damaged: pull it again.")
    return TinychatError(
        f"Internal error: {type(e).__name__}: {said}",
        "This is a bug. TINYCHAT_DEBUG=1 shows where; please report it.",
    )


def _of_system(e: OSError) -> TinychatError:
    where = _line(str(e.filename)) if e.filename is not None else ""
    said = f"{e.strerror or e}: {where}".rstrip(": ")
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TinychatError(
            f"{said}.", "Check its permissions; TINYCHAT_HOME=FOLDER moves what is tinychat's own."
        )
    if e.errno == errno.EAGAIN:
        return TinychatError(f"{said}.", "Raise the system's limits (ulimit -a), or try again.")
    return TinychatError(f"{said}.", "Check that path.")
