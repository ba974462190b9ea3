"""What goes wrong on a GPU: no memory, a device that fails in a chat."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from backend_steps import BLOCKS, IDS, TABLE, cuda
from emulation import controls, needs_emulation
from tiny import TinyCheckpoint, tiny_model

from tinychat.backends.interface import Step
from tinychat.base.errors import DeviceLostError, MemoryBudgetError, TinychatError
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.keeper import Keeper

pytestmark = needs_emulation


def test_no_room_for_the_weights_or_the_cache_is_said_with_numbers():
    controls().fake_fail(b"cuMemAlloc_v2", 2)
    with pytest.raises(MemoryBudgetError, match=r"not enough memory: .* are free") as e:
        cuda(TinyCheckpoint(0))
    assert "--device cpu" in e.value.todo
    b = cuda(TinyCheckpoint(0))
    with pytest.raises(MemoryBudgetError, match="not enough memory"):
        b.allocate_kv(1 << 22)
    b.allocate_kv(BLOCKS)  # a smaller one works after all
    assert b.step(Step.of(IDS[:3], 0, 0, TABLE, 2)).shape == (1, 258)


@pytest.mark.parametrize(
    "call", ["cuLaunchKernelEx", "cuGraphLaunch", "cuStreamSynchronize", "cuMemcpyHtoDAsync_v2"]
)
def test_a_gpu_that_fails_in_a_chat_is_said_and_the_conversation_is_kept(call):
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        s = m.session(temperature=0, max_tokens=12, draft="none")
        list(s.send("hi"))
        events = s.send("more")
        text = "".join(next(events).text for _ in range(6))
        controls().fake_fail(call.encode(), 719)
        m.backend._steps.graphs.popitem()  # something is launched
        if call == "cuGraphLaunch":
            text += next(events).text
        with pytest.raises(TinychatError, match="Emulated GPU failed") as e:
            text += "".join(event.text for event in events)
        assert "kept" in e.value.todo
        assert text
        assert [t["role"] for t in s.messages][-2:] == ["user", "assistant"]
        assert s.messages[-1]["content"] == text


@pytest.fixture
def lose():
    """`lose(code)`: from now on every call of the driver fails."""
    yield controls().fake_lose
    controls().fake_lose(0)


@pytest.mark.parametrize("code", [719, 999])
def test_a_lost_gpu_is_said_every_time_and_the_conversation_can_be_stored(lose, code, process, tmp_path):
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        s = m.session(temperature=0, max_tokens=12, draft="none")
        keeper = Keeper(ChatStore(), s)
        list(keeper.follow(s, s.send("hi" * 40)))
        events = keeper.follow(s, s.send("more"))
        text = "".join(next(events).text for _ in range(3))
        lose(code)
        with pytest.raises(DeviceLostError, match="Emulated GPU failed") as e:
            text += "".join(event.text for event in events)
        assert "What was said is kept" in e.value.todo
        for attempt in (s.regenerate, lambda: s.send("again")):
            with pytest.raises(TinychatError, match="Emulated GPU failed"):
                list(attempt())
        with pytest.raises(TinychatError, match="Emulated GPU failed"):
            s.save_kv(tmp_path / "kv")
        keeper.close()
        said = [(t["role"], t["content"]) for t in s.messages]
        assert said[-2:] == [("user", "more"), ("assistant", text)]
        chat = ChatStore().chats()[0]
        stored = [(t.role, t.content) for t in ChatStore().messages(chat.id)]
        assert ("assistant", text) in stored
    lose(0)
    process()
    with tiny_model(ctx=256, backend="cuda") as m:  # the next start reads it again
        m.tokenizer.eos_ids = frozenset()
        again = m.session(temperature=0, max_tokens=5)
        again.nodes, again.leaf = s.nodes, s.leaf
        *_, done = again.send("and now")
        assert done.stats.generated_tokens == 5


def test_out_of_memory_on_a_lost_gpu_is_that_of_a_lost_gpu(lose):
    b = cuda(TinyCheckpoint(0))
    lose(2)
    with pytest.raises(TinychatError, match=r"failed \(.*OUT_OF_MEMORY"):
        b.step(Step.of(IDS[:3], 0, 0, TABLE, 2))


def test_a_load_that_finds_no_room_leaves_none_taken():
    gc.collect()
    before = controls().fake_used()
    controls().fake_device(12060, 1, 86, before + 100_000)  # another process takes nearly everything
    try:
        with pytest.raises(MemoryBudgetError, match=r"not enough memory: .* are free"):
            cuda(TinyCheckpoint(0))
        gc.collect()
        assert controls().fake_used() == before
    finally:
        controls().fake_device(12060, 1, 86, 8 << 30)
    assert cuda(TinyCheckpoint(0)).step(Step.of(IDS[:3], 0, 0, TABLE, 2)).shape == (1, 258)


def told(m, *texts):
    """A conversation that evicts; its answers' ids."""
    s = m.session(temperature=0, max_tokens=40, kv_budget=112, draft="none")
    return s, [list(s.send(text))[-1].completion.token_ids for text in texts]


@pytest.mark.parametrize(
    ("work", "call"),
    [
        ("move_slots", "cuMemAlloc_v2"),
        ("move_slots", "cuStreamSynchronize"),
        ("turn_keys", "cuLaunchKernelEx"),
    ],
)
def test_an_eviction_that_fails_leaves_no_cache_that_is_half_moved(work, call, monkeypatch):
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        m.engine.trained_context = 130 if work == "turn_keys" else 10**9
        s, _ = told(m, "x" * 60)
        inner = getattr(m.backend, work)

        def failing(*arguments):
            controls().fake_fail(call.encode(), 2 if call == "cuMemAlloc_v2" else 701)
            inner(*arguments)

        monkeypatch.setattr(m.backend, work, failing)
        kind = MemoryBudgetError if call == "cuMemAlloc_v2" else TinychatError
        talk = (event for text in ("a", "b", "c") for event in s.send(text))
        with pytest.raises(kind):
            list(talk)
        assert len(s._branch) == 0  # nothing of it is used again
        monkeypatch.setattr(m.backend, work, inner)
        nodes, leaf = list(s.nodes), s.leaf
        *_, done = s.send("d")
        with tiny_model(ctx=256, backend="cuda") as fresh:
            fresh.tokenizer.eos_ids = frozenset()
            fresh.engine.trained_context = m.engine.trained_context
            other = fresh.session(temperature=0, max_tokens=40, kv_budget=112, draft="none")
            other.nodes, other.leaf = nodes, leaf
            *_, expected = other.send("d")
        assert done.completion.token_ids == expected.completion.token_ids


@pytest.mark.parametrize(
    "call",
    [
        "cuMemAlloc_v2",
        "cuMemcpyHtoDAsync_v2",
        "cuLaunchKernelEx",
        "cuMemcpyDtoHAsync_v2",
        "cuStreamSynchronize",
    ],
)
def test_a_spread_of_values_that_fails_is_said_and_the_cache_is_whole(call):
    b, weights = cuda(TinyCheckpoint(0)), np.ones((2, 2, 37), np.float32)
    b.step(Step.of(IDS[:40], 0, 0, TABLE, 40))
    expected = b.value_spread(TABLE, weights)
    controls().fake_fail(call.encode(), 2 if call == "cuMemAlloc_v2" else 701)
    with pytest.raises(MemoryBudgetError if call == "cuMemAlloc_v2" else DeviceLostError):
        b.value_spread(TABLE, weights)
    np.testing.assert_array_equal(b.value_spread(TABLE, weights), expected)


def test_no_room_for_scores_in_a_chat_is_said_and_the_next_answer_is_right():
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        _, expected = told(m, "one", "two")
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        s = m.session(temperature=0, max_tokens=40, kv_budget=112, draft="none")
        controls().fake_fail(b"cuMemAlloc_v2", 2)
        with pytest.raises(MemoryBudgetError, match="not enough memory"):
            list(s.send("one"))
        answer = s.regenerate() if s.messages else s.send("one")
        assert list(answer)[-1].completion.token_ids == expected[0]
        assert list(s.send("two"))[-1].completion.token_ids == expected[1]


def shown(b, n: int) -> np.ndarray:
    """Logits of n single tokens, one step each."""
    return np.concatenate([b.step(Step.of(IDS[i : i + 1], i, i, TABLE, 0)) for i in range(n)])


@pytest.mark.parametrize(
    ("call", "left"), [("cuStreamEndCapture", 2), ("cuGraphInstantiateWithFlags", 2), ("cuGraphLaunch", 3)]
)
def test_a_graph_that_finds_no_room_costs_the_old_ones_and_no_answer(call, left):
    expected = shown(cuda(TinyCheckpoint(0)), 12)
    b = cuda(TinyCheckpoint(0))
    graphs = b._steps.graphs
    for rows in (2, 3, 4):
        for _ in range(2):
            b.step(Step.of(IDS[:rows], 0, 0, TABLE, 0))
    assert [g is not None for g in graphs.values()] == [True] * 3
    shown(b, 1)
    controls().fake_fail(call.encode(), 2)
    np.testing.assert_array_equal(shown(b, 12), expected)
    assert b._steps.most == left
    assert [g is not None for g in graphs.values()] == [True]  # of single tokens, made again
    for rows in (2, 3, 4):
        for _ in range(2):
            b.step(Step.of(IDS[:rows], 0, 0, TABLE, 0))
    assert len(graphs) == left


def test_where_no_graph_at_all_finds_room_steps_go_on_without():
    expected = shown(cuda(TinyCheckpoint(0)), 6)
    b = cuda(TinyCheckpoint(0))
    controls().fake_fail(b"cuGraphInstantiateWithFlags", 2)
    for _ in range(2):
        np.testing.assert_array_equal(shown(b, 6), expected)
    assert b._steps.most == 0
    assert list(b._steps.graphs.values()) == [None]
    before = controls().fake_launches()
    shown(b, 1)
    assert controls().fake_launches() > before
