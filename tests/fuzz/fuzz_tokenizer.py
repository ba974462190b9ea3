"""Damaged tokenizers: tokenizer.json, the settings beside it, and the vocabularies of GGUF files.

Each is read as a model's, and a conversation with strange messages is rendered, encoded and decoded.
"""

from __future__ import annotations

import base64
import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import JUNK, damage_bytes, damage_json

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
from fuzz.harness import Case, first_seed, minutes, run
from test_gguf_conversations import FAMILIES

from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import StreamDecoder, Tokenizer

SAID = [
    "Hello, world!", "", " ", "a" * 3000, " " * 3000, "\n" * 500, "def f(x):\n    return x\n", "é中🙂" * 100,
    "<|im_end|>\n<|im_start|>system\n", "</s><think>", "ＡＢ ﷺ" * 50, "\ud800x", "\0\x1b", "q" * 40 + "!",
]  # fmt: skip
PATTERNS = [
    "a", "", ".", r"\s+", "(a+)+$", r"(\s|\s\s)+\d", r"(?<=a)b*", r"\p{L}+|\p{N}", "(", "[", "a{1000}{1000}",
    "x*y*z*",     r"(?i)(\w+\s?)*!", "(a|aa)+b", r"(?:(?:a{50}){50}){50}", r"\G", "(?<n>a)\\g<n>*", 
    "((((((((a*)*)*)*)*)*)*)*)*b",
]  # fmt: skip
LONG = ["", "x", "▁", " ", "▁▁", "x" * 50, "x" * 2000, "x" * 2_000_000, "<|im_end|>", "é", "\0"]
NORMALIZERS = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"]


def pick(rng: np.random.Generator, items: list) -> Any:
    """One of them, as it is."""
    return items[int(rng.integers(len(items)))]


def pattern(rng: np.random.Generator) -> dict:
    return {pick(rng, ["String", "Regex"]): pick(rng, [*PATTERNS, *LONG])}


def normalizer(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = int(rng.integers(7))
    if kind == 0 and depth < 4:
        steps = [normalizer(rng, depth + 1) for _ in range(rng.integers(0, 6))]
        return {"type": "Sequence", "normalizers": steps}
    if kind == 1:
        return {"type": "Prepend", "prepend": pick(rng, LONG)}
    if kind == 2:
        return {"type": "Replace", "pattern": pattern(rng), "content": pick(rng, LONG)}
    if kind == 3:
        raw = rng.bytes(int(rng.integers(0, 400)))
        if rng.random() < 0.6:
            raw = int(rng.integers(0, 100)).to_bytes(4, "little") + raw
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}
    if kind == 4:
        return {"type": "Strip", "strip_left": bool(rng.integers(2)), "strip_right": bool(rng.integers(2))}
    return {"type": pick(rng, NORMALIZERS)}


def pre_tokenizer(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = int(rng.integers(6))
    if kind == 0 and depth < 4:
        steps = [pre_tokenizer(rng, depth + 1) for _ in range(rng.integers(0, 5))]
        return {"type": "Sequence", "pretokenizers": steps}
    if kind == 1:
        behaviors = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
        invert = bool(rng.integers(2))
        return {"type": "Split", "pattern": pattern(rng), "behavior": pick(rng, behaviors), "invert": invert}
    if kind == 2:
        schemes = ["first", "always", "never"]
        return {"type": "Metaspace", "replacement": pick(rng, ["▁", "x", " "]),
                "prepend_scheme": pick(rng, schemes), "split": bool(rng.integers(2))}  # fmt: skip
    if kind == 3:
        return {"type": pick(rng, ["Whitespace", "WhitespaceSplit", "Punctuation", "UnicodeScripts"])}
    flags = {f: bool(rng.integers(2)) for f in ("add_prefix_space", "trim_offsets", "use_regex")}
    return {"type": "ByteLevel", **flags}


def decoder(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = int(rng.integers(8))
    if kind <= 2 and depth < 3:
        steps = [decoder(rng, depth + 1) for _ in range(rng.integers(0, 5))]
        return {"type": "Sequence", "decoders": steps}
    if kind == 3:
        return {"type": "Replace", "pattern": pattern(rng), "content": pick(rng, LONG)}
    if kind == 4:
        start, stop = (int(pick(rng, [0, 1, 2, 1 << 40])) for _ in range(2))
        return {"type": "Strip", "content": pick(rng, [" ", "x"]), "start": start, "stop": stop}
    if kind == 5:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {"type": pick(rng, ["ByteFallback", "Fuse"])}


def token(rng: np.random.Generator, content: dict) -> dict:
    last = max((t["id"] for t in content["added_tokens"]), default=0)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    number = pick(rng, [last + 1, last + 1, 0, 1, 5, 1 << 31, (1 << 32) - 1])
    return {"id": number, "content": pick(rng, [*LONG, "a", "he", "<x>"]),
            **{f: bool(rng.integers(2)) for f in flags}}  # fmt: skip


def part(rng: np.random.Generator, content: dict) -> None:
    """One part of a tokenizer.json replaced by a sound one of another kind."""
    what = int(rng.integers(6))
    if what == 0:
        content["normalizer"] = normalizer(rng)
    elif what == 1:
        content["pre_tokenizer"] = pre_tokenizer(rng)
    elif what == 2:
        content["decoder"] = decoder(rng)
    elif what == 3:
        content["added_tokens"] += [token(rng, content) for _ in range(rng.integers(1, 4))]
    elif what == 4:
        length = pick(rng, [0, 1, 80, 10**8])
        content["padding"] = {"strategy": {"Fixed": length}, "direction": "Left", "pad_to_multiple_of": None,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
        content["truncation"] = {
            "direction": "Right",
            "max_length": length,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    else:
        vocab = content["model"]["vocab"]
        vocab[pick(rng, LONG)] = pick(rng, [0, len(vocab), 1 << 31, (1 << 32) - 1])
        content["model"][
            pick(rng, ["dropout", "unk_token", "byte_fallback", "fuse_unk", "ignore_merges"])
        ] = pick(rng, [None, True, 0.5, "<unk>", "no"])


def talk(tokenizer: Tokenizer, seed: int) -> None:
    """Render, encode and decode; ids must be known and texts come back in a stream as at once."""
    rng = np.random.default_rng(seed)
    template = ChatTemplate(tokenizer.chat_template or "{{ messages[0].content }}", tokenizer)
    messages = [{"role": r, "content": pick(rng, SAID)} for r in ("user", "assistant", "user")]
    ids = template.encode(template.render(messages))
    ids += template.encode("x" + pick(rng, SAID)[:100].replace("\ud800", ""), after=ids[-1] if ids else None)
    ids += [int(i) for i in rng.integers(0, tokenizer.vocab_size + 3, 50)]
    for skip in (True, False):
        stream = StreamDecoder(tokenizer, skip_special=skip)
        said = "".join([stream.push(i) for i in ids]) + stream.flush()
        assert said == tokenizer.decode(ids, skip_special=skip)
    tokenizer.to_json()


def read_folder(path: Path) -> None:
    size = 400 + len(path.name)
    talk(Tokenizer.from_hf(path, size), size)


def read_fields(path: Path) -> None:
    talk(from_gguf(pickle.loads(path.read_bytes())), path.stat().st_size)  # written here, a line above


def folders(change):
    """A case: a family's folder, changed."""

    def make(rng: np.random.Generator, folder: Path) -> Path:
        template, _, sound = FAMILIES[pick(rng, sorted(FAMILIES))]
        content = json.loads(sound()[0])
        settings = {"chat_template": template, "add_bos_token": bool(rng.integers(2)), "bos_token": "<s>"}
        change(rng, content, settings, folder)
        return folder

    return Case(make, read_folder)


def write(folder: Path, content: Any, settings: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def parts(rng, content, settings, folder) -> None:
    for _ in range(rng.integers(1, 4)):
        part(rng, content)
    write(folder, content, settings)


def junk(rng, content, settings, folder) -> None:
    small = {k: v for k, v in content.items() if k != "model"}
    small["model"] = {k: v for k, v in content["model"].items() if k not in ("vocab", "merges")}
    damaged = damage_json(rng, small)
    if isinstance(damaged, dict) and isinstance(damaged.get("model"), dict):
        damaged["model"] |= {k: content["model"][k] for k in ("vocab", "merges")}
    write(folder, damaged, settings)


def junk_settings(rng, content, settings, folder) -> None:
    settings |= {n: {"content": n, "lstrip": False} for n in ("eos_token", "unk_token", "pad_token")}
    settings["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}}
    write(folder, content, damage_json(rng, settings))
    for name in ("generation_config.json", "special_tokens_map.json", "chat_template.json"):
        if rng.random() < 0.5:
            damaged = damage_json(
                rng, {"eos_token_id": [1, 2], "eos_token": "</s>", "chat_template": "{{ 1 }}"}
            )
            (folder / name).write_text(json.dumps(damaged), encoding="utf-8")


def some_bytes(rng, content, settings, folder) -> None:
    write(folder, content, settings)
    file = folder / pick(rng, ["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    file.write_bytes(damage_bytes(rng, file.read_bytes(), 1 << 20))


def gguf(rng: np.random.Generator, folder: Path) -> Path:
    """Fields of a GGUF's vocabulary, some of another type or with other entries."""
    template, more, sound = FAMILIES[pick(rng, sorted(FAMILIES))]
    fields = copy.deepcopy({**sound()[1], **more, "tokenizer.chat_template": template})
    fields |= {f"tokenizer.ggml.{name}_token_id": 1 for name in ("bos", "eos", "unknown", "padding")}
    for _ in range(rng.integers(1, 4)):
        name = pick(rng, sorted(fields))
        value = fields[name]
        if isinstance(value, list) and value and rng.random() < 0.7:
            at, what = int(rng.integers(len(value))), int(rng.integers(4))
            if what == 0:
                value[at] = pick(rng, [*LONG, *JUNK, -1, 2, 3, 4, 5, 6])
            elif what == 1:
                value[at : at + int(rng.integers(1, 50))] = []
            elif what == 2:
                value += value[:at]
            else:
                fields[name] = np.asarray([v for v in value if not isinstance(v, str)] or [0.0])
        else:
            fields[name] = pick(rng, [*JUNK, *LONG, np.zeros(3), np.ones((2, 2))])
    path = folder / "fields"
    path.write_bytes(pickle.dumps(fields))
    return path


CASES = {
    "parts": folders(parts),
    "junk": folders(junk),
    "settings": folders(junk_settings),
    "bytes": folders(some_bytes),
    "gguf": Case(gguf, read_fields),
}


@pytest.mark.slow
def test_damaged_tokenizers_are_read_or_refused():
    report = run(CASES, first_seed(), minutes())
    print(report)
    assert not report.faults, report
