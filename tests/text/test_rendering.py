"""Helper processes that render templates: who may end them, and what the program around them may do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinychat.base.errors import CheckpointError, TinychatError, UsageError
from tinychat.text import rendering

COUNT = "{{ messages | length }}"


@pytest.fixture
def alone(monkeypatch):
    """No helper that another test has used; those of this test end with it."""
    helpers = []
    monkeypatch.setattr(rendering, "_idle", helpers)
    yield helpers
    while helpers:
        helpers.pop().end()


def count(n: int) -> str:
    return rendering.render(COUNT, {"messages": [{"content": "x"}] * n})


def test_one_helper_renders_one_after_the_other(alone):
    assert [count(n) for n in (1, 2, 3)] == ["1", "2", "3"]
    (helper,) = alone
    assert rendering.render("{{ a }}", {"a": "b"}) == "b"
    assert alone == [helper]
    assert list(helper.known) == [COUNT, "{{ a }}"]


def test_many_templates_do_not_pile_up_in_a_helper(alone, monkeypatch):
    monkeypatch.setattr(rendering, "TEMPLATES", 3)
    for n in range(10):
        assert rendering.render(f"{n}{{{{ a }}}}", {"a": "!"}) == f"{n}!"
        assert all(len(h.known) <= 3 for h in alone)


def test_text_arrives_as_it_is(alone):
    odd = "\ud800 \x00 \u2028 \U0001f600 é \r\n \ue0ff"
    assert rendering.render("{{ a }}{{ b[1] }}{{ c.d }}", {"a": odd, "b": [1, odd], "c": {"d": 1.5}}) == (
        odd + odd + "1.5"
    )


def test_threads_render_at_the_same_time_and_hear_their_own_answers(alone):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(count, range(200))) == [str(n) for n in range(200)]
    assert 1 <= len(alone) <= rendering.KEPT


def test_an_endless_template_does_not_hold_up_another_thread(alone, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0)  # and up to one
    ended = threading.Event()

    def endless():
        with pytest.raises(CheckpointError):
            rendering.render(
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}
            )
        ended.set()

    thread = threading.Thread(target=endless)
    thread.start()
    assert count(3) == "3"
    assert not ended.is_set()
    thread.join()


def test_memory_that_the_program_takes_meanwhile_is_not_the_templates(alone):
    kept = []
    thread = threading.Thread(target=lambda: kept.append(bytearray(700_000_000)))
    thread.start()
    messages = [{"role": "user", "content": "word " * 20}] * 4000
    for _ in range(5):
        text = rendering.render("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages": messages})
        assert len(text) == 400_000
    thread.join()


def test_a_long_honest_conversation_has_more_time_and_memory_than_a_short_one():
    short, long = rendering.limits(1000), rendering.limits(20_000_000)
    assert all(a < b for a, b in zip(short, long, strict=True))


def test_a_system_that_does_not_limit_memory_is_watched(alone, monkeypatch):
    # As on macOS: the helper may map what it likes.
    helper = rendering.Helper()
    monkeypatch.setattr(rendering, "MEMORY", 1 << 26)
    monkeypatch.setattr(rendering, "limits", lambda length: (1 << 40, 20, 1 << 40))
    watched = []

    def resident(pid):
        watched.append(pid)
        return 1 << 41

    monkeypatch.setattr(rendering, "_resident", resident)
    alone.append(helper)
    with pytest.raises(CheckpointError, match="without end"):
        rendering.render("{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", {})
    assert watched == [helper.process.pid]
    assert helper.process.returncode == -signal.SIGKILL


def test_resident_memory_is_that_of_the_process():
    assert 1 << 20 < rendering._resident(os.getpid()) < 1 << 40


def test_a_helper_that_was_killed_while_it_waited_is_replaced(alone):
    assert count(1) == "1"
    (first,) = alone
    os.kill(first.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
    assert count(2) == "2"
    assert alone != [first]


def test_a_helper_that_never_answers_is_given_up(alone, monkeypatch):
    assert count(1) == "1"
    (helper,) = alone
    os.kill(helper.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(rendering, "PATIENCE", -2.0)
    with pytest.raises(TinychatError, match="does not answer"):
        count(2)
    assert helper.process.returncode == -signal.SIGKILL
    assert not alone


def test_no_helper_can_be_started(alone, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TinychatError, match="cannot be started"):
        count(1)
    rendering.prepare()  # says nothing: who needs a helper will
    assert not alone


def test_a_helper_that_ends_at_once_is_said_in_two_lines(alone, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TinychatError, match="code 1"):
        count(1)


def test_ctrl_c_while_a_template_computes_ends_the_helper(alone):
    code = """
import signal, sys, threading
from tinychat.text import rendering

class Helper(rendering.Helper):
    def _wait(self, pipe, event, until, memory):
        if memory is not None:
            signal.raise_signal(signal.SIGINT)
        super()._wait(pipe, event, until, memory)

rendering.Helper = Helper
try:
    rendering.render("{{ 1 }}", {})
except KeyboardInterrupt:
    print("interrupted", rendering._idle)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted []\n"
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_programs_with_closed_streams_render(closed, tmp_path):
    out = tmp_path / "out"
    code = f"""
from tinychat.text import rendering
text = rendering.render("{{{{ a }}}}", {{"a": "fine"}})
open({str(out)!r}, "w").write(text)
"""
    subprocess.run(
        ["sh", "-c", f'exec "$1" -c "$2" {closed}', "sh", sys.executable, code], timeout=60, check=True
    )
    assert out.read_text() == "fine"


def test_nothing_is_left_behind_when_the_program_ends():
    code = """
from tinychat.text import rendering
rendering.render("{{ 1 }}", {})
print(rendering._idle[0].process.pid)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


PROGRAM = """
import multiprocessing, sys
from tinychat.text import rendering

def count(n):
    return rendering.render("{{ n }}", {"n": n})

if __name__ == "__main__":
    assert count(7) == "7"
    (helper,) = rendering._idle
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(count, range(6)) == [str(n) for n in range(6)]
    assert helper.process.poll() is None
    assert count(8) == "8"
    assert rendering._idle == [helper]
    print("fine")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_the_program_have_helpers_of_their_own(method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, method], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "fine\n", done.stderr


def test_a_folder_full_of_traps_is_not_imported_from(alone, tmp_path, monkeypatch):
    for name in (
        "json",
        "jinja2",
        "markupsafe",
        "struct",
        "datetime",
        "sitecustomize",
        "usercustomize",
        "re",
    ):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'caught')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    assert count(1) == "1"
    assert not (tmp_path / "caught").exists()


def test_sources_are_bounded_before_they_are_read(alone):
    with pytest.raises(CheckpointError, match="characters"):
        rendering.check("x" * 150_000_000)
    assert not alone  # nobody was asked


@pytest.mark.slow
@pytest.mark.parametrize("source", [
    "{{ " + "(" * 300_000 + "1" + ")" * 300_000 + " }}",
    "{% if 1 %}" * 50_000 + "{% endif %}" * 50_000,
    "{{ " + "not " * 200_000 + "1 }}",
    "{{ " + "-" * 900_000 + "1 }}",
    "{{ 1" + " + 1" * 200_000 + " }}",
    "{{ x" + ".a" * 400_000 + " }}",
    "{{ x" + "|d" * 400_000 + " }}",
    "{{ x }}" * 140_000,
    "{% set a = 1 %}" * 60_000,
    "{% macro m() %}" * 30_000 + "{% endmacro %}" * 30_000,
    "{#" * 500_000,
    "{{ '" + "\\\\" * 400_000,
    "{{ 'a' " * 100_000,
    "{% for a in b %}{% else %}" * 30_000,
], ids=lambda s: s[:20])  # fmt: skip
def test_compiling_is_bounded_too(alone, monkeypatch, source):
    for name in ("SECONDS", "SECONDS_A_MEGABYTE"):
        monkeypatch.setattr(rendering, name, 0)  # and up to one
    with pytest.raises(CheckpointError, match="template"):
        rendering.render(source, {"x": {}})


def test_a_conversation_that_is_too_long_for_an_honest_template_is_not_called_hostile(alone, monkeypatch):
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0)  # and up to one
    quadratic = (
        "{% for m in messages %}{% for n in messages %}{% if m == n %}{% endif %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(CheckpointError, match="takes too much for a conversation of"):
        rendering.render(quadratic, {"messages": [{"content": "word " * 20}] * 5000})
    assert rendering.render(quadratic, {"messages": [{"content": "word " * 20}] * 50}) == ""


def test_what_is_no_json_is_refused(alone):
    with pytest.raises(UsageError, match="handed to the chat template"):
        rendering.render(COUNT, {"messages": object()})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UsageError, match="handed to the chat template"):
        rendering.render(COUNT, {"messages": deep})


def test_a_conversation_of_many_megabytes_is_refused(alone):
    with pytest.raises(UsageError, match="MB"):
        rendering.render(COUNT, {"messages": "x" * (rendering.MAX_REQUEST + 1)})


def test_an_escaped_template_could_still_open_nothing(alone):
    helper = rendering.Helper()
    alone.append(helper)
    assert count(1) == "1"
    if not os.path.exists(f"/proc/{helper.process.pid}/limits"):
        pytest.skip("needs /proc")
    with open(f"/proc/{helper.process.pid}/limits") as f:
        limits = {line[:26].strip(): line[26:].split()[0] for line in f}
    assert limits["Max open files"] == "3"
    assert limits["Max file size"] == "0"
    assert limits["Max core file size"] == "0"
    assert int(limits["Max address space"]) < 1 << 30
