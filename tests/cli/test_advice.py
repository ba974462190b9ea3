"""What an error says to do can be done, and helps."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
from cli_helpers import GREEDY, in_process
from tiny import tiny_folder

from tinychat.base import errors, locations
from tinychat.cli.main import cli

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def sources():
    """Every module of the program, wherever it is installed."""
    folders = {Path(p) for name in ("", ".models", ".tui", ".kernels_cpu", ".kernels_cuda")
               for p in importlib.util.find_spec(f"tinychat{name}").submodule_search_locations}  # fmt: skip
    return sorted({f for folder in folders for f in folder.rglob("*.py")})


def advice():
    """(file, text) of every second argument of an error of ours, with … for what is computed; and constants
    that stand there.
    """
    names = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)}
    names |= {"ChatLockedError"}
    for file in sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants = {
            t.id: node.value
            for node in tree.body if isinstance(node, ast.Assign)
            for t in node.targets if isinstance(t, ast.Name)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and len(node.args) == 2:
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if called in names:
                    todo = node.args[1]
                    for choice in (todo.body, todo.orelse) if isinstance(todo, ast.IfExp) else (todo,):
                        if isinstance(choice, ast.Name):
                            choice = constants.get(choice.id, choice)
                        if text := _text(choice):
                            yield file, text


def _text(node) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(v) or "…" for v in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


ADVICE = sorted(set(advice()))
PROSE = {
    "reads",
    "saved",
    "knows",
    "is",
    "and",
    "again",
    "with",
    "can",
    "makes",
    "wrote",
    "uses",
}  # after "tinychat"


def test_there_is_advice_to_look_at():
    assert len(ADVICE) > 150


def test_every_flag_in_an_advice_exists():
    flags = {o for c in cli.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    flags |= {"--help", "--merge"}  # llama-gguf-split's
    for file, text in ADVICE:
        assert not set(FLAG.findall(text)) - flags, (file, text)


def test_every_command_in_an_advice_exists():
    from tinychat.tui.commands import COMMANDS

    plain = {c.name for c in COMMANDS if not c.screen}
    for file, text in ADVICE:
        for word in re.findall(r"\btinychat ([a-z]+)", text):
            assert word in cli.commands or word in PROSE, (file, text)
        known = plain if file.name.startswith("repl") else {c.name for c in COMMANDS}
        for word in re.findall(r"(?:^|[ (])/([a-z]+)\b(?!/)", text):
            assert word in known, (file, text)


def test_every_package_in_an_advice_is_one_of_ours():
    extras = {f"tinychat[{e}]" for e in metadata.metadata("tinychat").get_all("Provides-Extra")}
    wanted = {re.split(r"[^\w-]", r)[0].lower() for r in metadata.requires("tinychat")} | extras
    for file, text in ADVICE:
        for package in re.findall(r"pip install (?:-U )?'?([\w.\[\]-]*\w\]?)", text):
            assert package.lower() in wanted, (file, text)


# Followed


@pytest.fixture
def place(here, monkeypatch):
    """Models, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_folder(here / "m")
    (here / "t.txt").write_text("It was a dark and stormy night. " * 20)
    return here


def follow(args: list[str], todo: str) -> list[str]:
    """The command as the advice has it: a flag left out, a flag with another value, another command."""
    if command := re.search(r"tinychat [a-z]+ .*$", todo):
        return shlex.split(command[0])[1:]
    args = list(args)
    if found := re.search(r"[Ll]eave out (--.*?)\.?$", todo):
        for flag in FLAG.findall(found[1]):
            if flag in args:
                at = args.index(flag)
                takes_value = at + 1 < len(args) and not args[at + 1].startswith("--") and flag not in BARE
                del args[at : at + 1 + takes_value]
        return args
    flag, value = re.search(r"(--[a-z-]+) (?:\d+ to )?(\w+)", todo).groups()
    if flag in args:
        at = args.index(flag)
        return [*args[: at + 1], value, *args[at + 2 :]]
    return [*args, flag, value]


BARE = {"--think", "--no-think", "--no-store"}


@pytest.mark.parametrize(
    "args",
    [
        ["run", "m", "hi", "--ctx", "99999"],
        ["run", "m", "x" * 100, "--ctx", "40"],
        ["run", "m", "hi", "--kv-budget", "16"],
        ["run", "m", "hi", "--kv-budget", "1", "--kv-policy", "window"],
        ["run", "m", "hi", "-s", "Be " * 20, "--kv-budget", "48"],
        ["run", "m", "hi", "--kv-budget", "128", "--kv-policy", "none"],
        ["run", "m", "hi", "--think"],
        ["run", "m", "hi", "--no-think"],
        ["run", "m", "hi", "--device", "cuda"],
        ["run", "m", "hi", "--threads", "5000"],
        ["pull", "./m"],
    ],
    ids=lambda a: " ".join(a)[:40],
)
def test_an_advice_that_is_followed_helps(place, args):
    if "--device" in args and Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU: nothing is wrong")
    code, _, err = in_process(*args, *([] if args[0] == "pull" else GREEDY))
    assert code, args
    todo = err.splitlines()[1]
    if "--help" in todo:  # a value that is not one: the help has those that are
        assert in_process(*shlex.split(re.search(r"tinychat [a-z ]*--help", todo)[0])[1:])[0] == 0
        return
    again = follow(args, todo)
    assert again != args, todo
    prompt = ["hi"] if args[0] == "pull" else []
    code, _, err = in_process(*again, *prompt, *GREEDY)
    if code and "system prompt" in todo:  # it says that there is more to come
        code, _, err = in_process(*follow(again, err.splitlines()[1]), *GREEDY)
    assert code == 0, (todo, again, err)


def test_a_context_that_fits_is_named(place, monkeypatch):
    from tinychat.base import machine

    args = ["run", "m", "hi", "--ctx", "256"]
    free = [machine.HEADROOM + 60_000]
    monkeypatch.setattr(machine, "available_memory", lambda: free[0])
    code, _, err = in_process(*args, *GREEDY)
    assert code == 4
    code, _, err = in_process(*follow(args, err.splitlines()[1]), *GREEDY)
    assert (code, err) == (0, "") or "context" in err


def test_a_name_in_an_advice_can_be_typed(place, monkeypatch):
    """Spaces and quotes in an alias: the command is one that a shell reads as it is meant."""
    from tinychat.hub import store

    name = "it's my model"
    locations.home().mkdir(parents=True)
    (locations.home() / "aliases.json").write_text(json.dumps({name: "hf:a/b"}))
    pulled = []
    monkeypatch.setattr(store, "install", lambda n: pulled.append(n) or place / "m")
    _, _, err = in_process("show", name)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert in_process(*follow([], err.splitlines()[1]))[0] == 0
    assert pulled == [name]


def test_what_aliases_should_look_like_is_said_as_it_works(place):
    file = locations.home() / "aliases.json"
    file.parent.mkdir(parents=True)
    for wrong in ("[]", "{", '{"a": 3}', '{"a": "nonsense"}'):
        file.write_text(wrong)
        code, _, err = in_process("run", "nothing", "hi")
        assert code == 2
        todo = err.splitlines()[1]
        right = re.search(r"\{.*\}", todo)
        file.write_text(right[0] if right else json.dumps({"a": re.search(r"hf:\w+/\w+", todo)[0]}))
        assert in_process("run", "nothing", "hi")[0] == 3


def test_a_setting_that_is_to_be_unset_or_changed(place, monkeypatch):
    monkeypatch.setenv("TINYCHAT_ISA", "garbage")
    code, _, err = in_process("run", "m", "hi", *GREEDY)
    assert code
    for value in (None, *re.search(r"one of: (.*)\.", err)[1].split(", ")):
        monkeypatch.delenv("TINYCHAT_ISA", raising=False)
        if value is not None:
            monkeypatch.setenv("TINYCHAT_ISA", value)
        assert in_process("run", "m", "hi", *GREEDY)[0] == 0


def test_a_group_size_that_is_named_divides(place):
    from tiny import TinyCheckpoint

    from tinychat.base.errors import UsageError
    from tinychat.quantize.target import choose_group

    for wrong in (7, 48, 100, 128, 4096):
        with pytest.raises(UsageError) as e:
            choose_group(TinyCheckpoint().config, wrong)
        for size in re.findall(r"\d+", e.value.todo):
            assert choose_group(TinyCheckpoint().config, int(size)) == int(size)
