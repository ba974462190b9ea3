"""Generators in threads of their own, read by coroutines."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest

from tinychat.base.aside import AHEAD, Aside

pytestmark = pytest.mark.asyncio


class Counter:
    """A generator that counts until it is cancelled, and what became of it."""

    def __init__(self, most: int = 10**9):
        self.most, self.made, self.cancelled, self.over = most, 0, threading.Event(), threading.Event()

    def __call__(self):
        try:
            while self.made < self.most and not self.cancelled.is_set():
                self.made += 1
                yield self.made
        finally:
            self.over.set()

    def aside(self, **options):
        return Aside(self, self.cancelled.set, **options)


async def until(condition):
    """Let the loop go on until something is so; half a minute is long enough."""

    async def so():
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(so(), 30)


async def test_items_come_in_order_and_then_the_end():
    counter = Counter(200)
    reader = counter.aside()
    assert [i async for i in reader] == list(range(1, 201))
    assert [i async for i in reader] == []
    assert counter.over.is_set()


async def test_nothing_begins_before_it_is_asked_for():
    counter = Counter()
    reader = counter.aside()
    await reader.aclose()
    assert [i async for i in reader] == []
    assert not counter.over.is_set()
    assert counter.made == 0


async def test_a_slow_reader_holds_up_the_generator():
    counter, read = Counter(10 * AHEAD), []
    most = 0
    async for i in counter.aside():
        read.append(i)
        # So many wait, and one has no place to wait.
        await until(lambda: counter.made == min(len(read) + AHEAD + 1, counter.most))
        most = max(most, counter.made - len(read))
    assert most == AHEAD + 1
    assert len(read) == counter.most


async def test_the_loop_goes_on_meanwhile():
    go_on = threading.Event()

    def waits():
        go_on.wait(30)
        yield "said"

    reading = asyncio.ensure_future(anext(Aside(waits, go_on.set)))
    await asyncio.sleep(0)
    assert not reading.done()
    go_on.set()
    assert await reading == "said"


async def test_an_error_comes_behind_what_was_made_and_only_once():
    def fails():
        yield 1
        raise KeyError("two")

    reader = Aside(fails, lambda: None)
    assert await anext(reader) == 1
    with pytest.raises(KeyError, match="two"):
        await anext(reader)
    assert [i async for i in reader] == []


async def test_cancelling_the_task_waits_for_the_end_of_the_generator():
    counter, held = Counter(), threading.Event()

    def slow():
        for i in counter():
            yield i
            held.wait(30)

    def cancel():
        counter.cancelled.set()
        held.set()

    async def read():
        async for _ in Aside(slow, cancel):
            pass

    reading = asyncio.ensure_future(read())
    await until(lambda: counter.made == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert counter.over.is_set()


async def test_a_cancel_that_comes_before_the_generator_is_made_is_not_lost():
    begun, go_on, counter = threading.Event(), threading.Event(), Counter()

    def make():
        begun.set()
        go_on.wait(30)
        counter.cancelled.clear()  # as an answer does that begins
        return counter()

    reader = Aside(make, counter.cancelled.set)
    reading = asyncio.ensure_future(anext(reader))
    await until(begun.is_set)
    reading.cancel()
    await until(counter.cancelled.is_set)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await reader.aclose()
    assert counter.made <= 1


async def test_a_reader_that_is_forgotten_ends_the_generator():
    counter, works = Counter(), []
    async for i in counter.aside(begun=works.append):
        if i == 3:
            break
    works[0].join(30)
    assert counter.over.is_set()
    assert counter.cancelled.is_set()


async def test_a_context_leaves_nothing_running():
    counter = Counter()
    async with counter.aside() as reader:
        assert await anext(reader) == 1
    assert counter.over.is_set()


async def test_an_end_is_no_reason_to_cancel_what_comes_next():
    counter = Counter(3)
    reader = counter.aside()
    assert [i async for i in reader] == [1, 2, 3]
    await reader.aclose()
    del reader
    assert not counter.cancelled.is_set()


async def test_two_tasks_cannot_read_at_once():
    go_on = threading.Event()

    def waits():
        go_on.wait(30)
        yield 1

    reader = Aside(waits, go_on.set)
    first = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await anext(reader)
    go_on.set()
    assert await first == 1


async def test_the_thread_sees_the_context_of_the_reader():
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")
    user.set("Ada")

    def name():
        yield user.get()

    assert [n async for n in Aside(name, lambda: None)] == ["Ada"]


async def test_a_program_ends_although_nobody_reads_on(tmp_path):
    program = (
        "import asyncio, itertools, threading\n"
        "from tinychat.base.aside import Aside\n"
        "stop = threading.Event()\n"
        "def count():\n"
        "    for i in itertools.count():\n"
        "        if stop.is_set(): print('stopped', flush=True); return\n"
        "        yield i\n"
        "reader = Aside(count, stop.set)\n"
        "async def main(): print(await reader.__anext__())\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\nstopped\n", "")
