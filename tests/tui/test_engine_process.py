"""The engine's process and its client, with a model that only plays one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest
import pytest_asyncio
from engine_helpers import FAKE, Heard, ask

from tinychat.base.events import Notice
from tinychat.process.client import EngineClient
from tinychat.process.protocol import Began, Died, Failed, Finished, Loaded, Text

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def engine():
    heard = Heard()
    client = EngineClient(heard.append, FAKE)
    await client.start()
    client.load("fake", {})
    await heard.wait(Loaded)
    yield client, heard
    await client.close()


async def test_an_answer_arrives_in_batches_and_as_the_session_keeps_it(engine):
    client, heard = engine
    ask(client, "slow 40")
    done = (await heard.wait(Finished)).message
    texts = [e for e in heard if isinstance(e, Text)]
    assert "".join(t.text for t in texts) == done.content == "".join(f"word{i} " for i in range(40))
    assert texts[-1].tokens == 40
    assert len(texts) <= 30  # 40 tokens in 0.8 s at no more than 20 batches a second
    assert done.ids == list(range(40))
    assert done.prompt_text == "<slow 40>"
    assert done.finish_reason == "stop"
    assert isinstance(next(e for e in heard if isinstance(e, (Began, Text))), Began)


async def test_cancel_is_felt_at_once_and_keeps_what_was_said(engine):
    client, heard = engine
    ask(client, "slow 10000")
    await heard.wait(Text)
    loop = asyncio.get_running_loop()
    began = loop.time()
    client.cancel()
    done = (await heard.wait(Finished)).message
    assert loop.time() - began < 1
    assert done.finish_reason == "cancelled"
    assert done.content.startswith("word0 ")


async def test_a_cancel_right_behind_the_question_is_not_lost(engine):
    client, heard = engine
    ask(client, "slow 10000")
    client.cancel()
    assert (await heard.wait(Finished)).message.finish_reason == "cancelled"
    ask(client, "hello")
    assert (await heard.wait(Finished, 2)).message.finish_reason == "stop"


async def test_thinking_is_counted_and_notices_pass(engine):
    client, heard = engine
    ask(client, "think")
    assert (await heard.wait(Finished)).message.stats["reasoning_tokens"] == 4
    ask(client, "notice")
    assert (await heard.wait(Notice)).message == "noted"


async def test_a_refusal_says_what_to_do_and_the_next_question_is_answered(engine):
    client, heard = engine
    ask(client, "refuse")
    failed = await heard.wait(Failed)
    assert (failed.what, failed.todo, failed.during) == (
        "This cannot be answered.",
        "Ask something else.",
        "answer",
    )
    ask(client, "hello")
    assert (await heard.wait(Finished)).message.content == "echo: hello"


async def test_the_screen_goes_before_the_engine(engine):
    client, _ = engine
    assert psutil.Process(client.pid).nice() > min(psutil.Process().nice(), 18)


async def test_tokens_are_counted_beside_a_running_answer(engine):
    client, heard = engine
    ask(client, "slow 10000")
    await heard.wait(Text)
    assert await client.count("one two three") == 3
    client.cancel()
    await heard.wait(Finished)


async def test_a_model_that_does_not_load_says_why():
    heard = Heard()
    client = EngineClient(heard.append, FAKE)
    await client.start()
    client.load("missing", {})
    assert (await heard.wait(Failed)).during == "load"
    await client.close()


@pytest.mark.parametrize(
    ("how", "reason"), [("die", "signal 9"), ("lose", "The GPU failed (cuLaunchKernel: LOST).")]
)
async def test_an_engine_that_is_gone_is_noticed_and_can_be_started_again(engine, how, reason):
    client, heard = engine
    ask(client, how)
    died = await heard.wait(Died)
    assert reason in died.reason
    assert not any(isinstance(e, Failed) for e in heard)  # the screen starts another one by itself
    assert "".join(e.text for e in heard if isinstance(e, Text)) == "one two three "
    assert client.pid is None
    assert await client.count("x") is None
    await client.start()
    client.load("fake", {})
    await heard.wait(Loaded, 2)
    ask(client, "hello")
    assert (await heard.wait(Finished)).message.content == "echo: hello"


async def test_the_engine_ends_when_its_parent_is_killed():
    code = (
        "import asyncio, sys\n"
        "from tinychat.conversation import Message\n"
        "from tinychat.process.client import EngineClient\n"
        "async def main():\n"
        "    c = EngineClient(lambda e: print(type(e).__name__, flush=True), sys.argv[1:])\n"
        "    await c.start(); print(c.pid, flush=True)\n"
        "    c.load('fake', {})\n"
        "    c.answer('1', [Message('user', 'slow 100000')], None, {})\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, *FAKE], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    while parent.stdout.readline().strip() != "Text":
        pass
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child = psutil.Process(pid) if psutil.pid_exists(pid) else None
    if child is not None:
        psutil.wait_procs([child], timeout=5)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
