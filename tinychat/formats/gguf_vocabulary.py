"""A tokenizer as GGUF says it: the inverse of `gguf_tokenizer`, for models that came as a folder.

GGUF names a pre-tokenizer, where tokenizer.json writes its patterns out. So each name that is known is tried,
and the one is taken with which a text of many kinds gets the ids that the tokenizer gives it.
"""

from __future__ import annotations

import json
from typing import Any

from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.gguf_metadata import Field, Fields
from tinychat.formats.gguf_splits import SPLITS
from tinychat.formats.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, USER_DEFINED, from_gguf
from tinychat.text.tokenizer import Tokenizer

NORMAL, UNUSED = 1, 5
PROBE = (
    "The other day the quick brown foxes jumped over the lazy dogs; then they thought better of it.\n"
    "They'll say: it's 1,234,567.89 — or 12345 — don't\tWE'VE  two  spaces\n\n\n   and indents?!\r\n"
    "def f(x_1, yy): return x_1 ** 2  # naïve café ÀÉ Straße, 你好，世界。 привет мир، مرحبا 🙂👍🏽\n"
    "한국어 हिन्दी ไม่ "
    "http://example.org/a_b?c=d&e=100%25 <b>HTML</b> camelCaseWords SHOUTING iPhone15Pro 3.14e-10 $5 #tag @me"
)


def fields_of(tokenizer: Tokenizer, vocab_size: int, text: str = "") -> Fields:
    """The fields `tokenizer.*`. vocab_size: rows of the embedding; text: more to compare ids on.

    Raises UnsupportedModelError for a tokenizer that no field of GGUF describes.
    """
    written = json.loads(tokenizer.backend.to_str())
    model = written["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"a {model.get('type')} tokenizer")
    byte_level = '"ByteLevel"' in json.dumps([written.get("pre_tokenizer"), written.get("decoder")])
    tokens, types = _tokens(tokenizer, model, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not byte_level:
        fields = _common(tokenizer, tokens, types, "llama")
        fields |= _scores(tokens, merges, written)
        return _tried([fields], tokenizer, text)
    fields = _common(tokenizer, tokens, types, "gpt2") | {"tokenizer.ggml.merges": _list(merges)}
    names = [{"tokenizer.ggml.pre": _text(name)} for name in SPLITS]
    return _tried([fields | pre for pre in names], tokenizer, text)


def _tokens(tokenizer: Tokenizer, model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every id's text and type; ids that mean nothing get a name that no text has."""
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    if max(vocab.values(), default=0) >= size:
        raise _unknown("more tokens than the model has embeddings")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    for i in tokenizer.markers:
        types[i] = CONTROL if i in tokenizer.special_ids else USER_DEFINED
    for i in tokenizer.special_ids:
        types[i] = CONTROL
    unknown = vocab.get(model.get("unk_token") or "")
    if unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _common(tokenizer: Tokenizer, tokens: list[str], types: list[int], kind: str) -> Fields:
    from gguf import GGUFValueType as T

    fields = {
        "tokenizer.ggml.model": _text(kind),
        "tokenizer.ggml.tokens": _list(tokens),
        "tokenizer.ggml.token_type": Field(types, T.ARRAY, T.INT32),
        "tokenizer.ggml.add_bos_token": Field(tokenizer.add_bos, T.BOOL),
    }
    vocab = {token: i for i, token in enumerate(tokens)}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {short: vocab.get(tokenizer.special_tokens.get(name, "")) for short, name in names.items()}
    if ids["bos"] is None:
        ids["bos"] = tokenizer.bos_id
    ends = sorted(tokenizer.eos_ids - {ids["eos"]})
    if ids["eos"] is None and ends:
        ids["eos"] = ends.pop(0)
    if ends:
        ids["eot"] = ends[0]
    for name, i in ids.items():
        if i is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = Field(int(i), T.UINT32)
    for name, template in tokenizer.chat_templates.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        fields[key] = _text(template)
    return fields


def _scores(tokens: list[str], merges: list[str], written: dict[str, Any]) -> Fields:
    """SentencePiece's scores (what is merged earlier scores higher); whether a text begins with a space."""
    from gguf import GGUFValueType as T

    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), i)
    scores = [-float(rank.get(token, len(rank))) for token in tokens]
    steps = json.dumps([written.get("normalizer"), written.get("pre_tokenizer")])
    prefix = '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"always"' in steps
    return {
        "tokenizer.ggml.pre": _text("default"),
        "tokenizer.ggml.scores": Field(scores, T.ARRAY, T.FLOAT32),
        "tokenizer.ggml.add_space_prefix": Field(prefix, T.BOOL),
    }


def _tried(candidates: list[Fields], tokenizer: Tokenizer, text: str) -> Fields:
    """The first with which a text gets the ids that the tokenizer gives it."""
    probes = [PROBE, *([text] if text else [])]
    want = [tokenizer.encode(p) for p in probes]
    for fields in candidates:
        read = from_gguf({key: f.value for key, f in fields.items()})
        if all(read.encode(p) == ids for p, ids in zip(probes, want, strict=True)):
            return fields
    raise _unknown("a tokenizer that splits texts in a way of its own")


def _text(value: str) -> Field:
    from gguf import GGUFValueType as T

    return Field(value, T.STRING)


def _list(values: list[str]) -> Field:
    from gguf import GGUFValueType as T

    return Field(values, T.ARRAY, T.STRING)


def _unknown(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The model has {what}, which GGUF has no words for.", "Use another --format."
    )
