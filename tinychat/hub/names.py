"""Meanings of a word that is no installed model: a path, a source, a repo that another program keeps."""

from __future__ import annotations

from pathlib import Path

from tinychat.base import locations
from tinychat.base.errors import CheckpointError, ModelNotFoundError, UsageError, shortage
from tinychat.hub.aliases import Source, is_repo_id, parse_source

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def local(model: str) -> Path | None:
    """An existing path that holds a model; None if there is no such path. Refuses pickles by name."""
    path = locations.written(model)
    try:
        if path.is_file():
            if path.suffix.lower() in PICKLES:
                raise _pickle(path)
            if path.suffix.lower() == ".safetensors":
                raise CheckpointError(
                    f"{path} is only the weights.", "Give the folder that also has config.json."
                )
            return path
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is no regular file and no folder.", "Give the model itself.")
        if not path.is_dir():
            return None
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        if not has_weights:
            from tinychat.formats.tensors import llm_awq_file

            pickles = [f for f in sorted(path.iterdir()) if f.suffix.lower() in PICKLES]
            if pickles and llm_awq_file(path) is None:  # that one is read as plain tensors, or refused
                raise _pickle(pickles[0])
        if has_weights or (path / "config.json").exists():
            return path
        if not model.startswith((".", "/", "~")) and is_repo_id(model):
            return None  # a folder that happens to be called like a repo
        raise ModelNotFoundError(
            f"{path} holds no model.", "Give a .gguf file, or a folder with config.json and *.safetensors."
        )
    except (OSError, ValueError, RuntimeError) as e:  # too long, NUL bytes, not readable, ~ of nobody
        if (short := shortage(e)) is not None:
            raise short from e
        if isinstance(e, PermissionError):
            raise CheckpointError(f"{path} cannot be read: {e.strerror}.", "Check its permissions.") from e
        return None


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run any code when it is opened.",
        "Use the model's *.safetensors or .gguf files instead.",
    )


def is_source(model: str) -> bool:
    """Whether the word is spelled like a place to have models from."""
    return model.startswith(("hf:", "pypi:", "file:")) or is_repo_id(model)


def source_of(model: str) -> Source:
    """The source that the word spells; a bare repo id is Hugging Face's. Raises UsageError."""
    return parse_source(model if model.startswith(("hf:", "pypi:", "file:")) else f"hf:{model}")


def hf_cached(model: str) -> Path | None:
    """A repo that another program has downloaded into Hugging Face's own cache."""
    if not is_repo_id(model.removeprefix("hf:")):
        return None
    from tinychat.hub.huggingface import cached

    return cached(source_of(model))


def refuse_bytes(path: str) -> None:
    """The libraries that read models take paths that are text. Raises UsageError for others."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"The name {path} is not UTF-8.", "Rename that file or folder.") from None
