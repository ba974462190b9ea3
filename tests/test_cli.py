"""The command line as its users meet it: real processes, pipes, signals, terminals, from outside."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import termios
import time

import click
import numpy as np
import psutil
import pytest
from tiny import byte_tokenizer, tiny_folder
from tiny_gguf import write as write_gguf

from tinychat.config import RopeConfig

TINYCHAT = [sys.executable, "-m", "tinychat"]
GREEDY = ["--temp", "0", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory and an empty TINYCHAT_HOME."""
    for name in ("TINYCHAT_DEBUG", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def tinychat(*args, stdin: str | bytes | None = None, **kwargs):
    """Run to the end; text in and out. Without `stdin` there is none (/dev/null)."""
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    if isinstance(stdin, str):
        given["input"] = stdin.encode()
    out = subprocess.run([*TINYCHAT, *map(str, args)], capture_output=True, timeout=120, **given, **kwargs)
    out.stdout, out.stderr = out.stdout.decode(), out.stderr.decode()
    return out


def assert_two_lines(out, code):
    """An error: one line saying what is wrong, one saying what to do, nothing on stdout."""
    assert out.returncode == code, out.stderr
    assert out.stdout == ""
    lines = out.stderr.splitlines()
    assert len(lines) == 2, out.stderr
    assert lines[0].startswith("Error: ")
    assert lines[1].strip()
    assert "Traceback" not in out.stderr
    assert "Internal error" not in out.stderr


# One answer


def test_an_answer_goes_to_stdout_and_nothing_else_does(folder, here):
    out = tinychat("run", folder, "hello", *GREEDY)
    assert out.returncode == 0
    assert out.stdout.endswith("\n")
    assert out.stderr == ""
    verbose = tinychat("run", folder, "hello", *GREEDY, "--verbose")
    assert verbose.stdout == out.stdout
    assert "tok/s" in verbose.stderr


def test_the_same_prompt_by_argument_pipe_and_file(folder, here):
    (here / "prompt.txt").write_text("hello\n")
    outs = [
        tinychat("run", folder, "hello", *GREEDY),
        tinychat("run", folder, *GREEDY, stdin="hello\n"),
        tinychat("run", folder, "-f", "prompt.txt", *GREEDY),
        tinychat("run", folder, "hello", *GREEDY, stdin=""),
        tinychat("run", folder, "hello", *GREEDY, stdin="\n  \n"),
    ]
    assert {o.returncode for o in outs} == {0}
    assert len({o.stdout for o in outs}) == 1


def test_files_then_stdin_then_the_prompt(folder, here):
    (here / "a.txt").write_text("first\n")
    (here / "b.txt").write_text("second")
    together = tinychat(
        "run", folder, "-f", "a.txt", "-f", "b.txt", "last", *GREEDY, "--json", stdin="third\n"
    )
    alone = tinychat("run", folder, "first\n\nsecond\n\nthird\n\nlast", *GREEDY, "--json")
    assert json.loads(together.stdout)["text"] == json.loads(alone.stdout)["text"]
    counts = [json.loads(o.stdout)["stats"]["prompt_tokens"] for o in (together, alone)]
    assert counts[0] == counts[1]


def test_json_is_one_object(folder, here):
    out = tinychat("run", folder, "hello", *GREEDY, "--json")
    answer = json.loads(out.stdout)
    assert set(answer) >= {"model", "text", "finish_reason", "stats"}
    assert answer["finish_reason"] in ("stop", "length")
    stats = answer["stats"]
    assert set(stats) >= {
        *("prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"),
        *("ttft_s", "tpot_s", "prefill_tps", "decode_tps", "evicted_tokens", "kv_bytes", "peak_rss_bytes"),
    }
    assert stats["generated_tokens"] <= 12
    plain = tinychat("run", folder, "hello", *GREEDY)
    assert plain.stdout == answer["text"] + "\n"


def test_stream_json_is_one_object_an_event(folder, here):
    out = tinychat("run", folder, "hello", *GREEDY, "--stream-json")
    *events, done = [json.loads(line) for line in out.stdout.split("\n")[:-1]]
    assert {e["event"] for e in events} == {"text"}
    assert done["event"] == "done"
    assert done["text"] == "".join(e["text"] for e in events)
    assert done["token_ids"] == [e["token_id"] for e in events if e["token_id"] is not None]
    assert done["stats"]["generated_tokens"] == len(done["token_ids"])
    assert set(done) >= {"finish_reason", "stats"}


def test_sampling_flags_reach_the_sampler(folder, here):
    def say(*flags):
        return json.loads(tinychat("run", folder, "hello", "--json", *flags).stdout)

    seeded = [say("--seed", "4", "--max-tokens", "9", "--temp", "1.5")["text"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert say("--seed", "5", "--max-tokens", "9", "--temp", "1.5")["text"] != seeded[0]
    assert say("--max-tokens", "0")["stats"]["generated_tokens"] == 0
    greedy = say(*GREEDY)["text"]
    assert say("--temp", "3", "--top-k", "1", "--max-tokens", "12", "--draft", "none")["text"] == greedy
    stop = greedy[3:5]
    cut = say(*GREEDY, "--stop", "never", "--stop", stop)
    assert (cut["text"], cut["finish_reason"]) == (greedy[: greedy.index(stop)], "stop")
    assert say(*GREEDY, "-s", "Be someone else.")["stats"]["prompt_tokens"] > 30


def test_a_full_context_is_said_on_stderr(folder, here):
    out = tinychat("run", folder, "hello", "--ctx", "40", "--temp", "5", "--top-k", "0", "--seed", "1")
    assert out.returncode == 0
    if "context" not in out.stderr:  # the random model ended its turn within 16 tokens
        pytest.fail(f"choose another seed: {out.stderr!r}")


def test_a_base_model_says_that_it_completes(tmp_path, here):
    base = tiny_folder(tmp_path / "base", template=None)
    out = tinychat("run", base, "hello", *GREEDY)
    assert out.returncode == 0
    assert "no chat template" in out.stderr
    assert out.stdout.strip()


# What goes wrong


def test_usage_errors(folder, here):
    (here / "latin1.txt").write_bytes("café".encode("latin-1"))
    (here / "binary").write_bytes(bytes(range(256)))
    for args, stdin in [
        (["run", folder], None),
        (["run", folder], ""),
        (["run", folder, ""], "   \n"),
        (["run", folder, "--temp", "warm", "x"], None),
        (["run", folder, "--temp", "-1", "x"], None),
        (["run", folder, "--top-p", "nan", "x"], None),
        (["run", folder, "--top-p", "7", "x"], None),
        (["run", folder, "--ctx", "0", "x"], None),
        (["run", folder, "--ctx", "100000000", "x"], None),
        (["run", folder, "--threads", "0", "x"], None),
        (["run", folder, "--stop", "", "x"], None),
        (["run", folder, "--seed", "-3", "x"], None),
        (["run", folder, "--json", "--stream-json", "x"], None),
        (["run", folder, "--bogus", "x"], None),
        (["run", folder, "-f", "missing.txt", "x"], None),
        (["run", folder, "-f", "latin1.txt", "x"], None),
        (["run", folder], "café".encode("latin-1")),
        (["run", folder], bytes(range(256))),
        (["run", folder, "x" * 2000], None),
        (["run", folder, "x", "too", "many"], None),
        (["ppl", folder, "binary"], None),
        (["ppl", folder, "missing.txt"], None),
        (["nonsense"], None),
        (["completion", "tcsh"], None),
        (["completion"], None),
        (["quantize", folder], None),
        (["quantize", folder, "--out", "out", "--group-size", "128"], None),
        (["quantize", folder, "--out", "out", "--group-size", "0"], None),
        (["quantize", folder, "--out", "out", "--calib", "binary"], None),
    ]:
        out = tinychat(*args, stdin=stdin)
        assert out.returncode == 2, (args, out.stderr)
        assert_two_lines(out, 2)
    assert sorted(p.name for p in here.iterdir()) == ["binary", "latin1.txt"]


def test_an_unknown_model_is_3(here):
    for name in ("no-such-model", "./no/such/folder", "no-such-file.gguf"):
        assert_two_lines(tinychat("run", name, "hi", "--offline"), 3)
    (here / "empty").mkdir()
    assert_two_lines(tinychat("run", "./empty", "hi"), 3)


def test_damaged_models_are_1(folder, here):
    weights = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())

    def broken(name, change):
        copy = tiny_folder(here / name)
        change(copy)
        return tinychat("run", f"./{name}", "hi")

    nan = weights[:-4] + np.array([np.nan], dtype=np.float32).tobytes()

    def pickled(f):
        (f / "model.safetensors").unlink()
        (f / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch stolen'\ntR.")

    cases = {
        "nan": lambda f: (f / "model.safetensors").write_bytes(nan),
        "pickle": pickled,
        "cut short": lambda f: (f / "model.safetensors").write_bytes(weights[: len(weights) // 2]),
        "not safetensors": lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100),
        "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
        "no json": lambda f: (f / "config.json").write_text("{"),
        "architecture": lambda f: (f / "config.json").write_text(
            json.dumps({**config, "architectures": ["FooForCausalLM"]})
        ),
        "rope": lambda f: (f / "config.json").write_text(
            json.dumps({**config, "rope_scaling": {"type": "mrope", "factor": 4}})
        ),
        "shape": lambda f: (f / "config.json").write_text(json.dumps({**config, "intermediate_size": 128})),
        "layers": lambda f: (f / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3})),
        "tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    }
    for name, change in cases.items():
        out = broken(name, change)
        assert out.returncode == 1, (name, out.stderr)
        assert_two_lines(out, 1)
    assert "FooForCausalLM" in broken("architecture", cases["architecture"]).stderr
    assert "mrope" in broken("rope", cases["rope"]).stderr
    assert not list(here.rglob("stolen"))
    (here / "file.gguf").write_bytes(b"GGUF but not really")
    assert_two_lines(tinychat("run", "./file.gguf", "hi"), 1)
    write_gguf(here / "whole.gguf")
    (here / "cut.gguf").write_bytes((here / "whole.gguf").read_bytes()[:-1000])
    assert_two_lines(tinychat("run", "./cut.gguf", "hi"), 1)
    (here / "model.pth").write_bytes(b"\x80\x04")
    assert_two_lines(tinychat("run", "./model.pth", "hi"), 1)


def test_a_context_that_does_not_fit_is_4(tmp_path, here):
    wide = dict(head_dim=512, n_kv_heads=4, rope=RopeConfig(dim=512), context_length=1 << 25)
    big = tiny_folder(tmp_path / "wide", **wide)
    out = tinychat("run", big, "hi", "--ctx", 1 << 25)
    assert_two_lines(out, 4)
    assert "--ctx" in out.stderr


def test_debug_shows_the_traceback(here, monkeypatch):
    monkeypatch.setenv("TINYCHAT_DEBUG", "1")
    out = tinychat("run", "no-such-model", "hi", "--offline")
    assert out.returncode == 3
    assert "Traceback" in out.stderr
    assert out.stderr.splitlines()[-2].startswith("Error: ")


def test_an_argument_that_is_not_utf8_is_answered(folder, here):
    out = subprocess.run(
        [*map(os.fsencode, TINYCHAT), b"run", os.fsencode(folder), b"caf\xe9", *map(os.fsencode, GREEDY)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert out.returncode == 0, out.stderr
    out.stdout.decode()


# Streams that are not there


def test_a_reader_that_leaves_early_is_no_error(folder, here):
    for flags in ([], ["--stream-json"], ["--json"]):
        read, write = os.pipe()
        process = subprocess.Popen(
            [*TINYCHAT, "run", str(folder), "hello", "--max-tokens", "200", *flags],
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
        )
        os.close(write)
        if not flags:
            assert os.read(read, 1)
        os.close(read)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_standard_streams(folder, here, closed):
    shell = 'exec "$@" ' + {0: "<&-", 1: "</dev/null >&-", 2: "</dev/null 2>&-"}[closed]
    out = subprocess.run(
        ["sh", "-c", shell, "sh", *TINYCHAT, "run", str(folder), "hello", *GREEDY],
        capture_output=True,
        timeout=60,
    )
    assert (out.returncode, out.stderr) == (0, b"")
    assert bool(out.stdout) == (closed != 1)


# Ctrl+C


def interrupted(folder, where, nth=1, *flags):
    """Run a command line that gets a real SIGINT when it calls `where` for the nth time."""
    module, _, function = where.partition(":")
    code = f"""
import importlib, os, signal, sys
owner = importlib.import_module({module!r})
*outer, name = {function!r}.split(".")
for part in outer:
    owner = getattr(owner, part)
inner, calls = getattr(owner, name), []
def call(*args, **kwargs):
    calls.append(1)
    if len(calls) == {nth}:
        os.kill(os.getpid(), signal.SIGINT)
    return inner(*args, **kwargs)
setattr(owner, name, call)
from tinychat.cli.main import main
main(sys.argv[1:])
"""
    args = ["run", str(folder), "hello " * 20, "--temp", "0", "--draft", "none", *flags]
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, stdin=subprocess.DEVNULL, timeout=60
    )


def test_ctrl_c_while_the_program_imports_itself(here):
    code = """
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
runpy.run_module("tinychat", run_name="__main__")
"""
    for module in ("click", "tinychat.cli.reports"):
        out = subprocess.run([sys.executable, "-c", code, "list", module], capture_output=True, timeout=60)
        assert (out.returncode, out.stdout, out.stderr) == (130, b"", b"")


def test_ctrl_c_while_loading(folder, here):
    for where in ("tinychat.model:open_checkpoint", "tinychat.model:Model.__init__"):
        out = interrupted(folder, where)
        assert (out.returncode, out.stdout, out.stderr.strip()) == (130, b"", b"")


def test_ctrl_c_while_prefilling(folder, here):
    out = interrupted(folder, "tinychat.engine:Engine.run", 1)
    assert (out.returncode, out.stderr) == (130, b"")
    assert len(out.stdout) <= 5  # at most the token that was under way


def test_ctrl_c_while_decoding_keeps_what_was_said(folder, here):
    whole = interrupted(folder, "tinychat.engine:Engine.run", 10**9, "--max-tokens", "40").stdout.decode()
    out = interrupted(folder, "tinychat.engine:Engine.run", 12, "--max-tokens", "40")
    assert out.returncode == 130
    assert out.stderr == b""
    said = out.stdout.decode().removesuffix("\n").rstrip("\ufffd")
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole) - 5


def test_ctrl_c_still_gives_whole_json(folder, here):
    out = interrupted(folder, "tinychat.engine:Engine.run", 12, "--json")
    assert out.returncode == 130
    answer = json.loads(out.stdout)
    assert answer["finish_reason"] == "cancelled"
    assert 5 < answer["stats"]["generated_tokens"] < 15


def test_a_second_ctrl_c_does_not_wait(folder, here):
    # The step after the first one hangs; the second interrupt must get through.
    code = """
import os, signal, sys, tinychat.engine as e
inner, calls = e.Engine.run, []
def run(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
        print("hanging", file=sys.stderr, flush=True)
        signal.pause()
    return inner(*args, **kwargs)
e.Engine.run = run
from tinychat.cli.main import main
main(sys.argv[1:])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(folder), "hello", "--temp", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr.readline() == b"hanging\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_ctrl_c_on_the_demo_model(demo_gguf, here):
    process = subprocess.Popen(
        [
            *TINYCHAT,
            "run",
            str(demo_gguf),
            "Tell me a very long story.",
            "--temp",
            "0",
            "--max-tokens",
            "4000",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert (first + out).endswith(b"\n")
    assert len(out) < 2000


# A conversation in a terminal


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *args, env=None):
        self.fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\xc8\x00\x00\x00\x00\x00")

        def own_the_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*TINYCHAT, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=own_the_terminal,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
        )
        os.close(slave)
        self.seen = self.unread = ""

    def type(self, text):
        """Press keys."""
        os.write(self.fd, text.encode())

    def expect(self, pattern, timeout=60):
        """Wait until the screen shows it; everything up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.unread)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            try:
                more = os.read(self.fd, 65536) if ready else b""
            except OSError:  # the other side is gone
                more = b""
            assert more, f"no {pattern!r} in {self.unread!r}"
            self.unread += more.decode(errors="replace")
            self.seen += more.decode(errors="replace")
        shown, self.unread = self.unread[: match.end()], self.unread[match.end() :]
        return shown

    def wait_until_it_listens(self, timeout=30):
        """Until it sleeps: Python's input() misses a signal that comes just before it begins to wait."""
        deadline = time.monotonic() + timeout
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline

    def ends(self, timeout=30):
        """The exit code, once it has ended by itself."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not select.select([self.fd], [], [], 0.1)[0]:
                if self.process.poll() is not None:
                    break
                continue
            try:
                more = os.read(self.fd, 65536)
            except OSError:
                break
            if not more:
                break
            self.seen += more.decode(errors="replace")
        return self.process.wait(timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


PROMPT = ">>> "


def test_a_conversation_line_by_line(folder, here):
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)
        t.type("hello\r")
        answer = t.expect(PROMPT)
        assert "Error" not in answer
        t.type("/stats\r")
        assert "context" in t.expect(PROMPT)
        t.type('"""\r')
        t.expect(r"\.\.\. ")
        t.type("line one\r")
        t.expect(r"\.\.\. ")
        t.type('line two\r"""\r')
        t.expect(r"\.\.\. ")
        t.expect(PROMPT)
        t.type("continued \\\r")
        t.expect(r"\.\.\. ")
        t.type("here\r")
        t.expect(PROMPT)
        t.type("/regen\r")
        t.expect(PROMPT)
        t.type("/edit other words\r")
        t.expect(PROMPT)
        t.type("/set temperature 0.5\r")
        assert "temperature 0.5" in t.expect(PROMPT)
        t.type("/set temperature hot\r")
        assert "not a number" in t.expect(PROMPT)
        t.type("/system Be kind.\r")
        assert "Be kind." in t.expect(PROMPT)
        t.type("/bogus\r")
        assert "not a command" in t.expect(PROMPT)
        t.type("/help\r")
        assert "/regen" in t.expect(PROMPT)
        t.type("/save chat.json\r")
        assert "Saved" in t.expect(PROMPT)
        t.type("/load nowhere.json\r")
        assert "Cannot read" in t.expect(PROMPT)
        t.type("/new\r")
        t.expect(PROMPT)
        t.type("/load chat.json\r")
        assert "other words" in t.expect(PROMPT)
        t.type("\x04")
        assert t.ends() == 0
    chat = json.loads((here / "chat.json").read_text())
    users = [n["content"] for n in chat["nodes"] if n["role"] == "user"]
    assert users == ["hello", "line one\nline two", "continued \nhere", "other words"]
    assert sum(n["role"] == "assistant" for n in chat["nodes"]) == 5
    assert chat["system"] == "Be kind."


def test_what_was_typed_is_there_the_next_time(folder, here):
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)
        t.type("remember me\r")
        t.expect(PROMPT)
        t.type("/exit\r")
        assert t.ends() == 0
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)
        t.type("\x1b[A\x1b[A")  # up: /exit, up: the message
        t.expect("remember me")


def test_ctrl_c_at_the_prompt(folder, here):
    with Terminal("run", folder, "--plain", *GREEDY) as t:
        t.expect(PROMPT)

        def interrupt():
            t.type("half a line")
            t.expect("half a line")
            t.wait_until_it_listens()
            t.type("\x03")

        interrupt()
        t.expect("Ctrl.C again")
        t.expect(PROMPT)
        t.type("hello\r")  # still there
        t.expect(PROMPT)
        interrupt()
        t.expect("Ctrl.C again")
        t.expect(PROMPT)
        interrupt()
        assert t.ends() == 130
        assert "Traceback" not in t.seen


def test_ctrl_c_stops_an_answer_and_keeps_it(demo_gguf, here):
    with Terminal("run", demo_gguf, "--plain", "--temp", "0") as t:
        t.expect(PROMPT)
        t.type("Tell me a very long story.\r")
        t.expect(r"story\.\r\n[^>]*\w+ \w+ \w+")
        t.type("\x03")
        t.expect(r"\(stopped\)")
        t.expect(PROMPT)
        t.type("/save chat.json\r")
        t.expect(PROMPT)
        t.type("/exit\r")
        assert t.ends() == 0
        assert "Traceback" not in t.seen
    _, answer = json.loads((here / "chat.json").read_text())["nodes"]
    assert answer["finish_reason"] == "cancelled"
    assert len(answer["content"].split()) >= 3
    assert answer["ids"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(here, tmp_path):
    # An answer of every byte there is: the terminal must see none of the control characters.
    loud = tiny_folder(tmp_path / "loud")
    with Terminal(
        "run", loud, "--plain", "--temp", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0"
    ) as t:
        t.expect(PROMPT)
        t.type("/set max_tokens 150\r")
        t.expect(PROMPT)
        t.type("go\r")
        shown = t.expect(PROMPT).split("go\r\n", 1)[1]
        answer = shown.rsplit("\n", 1)[0]
        controls = [c for c in answer if ord(c) < 32 and c not in "\r\n\t"]
        assert controls in ([], ["\x1b"] * len(controls))  # readline's own escapes before the next prompt
        assert len(controls) <= 2


def test_no_color(here):
    with Terminal("run", "no-such-model", "hi", "--offline") as t:
        t.ends()
        assert "\x1b[31m" in t.seen
    with Terminal("run", "no-such-model", "hi", "--offline", env={"NO_COLOR": "1"}) as t:
        t.ends()
        assert "Error:" in t.seen
        assert "\x1b[" not in t.seen


# Reports


def test_ppl(folder, here):
    (here / "text.txt").write_text("It was a dark and stormy night. " * 20)
    out = tinychat("ppl", folder, "text.txt", "--json", "--ctx", "64", "--device", "reference")
    facts = json.loads(out.stdout)
    assert facts["ctx"] == 64
    ids = byte_tokenizer().encode((here / "text.txt").read_text())
    assert facts["n_tokens"] == len(ids) // 64 * 32
    assert 1 < facts["perplexity"] < 1e9
    plain = tinychat("ppl", folder, "text.txt", "--ctx", "64", "--device", "reference")
    assert float(plain.stdout.split()[0]) == pytest.approx(facts["perplexity"], abs=1e-3)
    default = json.loads(tinychat("ppl", folder, "text.txt", "--json").stdout)
    assert default["ctx"] == 256  # the model's own context is smaller than the usual 512
    (here / "empty.txt").write_text("")
    assert_two_lines(tinychat("ppl", folder, "empty.txt"), 2)


def test_doctor(here):
    out = tinychat("doctor", "--json")
    facts = json.loads(out.stdout)
    assert (out.returncode == 0) == (facts["problems"] == [])
    assert facts["cores"] == len(os.sched_getaffinity(0)) or facts["cores"] < os.cpu_count()
    assert facts["home"] == os.environ["TINYCHAT_HOME"]
    assert set(facts) >= {"tinychat", "python", "platform", "memory_free", "isa", "models"}
    assert not (here.parent / "home").exists()  # looking is not touching


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(here, shell):
    out = tinychat("completion", shell)
    assert out.returncode == 0
    assert "_TINYCHAT_COMPLETE" in out.stdout


def test_completion_offers_commands_and_models(here):
    env = {
        **os.environ,
        "_TINYCHAT_COMPLETE": "bash_complete",
        "COMP_CWORD": "1",
        "COMP_WORDS": "tinychat pu",
    }
    code = "import sys; sys.argv[0] = 'tinychat'; from tinychat.cli.main import main; main()"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "pull" in out.stdout
    env.update(COMP_CWORD="2", COMP_WORDS="tinychat run smol")
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "smollm2-135m" in out.stdout


def test_help_and_version(here):
    for args in (["--help"], ["run", "-h"], ["--version"]):
        out = tinychat(*args)
        assert (out.returncode, out.stderr) == (0, "")
        assert "tinychat" in out.stdout


def test_little_memory_is_an_error_not_a_crash(folder, here):
    limit = 1 << 30

    def less():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    out = tinychat("run", folder, "hello", *GREEDY, "--threads", "1", preexec_fn=less)
    assert out.returncode in (0, 4), out.stderr
    if out.returncode == 4:
        assert_two_lines(out, 4)


@pytest.mark.parametrize("bits", ["16", "8"])
def test_bench_measures_what_it_says(folder, here, bits):
    sizes = ("-p", 32, "-n", 2, "--context", 0, "--context", 40, "--rounds", 1)
    out = tinychat("bench", folder, *sizes, "--kv-bits", bits, "--json")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["kv_bits"] == int(bits)
    assert [row["context"] for row in result["decode"]] == [0, 40]
    assert result["prefill"][0]["n_tokens"] == 32
    for row in result["decode"]:
        assert row["tok_s"] > 0
        assert row["fraction_of_bandwidth"] == pytest.approx(row["gb_s"] / result["read_bandwidth_gb_s"])
    assert result["weight_bytes_per_token"] > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("500MB", 500_000_000),
        ("4 gb", 4_000_000_000),
        ("1.5GiB", 3 << 29),
        ("10k", 10_000),
        ("7b", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    from tinychat.cli.options import Size

    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "4 apples", "1e9", "ib", "5ib"])
def test_what_is_not_a_size_is_refused(text):
    from tinychat.cli.options import Size

    with pytest.raises(click.UsageError, match="is not a size"):
        Size().convert(text, None, None)
