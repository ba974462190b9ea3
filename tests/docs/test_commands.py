"""Every command that README.md and docs/ show is one: its flags exist, and the quick ones run."""

from __future__ import annotations

import json
import re

import click
import pytest
from cli_helpers import in_process
from documents import Command, commands, pages
from stored import add
from tiny_gguf import write

from tinychat.chats.chat_store import ChatStore
from tinychat.cli.main import cli
from tinychat.hub.aliases import ALIASES

# What stands for something of the reader's, and what a test puts there.
PLACEHOLDERS = {
    "ID": "1",
    "N": "1",
    "FORM": "q4_k",
    "SHAPE": "llama-3.2-1b",
    "OTHER": "http://127.0.0.1:9",
    "MODEL": "smollm2-135m",
    "WORDS": "some words",
}
# Commands that are parsed and not run, and why.
NOT_RUN = {
    r"run( MODEL| \./model\.gguf)?( -c)?( --(?!server)[\w-]+( [\w.]+)?)*": (
        "begins a conversation, which needs a terminal: tests/tui and tests/cli/test_repl.py do it"
    ),
    r"run.* --device cuda .*": "needs a GPU",
    r"run( -c)? .*--server .*": "asks another machine: tests/cli/test_served.py has one on loopback",
    r"serve.*": "goes on until it is stopped: tests/cli/test_serve_command.py",
    r"pull .*": "downloads: tests/hub has servers for it",
    r"quantize .*": "takes minutes: tests/quantize",
    r"bench .*": "measures for a while: tests/cli/test_reports.py runs it on a tiny model",
    r"doctor.*": "measures and asks the network: tests/cli/test_reports.py",
    r"list --a\w+": "measures the memory's bandwidth: tests/cli/test_commands.py",
    r"run .*--schema .*integer.*": "a random model does not end its texts: tests/cli/test_schema.py",
    r"ppl .*": "reads more text than a test may: tests/test_perplexity.py",
}

SHOWN = [command for page, text in pages().items() for command in commands(page, text)]


def filled(command: Command) -> list[str]:
    """Arguments with something in place of what stands for something."""
    return [PLACEHOLDERS.get(word, word) for word in command.words]


def reason(command: Command) -> str | None:
    """Why a command is not run; None: it is."""
    return next((why for what, why in NOT_RUN.items() if re.fullmatch(what, " ".join(command.words))), None)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A home with a tiny model under every name that is used, chats and prompts; and a reader's files."""
    root = tmp_path_factory.mktemp("reader")
    home, cwd = root / "home", root / "cwd"
    home.mkdir(), cwd.mkdir(), (home / "prompts").mkdir()
    write(root / "tiny.gguf")
    for name in ("NAME", "review"):
        (home / "prompts" / f"{name}.md").write_text("Look at this: {{input}}")
    (home / "config.toml").write_text("[sampling]\nmax_tokens = 4\n")
    (cwd / "address.json").write_text('{"const": 1}')
    for name in ("FILE", "letter.txt", "notes.md"):
        (cwd / name).write_text("Some text.")
    named = {word for c in SHOWN for word in filled(c)[1:2]} & set(ALIASES)
    (home / "aliases.json").write_text(json.dumps({n: f"file:{root / 'tiny.gguf'}" for n in named}))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TINYCHAT_DEBUG", "TINYCHAT_API_KEY", "NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("TINYCHAT_HOME", str(home))
        patch.chdir(cwd)
        store = ChatStore()
        for question in ("What is a glacier?", "And a fjord?", "A third one"):
            add(store, store.create("smollm2-135m").id, "user", question)
        store.close()
        yield cwd


def prepare(words: list[str]) -> None:
    """What must be so before a command: its model is here; the chats are, or were deleted."""
    from tinychat.hub import store

    for name in words[1:2]:
        if name in ALIASES:
            store.pull(name)
    if words[:1] == ["chats"]:
        chats = ChatStore()
        for n in (1, 2, 3):
            (chats.delete if words[1:2] == ["restore"] else chats.restore)(n)
        chats.close()


def parse(words: list[str]) -> None:
    """Raise a click error for what the command line does not take."""
    name, *rest = words
    if name not in cli.commands:
        raise click.UsageError(f"There is no command {name}.")
    with cli.commands[name].make_context(name, rest, parent=click.Context(cli)):
        pass


def test_every_command_that_is_shown_is_taken_by_the_command_line(machine, capsys):
    wrong = []
    for command in SHOWN:
        try:
            if command.mention:
                assert not command.words or command.words[0] in cli.commands, "there is no such command"
            else:
                parse(filled(command))
        except click.exceptions.Exit:  # --help
            pass
        except (click.ClickException, AssertionError) as e:
            wrong.append(f"{command.page}:{command.line}: {command}: {e}")
    assert len(SHOWN) > 60, "the commands were not found"
    assert not wrong, "\n".join(wrong)


def test_every_command_of_the_program_is_on_a_page():
    assert set(cli.commands) <= {c.words[0] for c in SHOWN if c.words}


def test_the_reasons_not_to_run_a_command_are_of_commands_that_are_shown():
    lines = [" ".join(c.words) for c in SHOWN if not c.mention]
    unused = [what for what in NOT_RUN if not any(re.fullmatch(what, line) for line in lines)]
    assert not unused


RUN = {str(c): c for c in SHOWN if not c.mention and not reason(c)}


@pytest.mark.parametrize("shown", RUN)
def test_a_quick_command_runs_as_it_is_shown(shown, machine):
    command = RUN[shown]
    prepare(filled(command))
    code, out, err = in_process(*filled(command), stdin=b"Some text." if command.piped else b"")
    assert code == 0, f"{command.page}:{command.line}: {err}"
    assert out or err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```bash\nA=1 tinychat run 'a b' | cat  # why\n```", [("run", "a b")]),
        ("```console\n$ echo x | tinychat list > FILE\ntinychat says nothing\n```", [("list",)]),
        ("say\n\n    tinychat run \\\n        --plain && tinychat list\n", [("run", "--plain"), ("list",)]),
        ("in `tinychat show\nMODEL [--json]` it", [("show", "MODEL", "--json")]),
        ("```python\ntinychat run\n```", []),
    ],
)
def test_commands_are_found_where_pages_have_them(text, words):
    assert [c.words for c in commands("page", text)] == words


def test_a_flag_that_does_not_exist_is_found(machine):
    with pytest.raises(click.ClickException):
        parse(["run", "--no-such-flag"])
    with pytest.raises(click.ClickException):
        parse(["show"])


OTHERS = {  # options that pages name and that are not tinychat's
    "--windows": "benchmarks/quality.py",
    "--forms": "benchmarks/quality.py",
    "--enable-auto-tool-choice": "vLLM",
    "--tool-call-parser": "vLLM, SGLang",
    "--max-model-len": "vLLM",
}


def test_options_that_sentences_name_are_there():
    options = {
        o for c in cli.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)
    } | set(OTHERS)
    named = {
        (page, span)
        for page, text in pages().items()
        for span in re.findall(r"(?<!`)`(--[a-z][\w-]*)[^`]*`", text)
    }
    assert len(named) > 50, "nothing was found"
    assert not [f"{page}: {option}" for page, option in sorted(named) if option not in options]
    assert set(OTHERS) <= {option for _, option in named}
