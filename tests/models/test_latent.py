"""Latent attention: what is cached of a token is one short row, in 16 or 8 bits, and all read that."""

from __future__ import annotations

import numpy as np
import pytest
from families import CASES, FromTransformers, logits_of, random_config, random_model, relative_error
from family_gguf import write
from memories import allocate, step_of
from recurrent import latent_model

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import BLOCK
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.formats.hf import read_config
from tinychat.network.weight_policy import WeightPolicy

N, BLOCKS = 60, 8
IDS = np.random.default_rng(1).integers(0, 258, 2 * N).astype(np.int32)
TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
AS_STORED = WeightPolicy("none", 16)


@pytest.fixture(scope="module")
def model():
    cls, changes = CASES["deepseek2moe"]
    return random_model(cls, **changes)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))


def filled(model, kind, **options):
    """A backend that has read N tokens, and the logits of the last."""
    b = allocate(kind(FromTransformers(model), AS_STORED, **options), BLOCKS)
    return b, b.step(step_of(b, IDS[:N], 0, 0, TABLE, N - 1))


def test_a_token_is_one_row_in_the_cache(model):
    row, layers = 64 + 16, 3
    for bits, size in ((16, 2 * row), (8, row + 3 * 2)):
        b, _ = filled(model, CpuBackend, kv_bits=bits)
        padding = 33 * 64 + layers * 64
        assert 0 <= b.kv_bytes_per_block() - layers * BLOCK * size <= padding
    assert filled(model, ReferenceBackend)[0].kv_bytes_per_block() == 4 * layers * BLOCK * row


def test_a_cache_of_8_bits_is_that_of_the_reference(model):
    ours, theirs = (filled(model, kind, kv_bits=8)[1] for kind in (CpuBackend, ReferenceBackend))
    assert relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize("kind", [CpuBackend, ReferenceBackend])
def test_a_cache_of_4_bits_is_refused_in_words(model, kind):
    with pytest.raises(UnsupportedModelError, match="not kept in 4 bits"):
        kind(FromTransformers(model), AS_STORED, kv_bits=4)


@pytest.mark.parametrize("bits", [16, 8])
def test_rows_move_turn_and_differ_as_in_the_reference(model, bits):
    """What eviction asks of a memory."""
    cpu, reference = (filled(model, kind, kv_bits=bits)[0] for kind in (CpuBackend, ReferenceBackend))
    rng, got = np.random.default_rng(3), []
    weights = rng.uniform(0, 1, (3, 1, N - 3)).astype(np.float32)  # a block that is not full
    src, dst = (np.full((3, 1, 2), at, np.int32) + np.arange(2, dtype=np.int32) for at in (40, 7))
    turns = np.broadcast_to(np.int32(5), (3, 1, N)).copy()
    for b in (cpu, reference):
        spread = b.value_spread(TABLE, weights)
        b.move_slots(TABLE, src, dst, 0)
        b.turn_keys(TABLE, turns, 0)
        got.append((spread, b.step(step_of(b, IDS[N : N + 9], N + 5, N, TABLE, 0))))
    (spread, logits), (expected_spread, expected) = got
    np.testing.assert_allclose(spread, expected_spread, rtol=1e-3)
    assert relative_error(logits, expected) < (2e-3 if bits == 16 else 2e-2)
    untouched = filled(model, CpuBackend, kv_bits=bits)[0]
    assert relative_error(untouched.step(step_of(untouched, IDS[N : N + 9], N, N, TABLE, 0)), logits) > 1e-2


@pytest.mark.parametrize("kind", [CpuBackend, ReferenceBackend])
def test_turned_rows_are_those_of_later_positions(model, kind):
    b, _ = filled(model, kind)
    b.turn_keys(TABLE, np.full((3, 1, N), 9, np.int32), 0)
    turned = b.step(step_of(b, IDS[N : N + 9], N + 9, N, TABLE, 0))
    later = allocate(kind(FromTransformers(model), AS_STORED), BLOCKS)
    later.step(step_of(later, IDS[:N], 9, 0, TABLE, N))
    expected = later.step(step_of(later, IDS[N : N + 9], N + 9, N, TABLE, 0))
    assert relative_error(turned, expected) < (1e-5 if kind is ReferenceBackend else 3e-3)


def test_files_that_hold_keys_and_values_in_one_tensor(model, tmp_path, monkeypatch):
    import family_gguf

    def whole(w, c, tensors):
        kept = {name: t for name, t in tensors.items() if name.endswith("kv_b_proj.weight")}
        family_gguf.latent(w, c, tensors)
        for name in [n for n in tensors if n.endswith(("k_b_proj.weight", "v_b_proj.weight"))]:
            del tensors[name]
        tensors |= kept

    monkeypatch.setitem(family_gguf.METADATA, "deepseek2", whole)
    write(tmp_path / "m.gguf", model, "deepseek2")
    b = allocate(ReferenceBackend(GGUFCheckpoint(tmp_path / "m.gguf"), AS_STORED), BLOCKS)
    ours = b.step(step_of(b, IDS[:N], 0, 0, TABLE, 0))
    assert relative_error(ours, logits_of(model, IDS[:N])) < 1e-4


def test_what_a_router_may_not_be_is_said():
    cls, changes = CASES["deepseek2moe"]
    given = random_config(cls, **changes)
    with pytest.raises(UnsupportedModelError, match="topk_method = 'random'"):
        read_config({**given, "topk_method": "random"})
    limited = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}
    with pytest.raises(CheckpointError, match="8 experts in 3 groups"):
        read_config({**given, **limited})


def test_a_chat_beyond_its_budget_gives_rows_up_and_drafts_change_nothing():
    said = []
    for draft in ("none", "ngram"):
        with latent_model(ctx=256) as m:
            m.tokenizer.eos_ids = frozenset()
            s = m.session(temperature=0, draft=draft, kv_budget=128, max_tokens=300)
            *_, done = s.send("abc " * 5)
            said.append(done.completion.token_ids)
            assert done.stats.evicted_tokens > 0
            assert s._branch.slots <= 128
            assert s._branch.position <= 256 < len(s._branch)
    assert said[0] == said[1]
