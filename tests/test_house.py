"""The rules of the house: who may import whom, no circles, and how long a file or a function may be.

The package `tinychat` has its sources in several folders (`tinychat.tui` lives in `tui/`), so the sources are
read. Every import counts: inside a function too, and those for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = {
    "tinychat": "tinychat",
    "models": "tinychat.models",
    "tui": "tinychat.tui",
    "kernels_cpu": "tinychat.kernels_cpu",
    "kernels_cuda": "tinychat.kernels_cuda",
}
# From the ground up; a module imports its own floor and those below. Names that stand together are one floor.
FLOORS = [
    ("kernels_cpu", "kernels_cuda"),
    ("base",),
    ("text",),
    ("network",),
    ("models",),
    ("formats",),
    ("backends",),
    ("hub",),
    ("quantize",),
    ("engine",),
    ("conversation", "keywords"),
    ("answer", "losses"),
    ("dialogue",),
    ("async_dialogue",),
    ("chat_request", "embedding", "session"),
    ("model",),
    ("tool_loop",),
    ("fitting",),
    ("loading",),
    ("synthetic",),
    ("bench", "bench_threads", "perplexity", "gpu_check"),
    ("chats",),
    ("process",),
    ("serve",),
    ("mcp",),
    ("tui",),
    ("cli",),
    ("__main__",),
]
LONGEST_FILE, LONGEST_FUNCTION = 450, 60  # lines
FACE = "tinychat"  # the package itself: it names what is public and imports it when it is asked for


def modules() -> dict[str, Path]:
    """The file of every module, by the name under which it is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in (REPOSITORY / folder).rglob("*.py"):
            parts = file.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return found


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is imported anywhere in a source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def edges(files: dict[str, Path]) -> Iterator[tuple[str, int, str]]:
    """(module, line, module that it imports) of the whole package."""
    for module, file in files.items():
        for line, name in imports(file.read_text(encoding="utf-8")):
            target = name if name in files else name.rpartition(".")[0]
            if target in files and target != module:
                yield module, line, target


def floor_of(module: str) -> int:
    """The number of a module's floor; raises KeyError for one that nobody gave a place."""
    room = module.split(".")[1]
    return {name: i for i, names in enumerate(FLOORS) for name in names}[room]


@pytest.fixture(scope="module")
def graph() -> list[tuple[str, int, str]]:
    files = modules()
    assert len(files) > 150, "the sources were not found"
    return list(edges(files))


def test_no_module_imports_itself_by_way_of_others(graph):
    needs: dict[str, set[str]] = {}
    for module, _, target in graph:
        if module != FACE:
            needs.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as e:
        pytest.fail("a circle: " + " → ".join(reversed(e.args[1])))


def test_nobody_imports_from_a_floor_above(graph):
    wrong = [
        f"{module}:{line} imports {target}"
        for module, line, target in graph
        if FACE not in (module, target) and floor_of(target) > floor_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_circle_and_a_climb_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from tinychat.base import b\n")
    (tmp_path / "b.py").write_text("from tinychat.cli.a import f\n")
    files = {"tinychat.cli.a": tmp_path / "a.py", "tinychat.base.b": tmp_path / "b.py"}
    found = list(edges(files))
    assert found == [("tinychat.cli.a", 2, "tinychat.base.b"), ("tinychat.base.b", 1, "tinychat.cli.a")]
    assert floor_of("tinychat.cli.a") > floor_of("tinychat.base.b")


def test_a_long_file_says_why():
    wrong = [
        f"{file.relative_to(REPOSITORY)} has {n} lines"
        for file in modules().values()
        if (n := len((text := file.read_text(encoding="utf-8")).splitlines())) > LONGEST_FILE
        and "# One file because " not in text
    ]
    assert not wrong, "\n".join([*wrong, "Split it, or say why: # One file because …"])


def test_a_function_can_be_seen_at_once():
    wrong = [
        f"{file.relative_to(REPOSITORY)}:{node.lineno} {node.name} has {n} lines"
        for file in modules().values()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (n := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not wrong, "\n".join(wrong)


def test_names_that_programs_know_stay_where_they_were():
    from tinychat.model import Model
    from tinychat.session import Message, Session
    from tinychat.text.tokenizer import char_of_byte

    bare = Session.__new__(Session)
    bare.nodes = [Message("user", "a")]
    assert [m.content for m in bare.nodes] == ["a"]
    assert (bare.tools, bare.leaf) == ([], None)
    assert len(char_of_byte()) == 256
    assert callable(Model.needs_bos)
