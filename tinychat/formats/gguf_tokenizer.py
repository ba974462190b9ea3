"""The tokenizer that a GGUF describes, rebuilt as a `tokenizers.Tokenizer` that gives llama.cpp's ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.gguf_splits import ALIASES, BEGIN, COMPOSED, SPLITS, WHOLE
from tinychat.text import chat_templates
from tinychat.text.decoders import char_of_byte
from tinychat.text.tokenizer import TURN_ENDS, Tokenizer, is_space
from tinychat.text.tokenizer_file import MAX_TOKEN, check_added, one_line

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENS = 1 << 20
MAX_SPLITS = (
    300_000_000  # characters that are compared to find the merges; the largest vocabularies take 30 M
)
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from a GGUF's metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`).

    Raises UnsupportedModelError for a kind or a pre-tokenizer that is not known, by name, and CheckpointError
    for vocabularies that contradict themselves.
    """
    kind = fields.get("tokenizer.ggml.model")
    named = kind if isinstance(kind, str) else None
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN:
        raise _damaged(f"has a token of {longest} characters")
    if len(tokens) > MAX_TOKENS:
        raise _damaged(f"has {len(tokens)} tokens")
    types = _numbers(fields, "tokenizer.ggml.token_type", len(tokens), "iu")
    if not tokens:
        raise _damaged("has no tokens")
    vocab = {t: i for i, t in enumerate(tokens)}
    for text in TURN_ENDS:  # files that forgot to mark it; llama.cpp corrects them too
        if text in vocab:
            types[vocab[text]] = CONTROL
    if named == "gpt2":
        pre = fields.get("tokenizer.ggml.pre", "default")
        backend = _byte_level(fields, vocab, pre)
        bos_by_default = ALIASES.get(pre, pre) in BEGIN
    elif named == "gemma4":
        backend = _merged_letters(fields, tokens, vocab)
        bos_by_default = True
    elif named == "llama":
        backend = _sentencepiece(fields, tokens, vocab, types)
        bos_by_default = True
    else:
        raise UnsupportedModelError(
            f"The GGUF tokenizer {_named(kind)} is not supported.",
            'Supported: "gpt2" (byte-level BPE), "llama" (SentencePiece), "gemma4" (merges of letters).',
        )
    _add_tokens(backend, tokens, types, _stripping(fields, named, vocab))
    return _finish(fields, backend, tokens, bos_by_default)


def _byte_level(fields: Mapping[str, Any], vocab: dict[str, int], pre: Any) -> tokenizers.Tokenizer:
    import tokenizers as tk

    name = ALIASES.get(pre, pre) if isinstance(pre, str) else None
    if name not in SPLITS:
        known = sorted({*SPLITS, *ALIASES})
        near = get_close_matches(str(pre), known, 5, 0.3) or ["llama-bpe", "qwen2"]
        raise UnsupportedModelError(
            f"The GGUF pre-tokenizer {_named(pre)} is not supported.",
            f"Supported: {', '.join(near)} and {len(known) - len(near)} others.",
        )
    backend = tk.Tokenizer(_merging(fields, vocab, ignore_merges=name in WHOLE))
    splits: list[Any] = [tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated") for pattern in SPLITS[name]]
    splits.append(tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = "".join(c for c in char_of_byte().values() if c not in vocab)
    if missing:  # bytes without a token (SmolLM2 lacks 0xF2) vanish; nothing merges across the gap
        splits.append(tk.pre_tokenizers.Split(tk.Regex(f"[{re.escape(missing)}]"), "removed"))
    backend.pre_tokenizer = tk.pre_tokenizers.Sequence(splits)
    if pre in COMPOSED:
        backend.normalizer = tk.normalizers.NFC()
    backend.decoder = tk.decoders.ByteLevel()
    return backend


def _merging(fields: Mapping[str, Any], vocab: dict[str, int], **settings: Any) -> Any:
    """BPE with the merges of the file."""
    merges = [tuple(line.split(" ", 1)) for line in _strings(fields, "tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in merges):
        raise _damaged("has a merge that is not a pair")
    try:
        return _bpe(vocab=vocab, merges=merges, **settings)
    except CheckpointError:
        # a merge of or into what is no token: llama.cpp never applies it, or undoes it
        merges = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]
        return _bpe(vocab=vocab, merges=merges, **settings)


def _merged_letters(
    fields: Mapping[str, Any], tokens: list[str], vocab: dict[str, int]
) -> tokenizers.Tokenizer:
    """Gemma 4's: merges of letters in whole lines, spaces as ▁, bytes for letters that are no token."""
    import tokenizers as tk

    unknown = _unknown(fields, tokens)
    backend = tk.Tokenizer(_merging(fields, vocab, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    backend.normalizer = tk.normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r"[^\n]+|[\n]+"), "isolated")
    decoders = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    backend.decoder = tk.decoders.Sequence(decoders)
    return backend


def _unknown(fields: Mapping[str, Any], tokens: list[str]) -> str | None:
    """The token that stands for what is none."""
    i = fields.get("tokenizer.ggml.unknown_token_id", 0)
    return tokens[i] if type(i) is int and 0 <= i < len(tokens) else None


def _sentencepiece(
    fields: Mapping[str, Any], tokens: list[str], vocab: dict[str, int], types: list[int]
) -> tokenizers.Tokenizer:
    import tokenizers as tk

    scores = _numbers(fields, "tokenizer.ggml.scores", len(tokens), "iuf")
    if any(s != s for s in scores):
        raise _damaged("has scores that are not numbers")
    if sum(len(t) ** 2 for t in tokens) > MAX_SPLITS:
        raise _damaged("has too many long tokens")
    # SentencePiece joins the neighbours whose union scores highest, leftmost first: pairs ranked by score.
    # Pairs that spell the same token tie there and are ranked here, which shows only in runs of one
    # character, and there the shorter left part first gives the same result.
    merges = []
    for token, i in vocab.items():
        if types[i] in (CONTROL, UNKNOWN, BYTE):
            continue
        for k in range(1, len(token)):
            if (left := token[:k]) in vocab and (right := token[k:]) in vocab:
                merges.append((-scores[i], i, (left, right)))
    merges.sort(key=lambda m: m[:2])
    backend = tk.Tokenizer(
        _bpe(
            vocab=vocab,
            merges=[pair for _, _, pair in merges],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=_unknown(fields, tokens),
        )
    )
    prefix = _flag(fields, "tokenizer.ggml.add_space_prefix", True)
    if prefix and "[INST]" in vocab and types[vocab["[INST]"]] == CONTROL:
        # Mistral's from version 3 on, which put the space before the whole text only
        backend.pre_tokenizer = tk.pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        steps = [tk.normalizers.Prepend("▁")] if prefix else []
        backend.normalizer = tk.normalizers.Sequence([*steps, tk.normalizers.Replace(" ", "▁")])
    decoders = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    backend.decoder = tk.decoders.Sequence([*decoders, *([tk.decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _bpe(**settings: Any) -> Any:
    from tokenizers.models import BPE

    try:
        return BPE(**settings)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # bare Exception, and PanicException that is not even that
        raise _damaged(f"contradicts itself: {one_line(e)}") from e


def _stripping(fields: Mapping[str, Any], kind: str, vocab: dict[str, int]) -> dict[str, bool]:
    """Flags that say which white space the special tokens take along: GGUF has no place for it, so the family
    says.

    Phi-3 and Phi-4-mini take what stands behind, Phi-4 both sides; as their own tokenizer.json has it.
    """
    names = (fields.get("general.architecture"), fields.get("general.name"))
    phi = any(isinstance(n, str) and ("phi3" in n.lower() or "phi-3" in n.lower()) for n in names)
    if kind == "gpt2" and "<|im_sep|>" in vocab and (phi or "<|dummy_0|>" in vocab):
        return {"lstrip": True, "rstrip": True}
    return {"rstrip": True} if phi and "<|assistant|>" in vocab else {}


# Tokens that take nothing along all the same.
_NOT_STRIPPING = {"<unk>", "<s>", "<|endoftext|>", "<|endofprompt|>"}


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], types: list[int], stripping: dict[str, bool]
) -> None:
    """Control (and unknown) tokens are found in text only where the caller asks; user-defined ones always."""
    from tokenizers import AddedToken

    control = {i for i, t in enumerate(types) if t in (CONTROL, UNKNOWN)}
    both = "lstrip" in stripping
    added = []
    for i, text in enumerate(tokens):
        if text and (i in control or types[i] == USER_DEFINED):
            flags = stripping if (both or text not in _NOT_STRIPPING) and not is_space(text) else {}
            added.append(AddedToken(text, normalized=False, special=i in control, **flags))
    check_added("The GGUF", [t.content for t in added])
    backend.add_tokens(added)


def _finish(
    fields: Mapping[str, Any], backend: tokenizers.Tokenizer, tokens: list[str], bos_by_default: bool
) -> Tokenizer:
    def token_id(name: str) -> int | None:
        i = fields.get(f"tokenizer.ggml.{name}_token_id")
        return i if type(i) is int and 0 <= i < len(tokens) else None

    ids = {name: token_id(short) for name, short in _NAMES.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    bos = ids["bos_token"]
    add_bos = _flag(fields, "tokenizer.ggml.add_bos_token", bos_by_default)
    if add_bos and bos is not None:  # for other programs that read a saved tokenizer.json
        from tokenizers.processors import TemplateProcessing

        first = tokens[bos]
        backend.post_processor = TemplateProcessing(
            single=[first, "$A"], pair=[first, "$A", first, "$B"], special_tokens=[(first, bos)]
        )
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[i for i in (token_id("eos"), token_id("eot"), token_id("eom")) if i is not None],
        add_bos=add_bos,
        chat_templates=chat_templates.from_gguf(fields),
        special_tokens=special,
    )


_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _strings(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _damaged(f"has no list of strings {key}")
    return value


def _numbers(fields: Mapping[str, Any], key: str, n: int, kinds: str) -> list:
    """A list of n numbers of the numpy kinds; ones where the file has none and they are integers."""
    import numpy as np

    value = fields.get(key)
    if value is None and kinds == "iu":
        return [1] * n
    short = key.rpartition(".")[2]
    if not isinstance(value, list | np.ndarray):
        raise _damaged(f"has no list of numbers {short}")
    if isinstance(value, list) and not all(type(v) in (int, float) for v in value):
        raise _damaged(f"has no list of numbers {short}")
    array = np.asarray(value, None if len(value) else "i4")
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise _damaged(f"has no list of numbers {short}")
    if len(array) != n:
        raise _damaged(f"has {n} tokens and {len(array)} entries of {short}")
    return array.tolist()


def _flag(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, (bool, int)):
        raise _damaged(f"has no yes or no {key.rpartition('.')[2]}")
    return default if value is None else bool(value)


def _named(value: Any) -> str:
    return repr(value)[:80]


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"The GGUF's tokenizer {what}.",
        "The file is damaged or was converted without its tokenizer; pull it again.",
    )
