"""The ids that a build generates, in a file, to hold another build against: not a bit may differ.

    python benchmarks/same_ids.py models DIR                 # tiny random models of every family, made once
    python benchmarks/same_ids.py write FILE DIR [GGUF …]    # with the build that is installed
    python benchmarks/same_ids.py compare OLD NEW            # exits 1 and names what differs

Each model is run with its weights as stored and in 4 bits, with keys and values in 16 and 8 bits, with the
whole cache and under H2O and a window, greedy and seeded, with prompt lookup, a part of its own layers and no
draft; then a session of three turns with an answer asked for again and a message edited, by the public API.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from contextlib import suppress
from pathlib import Path

import tinychat

LOADS = {
    "stored": {"quantize": "none"},
    "4 bits": {"quantize": "rtn"},
    "16-bit activations": {"quantize": "rtn", "act_bits": 16},
}
CACHES = [{}, {"kv_bits": 8}]
BUDGETS = [{}, {"kv_budget": 112, "kv_policy": "h2o"}, {"kv_budget": 112, "kv_policy": "window"}]
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repeat_penalty": 1.2},
    {"temperature": 0.9, "seed": 7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.1, "seed": 8, "min_p": 0.02},
]
DRAFTS = ["none", "ngram", "layers:0"]
TEXTS = ["Name three colours. ", "one two three four five six seven eight nine ten. " * 2]


def make_models(folder: Path) -> None:
    """A folder of each family, by transformers' own classes and names."""
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "support")]
    from families import CASES, random_model
    from tiny import byte_tokenizer

    for name, (cls, changes) in CASES.items():
        random_model(cls, **changes).save_pretrained(folder / name)
        byte_tokenizer().save(folder / name)
        print(name, file=sys.stderr)


def ids_of(model: tinychat.Model, prompt: list[int], sampling: dict, draft: str) -> list[int]:
    """What a bare prompt is continued with."""
    events = model.generate(prompt, max_tokens=96, draft=draft, **sampling)
    return list(events)[-1].completion.token_ids


def session_ids(model: tinychat.Model, sampling: dict) -> list[list[int]]:
    """The ids of every message of a session that goes through all that a session can do."""
    session = model.session(system="You answer.", max_tokens=48, **sampling)
    with suppress(tinychat.UsageError):  # a model that does not evict ends where its context does
        for text in TEXTS:
            list(session.send(text))
        list(session.regenerate())
        list(session.send("And then?"))
    with suppress(tinychat.UsageError):  # not even its first message fits
        list(session.edit(0, "Name four colours."))
    return [list(m.ids) for m in session.nodes]


def write(file: Path, models: list[Path]) -> None:
    """Run everything and write it down."""
    found: dict[str, object] = {}
    for path, (load, options), cache in itertools.product(models, LOADS.items(), CACHES):
        for budget in BUDGETS:
            case = f"{path.name} | {load} | {cache} | {budget}"
            try:
                model = tinychat.load(str(path), ctx=256, threads=2, **options, **cache, **budget)
            except tinychat.TinychatError as e:
                found[case] = e.what.replace(str(path), path.name)
                continue
            with model:
                rng = random.Random(case)
                prompt = [rng.randrange(256) for _ in range(40)] * 2
                for sampling in SAMPLINGS:
                    for draft in DRAFTS:
                        found[f"{case} | {sampling} | {draft}"] = ids_of(model, prompt, sampling, draft)
                    found[f"{case} | {sampling} | session"] = session_ids(model, sampling)
        print(case, len(found), file=sys.stderr)
    file.write_text(json.dumps(found))


def compare(old: Path, new: Path) -> int:
    """1 and the names of what differs, else 0."""
    a, b = json.loads(old.read_text()), json.loads(new.read_text())
    different = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    for name in sorted(different)[:20]:
        print(f"differs: {name}")
    answers = [v for v in a.values() if isinstance(v, list) and v]
    ids = sum(len(v) if isinstance(v[0], int) else sum(map(len, v)) for v in answers)
    print(f"{len(a)} cases, {ids} ids, {len(different)} differ")
    return 1 if different else 0


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("command", choices=["models", "write", "compare"])
    p.add_argument("paths", nargs="+", type=Path)
    o = p.parse_args()
    if o.command == "models":
        make_models(o.paths[0])
    elif o.command == "write":
        folders = sorted(f for f in o.paths[1].iterdir() if (f / "config.json").exists())
        write(o.paths[0], [*folders, *o.paths[2:]])
    else:
        sys.exit(compare(*o.paths))


if __name__ == "__main__":
    main()
