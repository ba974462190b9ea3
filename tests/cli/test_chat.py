"""One answer: what goes to stdout and stderr, and what is piped in."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from cli_helpers import GREEDY, TINYCHAT, tinychat
from tiny import tiny_folder


def test_an_answer_goes_to_stdout_and_nothing_else_does(folder, here):
    out = tinychat("run", folder, "hello", *GREEDY)
    assert out.returncode == 0
    assert out.stdout.endswith("\n")
    assert out.stderr == ""
    verbose = tinychat("run", folder, "hello", *GREEDY, "--verbose")
    assert verbose.stdout == out.stdout
    assert "tok/s" in verbose.stderr


def test_where_there_is_no_chat_to_go_on_with_a_new_one_is_said_to_begin(folder, here, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(here / "home"))
    first, second = (tinychat("run", folder, "--continue", "hello", *GREEDY) for _ in range(2))
    assert first.returncode == second.returncode == 0
    assert first.stderr == "There is no chat to go on with yet: this begins one.\n"
    assert second.stderr == ""


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
