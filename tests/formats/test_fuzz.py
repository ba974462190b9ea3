"""500 damaged checkpoints and configs: each is read or refused in two lines, in no time and little memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
from contextlib import suppress

import numpy as np
import pytest
from damage import damage_blocks, damage_bytes, damage_file, damage_json, read, sound_models
from raw_gguf import ARRAY, STRING, Raw

from tinychat.base.errors import TinychatError
from tinychat.formats import open_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folders and files with nothing wrong, by name."""
    return sound_models(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # junk overflows while it is looked at
def test_fifty_damaged_checkpoints(seed, sound, tmp_path):
    rng = np.random.default_rng(seed)
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    names = sorted(sound)
    for i in range(50):
        source = sound[names[i % len(names)]]
        path = tmp_path / source.name
        if source.is_dir():
            shutil.copytree(source, path)
            kind = rng.integers(4)
            if kind < 2:
                config = json.loads((path / "config.json").read_text())
                (path / "config.json").write_text(json.dumps(damage_json(rng, config)))
            elif kind == 2:
                damage_file(rng, path / "model.safetensors")
            else:
                file = path / rng.choice(["config.json", "model.safetensors", "tokenizer.json"])
                file.write_bytes(damage_bytes(rng, file.read_bytes(), 4000))
        else:
            blocks = rng.random() < 0.4
            path.write_bytes(
                damage_blocks(rng, source) if blocks else damage_bytes(rng, source.read_bytes(), 9000)
            )
        started, said = time.process_time(), None
        try:
            read(path)
        except TinychatError as e:
            said = str(e)
        outcomes.append(said)
        assert said is None or (len(said.splitlines()) == 2 and len(said) < 2000), said
        assert time.process_time() - started < 5
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert outcomes.count(None) < 40
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # kB; the files have less than one MB


WRONG = [(7, True), (5, -1), (10, 1 << 63), (12, float("nan")), (STRING, "x"), (STRING, ""), (ARRAY, (5, [])),
         (ARRAY, (5, [-1] * 258)), (ARRAY, (STRING, ["a"] * 258)), (ARRAY, (12, [float("inf")]))]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3.gguf", "phi3.gguf"])
def test_every_field_of_a_gguf_may_have_any_type(name, sound, tmp_path):
    raw = Raw(sound[name])
    fields = raw.fields
    for i, (key, *_) in enumerate(fields):
        for value in WRONG:
            raw.fields = [*fields[:i], (key, *value), *fields[i + 1 :]]
            path = raw.write(tmp_path / name)
            with suppress(TinychatError):
                open_checkpoint(path).tokenizer()
