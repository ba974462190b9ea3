"""docs/environment.md has every variable that the program reads, and no other."""

from __future__ import annotations

import re
from functools import cache

from documents import REPOSITORY, pages

SOURCES = ("tinychat", "tui", "models", "kernels_cpu", "kernels_cuda", "tests", "benchmarks")
OWN = re.compile(r"_?TINYCHAT_[A-Z_]+[A-Z]")


def read_by_python(source: str) -> set[str]:
    """Names of our own variables that a source has as values, and of all that it asks the environment for."""
    found = set(re.findall(rf"[\"']({OWN.pattern})[\"']", source))
    if not re.search(r"environ|getenv", source):
        return found
    asks = r"""(?:os\.environ\.get\(|os\.getenv\(|\benv\.get\(|os\.environ\[)\s*["'](\w+)["']"""
    return found | set(re.findall(asks, source))


@cache
def read_by(folders: tuple[str, ...]) -> dict[str, str]:
    """Names of variables, and a file that reads each."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted((REPOSITORY / folder).rglob("*")):
            if file.suffix == ".py":
                names = read_by_python(file.read_text(encoding="utf-8"))
            elif file.suffix in (".cpp", ".h", ".hpp", ".inl", ".cu"):
                names = set(re.findall(r'getenv\("(\w+)"\)', file.read_text(encoding="utf-8")))
            else:
                continue
            found |= {name: file.relative_to(REPOSITORY).as_posix() for name in names}
    return found


def documented() -> set[str]:
    rows = re.findall(r"^\| (`.*?) \|", pages()["docs/environment.md"], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)(?:=[^`]*)?`", row)}


def test_every_variable_of_ours_is_documented_and_no_other():
    read = {name: file for name, file in read_by(SOURCES).items() if OWN.fullmatch(name)}
    assert len(read) > 10, "nothing was found"
    missing = sorted(f"{name} ({file})" for name, file in read.items() if name not in documented())
    assert not missing, f"docs/environment.md lacks {', '.join(missing)}"
    gone = sorted(name for name in documented() if OWN.fullmatch(name) and name not in read)
    assert not gone, f"nothing reads {', '.join(gone)}"


def test_every_other_variable_that_the_program_asks_for_is_documented():
    read = read_by(("tinychat", "tui", "models", "kernels_cpu", "kernels_cuda"))
    assert "HF_TOKEN" in documented()
    missing = sorted(f"{n} ({f})" for n, f in read.items() if n not in documented())
    assert not missing, f"docs/environment.md lacks {', '.join(missing)}"


def test_what_config_shows_of_the_environment_is_documented():
    from tinychat.cli.preferred import VARIABLES

    assert set(VARIABLES) <= documented()


def test_a_variable_that_a_source_reads_is_found():
    own = f"{'TINYCHAT'}_NEW"
    source = f'NAME = "{own}"\n'
    source += '\nimport os\nos.environ["OTHER"]\nos.getenv("THIRD")\nos.environ.get(\n    "FOURTH", "")'
    assert read_by_python(source) == {own, "OTHER", "THIRD", "FOURTH"}
