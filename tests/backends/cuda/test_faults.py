"""What goes wrong on a GPU: no memory, a device that fails in a chat."""

from __future__ import annotations

import pytest
from cuda_steps import BLOCKS, IDS, TABLE, cuda
from emulation import controls, needs_emulation
from tiny import TinyCheckpoint, tiny_model

from tinychat.backends import Step
from tinychat.errors import MemoryBudgetError, TinychatError

pytestmark = needs_emulation


@needs_emulation
def test_no_room_for_the_weights_or_the_cache_is_said_with_numbers():
    controls().fake_fail(b"cuMemAlloc_v2", 2)
    with pytest.raises(MemoryBudgetError, match=r"not enough memory: .* are free") as e:
        cuda(TinyCheckpoint(0))
    assert "--device cpu" in e.value.todo
    b = cuda(TinyCheckpoint(0))
    with pytest.raises(MemoryBudgetError, match="not enough memory"):
        b.allocate_kv(1 << 22)
    b.allocate_kv(BLOCKS)  # a smaller one works after all
    assert b.step(Step(IDS[:3], 0, 0, TABLE, 2)).shape == (1, 258)


@needs_emulation
@pytest.mark.parametrize(
    "call", ["cuLaunchKernel", "cuGraphLaunch", "cuStreamSynchronize", "cuMemcpyHtoDAsync_v2"]
)
def test_a_gpu_that_fails_in_a_chat_is_said_and_the_conversation_is_kept(call):
    with tiny_model(ctx=256, backend="cuda") as m:
        m.tokenizer.eos_ids = frozenset()
        s = m.session(temperature=0, max_tokens=12, draft="none")
        list(s.send("hi"))
        events = s.send("more")
        text = "".join(next(events).text for _ in range(6))
        controls().fake_fail(call.encode(), 719)
        m.backend._program._graphs.pop(next(reversed(m.backend._program._graphs)))  # something is launched
        if call == "cuGraphLaunch":
            text += next(events).text
        with pytest.raises(TinychatError, match="Emulated GPU failed") as e:
            text += "".join(event.text for event in events)
        assert "kept" in e.value.todo
        assert text
        assert [t["role"] for t in s.messages][-2:] == ["user", "assistant"]
        assert s.messages[-1]["content"] == text
