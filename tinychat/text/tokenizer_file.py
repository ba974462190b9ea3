"""A tokenizer.json is a stranger's file: read, bounded and tried before it is used."""

from __future__ import annotations

import base64
import json
import os
import re
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tinychat.base.errors import CheckpointError
from tinychat.base.files import read_bytes

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")
MAX_FILE = 64 << 20  # bytes; the largest vocabularies in use take 35 MB
MAX_TOKEN = 1024  # characters of an added token; the longest in use have about 50
MAX_ADDED = 100_000
MAX_ID = 1 << 24  # of a vocabulary's token; a list of all ids up to it is made when a tokenizer is written
# Words that a backend remembers with their tokens, for each thread that uses it; it forgets none. English and
# code are read as fast as with its own bound of 10,000, and 18 % slower with none.
WORDS = 2000
_LONG = 128  # bytes; few strings of an honest file are longer
_MAX_LONG = 1 << 20  # bytes of long strings together, before a file is looked at closely
MAX_GROWTH = 500  # how many times longer a normalizer may make a text: NFKC has one letter for 18
MAX_APPENDED = 1000  # tokens that a post-processor may put around a text
MAX_PREFIX = 1000  # characters that a normalizer may put before a text
_PULL = "The file is damaged, or made by a newer version of tokenizers; pull it again."
_OTHERS = "Its tokenizer belongs to another model, or its embeddings were not resized; choose another."
_STRANGE = "No known model has such a tokenizer; do not trust this checkpoint."


def load_backend(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; stored truncation and padding are left out, as transformers does.

    Raises CheckpointError where it is damaged, and where reading a text with it would take too much.
    """
    import tokenizers

    content = _read(file)
    _check_content(file, content)
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # bare Exception, and PanicException that is not even that
        raise CheckpointError(f"{file} is not a tokenizer that can be read: {one_line(e)}.", _PULL) from e
    backend.no_truncation()
    backend.no_padding()
    check(backend, str(file))
    return backend


def guarded(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """Result of `call`, a backend's method. Raises CheckpointError where the backend fails or panics."""
    try:
        return call(*args, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # bare Exception, and PanicException that is not even that
        raise CheckpointError(
            f"The model's tokenizer fails on this text: {one_line(e)}.",
            "Pull the model again; if that does not help, its tokenizer is broken: choose another model.",
        ) from e


def bound_memory(backend: tokenizers.Tokenizer) -> None:
    """Have a backend remember few words, and none where a whole text is one: few come again, and each takes
    up to 8 KB.
    """
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(WORDS if cuts_words(backend) else 0)


def cuts_words(backend: tokenizers.Tokenizer) -> bool:
    """Whether a text is cut into words before they are looked up: SentencePiece takes all of it for one."""
    text = "One word, and another:\n1 + 1."
    if backend.normalizer is not None:
        text = guarded(backend.normalizer.normalize_str, text)
    cut = backend.pre_tokenizer
    return cut is not None and len(guarded(cut.pre_tokenize_str, text)) > 1


def check(backend: tokenizers.Tokenizer, name: str) -> None:
    """Raises CheckpointError for a tokenizer with which an honest text takes too much memory or time."""
    added = backend.get_added_tokens_decoder().values()
    check_added(name, [t.content for t in added])
    try:
        factor, more = _growth(_state(backend.normalizer))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{name} has a normalizer that cannot be read: {one_line(e)}.", _PULL) from e
    if _appended(_state(backend.post_processor)) > MAX_APPENDED:
        raise CheckpointError(f"{name} appends thousands of tokens to every text.", _STRANGE)
    if factor > MAX_GROWTH or more > MAX_PREFIX:
        raise CheckpointError(
            f"The normalizer in {name} makes texts {factor} times and {more} characters longer.", _STRANGE
        )
    _try(backend, name)


def without_tokens(
    backend: tokenizers.Tokenizer, n: int, needed: list[str], name: str
) -> tokenizers.Tokenizer:
    """The backend without the added tokens that have ids from `n` on; `backend` itself if there are none.

    Raises CheckpointError where one of the texts in `needed` spells such a token, and where the vocabulary
    has more than `n` tokens to begin with.
    """
    size = backend.get_vocab_size(with_added_tokens=False)
    if size > n or (size and backend.id_to_token(size - 1) is None):  # ids may have gaps: look at them all
        size = 1 + max(backend.get_vocab(with_added_tokens=False).values())
    if size > n:
        raise CheckpointError(
            f"{name} has token ids up to {size - 1}, and the model has embeddings for {n}.", _OTHERS
        )
    beyond = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if i >= n}
    for i, content in beyond.items():
        if any(content in text for text in needed):
            raise CheckpointError(
                f"The model needs the token {content!r} ({i}), and has embeddings for {n}.", _OTHERS
            )
    if not beyond:
        return backend
    import tokenizers

    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < n]
    return guarded(tokenizers.Tokenizer.from_str, json.dumps(content))


def one_line(e: BaseException) -> str:
    """Message of an error, in one line."""
    return " ".join(str(e).split())[:200].rstrip(".") or type(e).__name__


def _read(file: Path) -> bytes:
    try:
        return read_bytes(file, MAX_FILE)
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e.strerror}.", _PULL) from e


# A letter that a string hides behind its number: \\u0041. No program that writes JSON does so.
_HIDDEN = re.compile(rb"(?<!\\)(?:\\\\)*\\u00(?:[46][1-9a-fA-F]|[57][0-9aA])")


_FAR = re.compile(rb":\s*[0-9]{8}")  # an id that is too large, if it is one


def _check_content(file: Path, content: bytes) -> None:
    """Look closely at a file with many long strings, or tables of bytes: reading it may take gigabytes."""
    import numpy as np

    data = np.frombuffer(content, np.uint8)
    quotes = np.flatnonzero(data == ord('"'))
    quotes = quotes[(quotes == 0) | (data[quotes - 1] != ord("\\"))]  # those that surely begin or end one
    lengths = np.diff(quotes)
    long = lengths[lengths > _LONG].sum() > _MAX_LONG
    far = _FAR.search(content, max(0, content.find(b'"vocab"')))
    if not (long or far or b"Precompiled" in content or _HIDDEN.search(content)):
        return
    try:
        whole = json.loads(content)
        contents = [token["content"] for token in whole["added_tokens"]]
        _growth(whole.get("normalizer") or {})
        vocabulary = whole["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
        largest = max((i for i in ids if isinstance(i, int)), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{file} is not a tokenizer that can be read: {one_line(e)}.", _PULL) from e
    check_added(str(file), contents)
    if largest > MAX_ID:
        raise CheckpointError(f"{file} has a token with the id {largest}.", _STRANGE)


def check_added(name: str, contents: list[str]) -> None:
    """Raises CheckpointError for more, or longer, added tokens than any honest vocabulary has."""
    if len(contents) > MAX_ADDED:
        raise CheckpointError(f"{name} has {len(contents)} added tokens.", _STRANGE)
    longest = max(map(len, contents), default=0)
    if longest > MAX_TOKEN:
        raise CheckpointError(f"{name} has an added token of {longest} characters.", _STRANGE)


def _state(part: Any) -> dict:
    return {} if part is None else json.loads(part.__getstate__())


# How many times longer each kind can make a text.
_GROWTH = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "StripAccents": 1, "Strip": 1, "Nmt": 1,
    "BertNormalizer": 12, "ByteLevel": 4,
}  # fmt: skip


def _growth(state: dict) -> tuple[int, int]:
    """(factor, more): a normalizer makes n characters at most factor · n + more."""
    kind = state.get("type", "")
    if not state:
        return 1, 0
    if kind == "Sequence":
        factor, more = 1, 0
        for step in state["normalizers"]:
            f, m = _growth(step)
            factor, more = factor * f, more * f + m
        return factor, more
    if kind == "Prepend":
        return 1, len(state["prepend"])
    if kind == "Replace":
        pattern = state["pattern"].get("String")
        if pattern:
            return max(1, -(-len(state["content"]) // len(pattern))), 0
        n = len(state["content"])  # a pattern may match nothing, between all characters
        return 1 + n, n
    if kind == "Precompiled":
        table = base64.b64decode(state["precompiled_charsmap"])
        size = int.from_bytes(table[:4], "little")
        if len(table) < 4 + size or size % 4:
            raise ValueError("its table of characters is cut off")
        return max(1, *map(len, table[4 + size :].split(b"\0"))), 0
    return _GROWTH[kind], 0


def _appended(state: dict) -> int:
    """How many tokens a post-processor puts around a text, at most."""
    if state.get("type") == "Sequence":
        return sum(_appended(step) for step in state["processors"])
    if state.get("type") != "TemplateProcessing":
        return 2
    pieces = len(state["single"])
    return pieces * max([1, *(len(t["ids"]) for t in state["special_tokens"].values())])


_MOST_OF_A_PATTERN = 1000  # characters of it that are tried as texts, too; honest ones have fewer


def _patterns(state: Any) -> Iterator[str]:
    """The regular expressions anywhere in a normalizer's or a pre-tokenizer's settings."""
    if isinstance(state, dict) and isinstance(state.get("Regex"), str):
        yield state["Regex"]
    elif isinstance(state, (dict, list)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _patterns(part)


# A pattern that backtracks shows on a long run of the right thing with something behind it that does not fit.
_UNITS = ("a", "aA", " ", "\n", "0", "!", "-", "a ", "é", "中", "'s", "a0", "\t ", "_", "aa!")
_ENDS = ("", "!", "\0" + string.printable)  # the last one for patterns that need some letter further on
_LENGTHS = ((32, 0.1), (128, 0.1), (512, 0.1), (2048, 0.5))  # characters, seconds of the processor


def _try(backend: tokenizers.Tokenizer, name: str) -> None:
    """Encode some texts. Raises CheckpointError where one fails, or takes longer than it ever should."""
    patterns = [*_patterns([_state(part) for part in (backend.normalizer, backend.pre_tokenizer)])]
    own = {letter for pattern in patterns for letter in pattern[:_MOST_OF_A_PATTERN]}
    with _quiet():
        for length, limit in _LENGTHS if patterns else _LENGTHS[:1]:
            for unit in (*_UNITS, *sorted(own)) if length == 32 else _UNITS:
                for end in _ENDS:
                    text = unit * (length // len(unit)) + end
                    began = time.thread_time()
                    try:
                        backend.encode(text, add_special_tokens=True)
                    except (KeyboardInterrupt, SystemExit):
                        raise
                    except BaseException as e:
                        raise CheckpointError(
                            f"{name} fails on {length} characters {unit!r}: {one_line(e)}.", _PULL
                        ) from e
                    took = time.thread_time() - began
                    if took > limit:
                        raise CheckpointError(
                            f"{name} takes {took:.1f} s for {length} characters: its patterns backtrack.",
                            _STRANGE,
                        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that is written to the file of stderr is seen: a panic writes a page there."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
