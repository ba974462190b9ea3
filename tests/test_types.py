"""What a type checker tells those who embed tinychat: keywords have the names and types that are checked when
they are given, and the documents' examples are right, in types and when they run.
"""

from __future__ import annotations

import inspect
import re
import shutil
import site
import subprocess
import sys
import typing
import venv
from pathlib import Path

import pytest
from tiny import tiny_model

import tinychat
from tinychat import keywords
from tinychat.base.load_options import LoadOptions
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Biases, Choice, Texts
from tinychat.model import Model
from tinychat.session import Session

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/tools.md", "docs/structured.md")
FOLDERS = {"tinychat": "", "models": "models", "tui": "tui", "kernels_cpu": "kernels_cpu"}


def types_of(keywords_type):
    """Name and type of each keyword, those of its bases too."""
    return typing.get_type_hints(keywords_type)


def named(function):
    """The parameters that a function takes by keyword and names, with the types that it names."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in found if p.kind is p.KEYWORD_ONLY}


def test_sampling_keywords_are_the_sampling_parameters():
    found, fields = types_of(keywords.SamplingKeywords), typing.get_type_hints(SamplingParams)
    assert list(found) == list(SamplingParams.SETTINGS)
    for name, setting in SamplingParams.SETTINGS.items():
        if not isinstance(setting, (Biases, Texts)):
            assert found[name] == fields[name] | None, name
    # These two take more than they keep, and what they keep.
    for name, values in {
        "stop": ["a", ("a",), ["a", "b"]],
        "logit_bias": [{7: -1.5}, ((7, -1.5),), [(7, 1)]],
    }.items():
        for value in values:
            assert SamplingParams().but(**{name: value}) != SamplingParams()
            assert any(isinstance(value, typing.get_origin(t) or t) for t in typing.get_args(found[name]))


def test_load_keywords_are_the_load_options():
    found, fields = types_of(keywords.LoadKeywords), typing.get_type_hints(LoadOptions)
    assert list(found) == list(LoadOptions.SETTINGS)
    for name, setting in LoadOptions.SETTINGS.items():
        if isinstance(setting, Choice):
            none = {type(None)} if setting.default is None else set()
            literal, *rest = typing.get_args(found[name]) if none else [found[name]]
            assert set(rest) == none, name
            assert set(typing.get_args(literal)) == {*setting.choices, *setting.unlisted}, name
        else:
            assert found[name] == fields[name], name


def test_chat_and_prompt_keywords_are_what_requests_take():
    source = inspect.getsource(keywords)
    asked, prompt = named(Model.request), named(Model.continuing)
    assert set(types_of(keywords.ChatKeywords)) == {*asked, *SamplingParams.SETTINGS}
    assert set(types_of(keywords.PromptKeywords)) == {*prompt, *SamplingParams.SETTINGS}
    assert prompt.items() <= asked.items()
    for name, annotation in asked.items():
        assert f"    {name}: {annotation}\n" in source, name


def test_session_keywords_are_what_a_session_takes():
    found = inspect.signature(Session).parameters.values()
    taken = {p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD} - {"model", "system"}
    assert set(types_of(keywords.SessionKeywords)) == {*taken, *SamplingParams.SETTINGS}
    # A session's budget and its policy are those of loading.
    load, session = types_of(keywords.LoadKeywords), types_of(keywords.SessionKeywords)
    assert all(session[k] == load[k] for k in ("kv_budget", "kv_policy", "draft"))


def test_every_keyword_is_understood_where_its_type_says_so():
    """With None wherever that is a type of it: nothing then changes."""
    with tiny_model(ctx=256) as model:
        for of, function in (
            (keywords.ChatKeywords, lambda **options: model.request("hi", **options)),
            (keywords.PromptKeywords, lambda **options: model.continuing("hi", **options)),
            (keywords.SessionKeywords, model.session),
        ):
            nothing = {k: None for k, t in types_of(of).items() if type(None) in typing.get_args(t)}
            assert len(nothing) >= len(SamplingParams.SETTINGS)
            assert function(**nothing).params == model.default_sampling


# The examples


def example(document):
    """The Python of a document, its blocks one behind the other."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_examples_run(document, monkeypatch, tmp_path, capsys):
    """With a tiny model in place of the one that they name, which calls no tool by chance."""
    model = tiny_model(ctx=2048)
    model.default_sampling = model.default_sampling.but(max_tokens=24, seed=1)
    monkeypatch.setattr(tinychat, "load", lambda name: model)
    monkeypatch.setattr(Session, "send_results", lambda self, results: self.send(results[0]))
    monkeypatch.chdir(tmp_path)
    with model:
        exec(compile(example(document), document, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The interpreter of an environment that has the sources installed as a wheel has them."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    no_bytes = shutil.ignore_patterns("__pycache__")
    for source, package in FOLDERS.items():
        shutil.copytree(REPOSITORY / source, target / "tinychat" / package, ignore=no_bytes)
    others = [p for p in sys.path if "-packages" in p] or site.getsitepackages()
    (target / "others.pth").write_text("\n".join(others))
    return folder / "bin" / "python"


def mypy(python, folder):
    return [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, *folder.glob("*.py")]


def pyright(python, folder):
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return [sys.executable, "-m", "pyright", "--pythonpath", python, "-p", folder]


@pytest.fixture(scope="module", params=[mypy, pyright], ids=["mypy", "pyright"])
def lines_with_errors(request, installed, tmp_path_factory):
    """What a checker says of programs, given by name: the names and numbers of the lines that it finds fault
    with, and its words. Skips where the checker is missing or cannot start.
    """
    name = request.param.__name__
    pytest.importorskip(name, reason=f"needs {name}: pip install {name}")
    if subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True).returncode:
        pytest.skip(f"needs {name}, which is installed and does not start; pyright needs node")

    def check(programs):
        folder = tmp_path_factory.mktemp("programs")
        for file, source in programs.items():
            (folder / file).write_text(source)
        command = [str(part) for part in request.param(installed, folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        found = re.findall(r"(\w+\.py):(\d+)(?::\d+)?(?: -|:) error", done.stdout)
        assert (done.returncode == 0) == (not found), done.stdout + done.stderr
        return {(file, int(line)) for file, line in found}, done.stdout

    return check


@pytest.mark.long
def test_the_examples_have_no_type_errors(lines_with_errors):
    programs = {re.sub(r"\W", "_", d) + ".py": example(d) for d in DOCUMENTS}
    assert all("tinychat" in source for source in programs.values())
    found, words = lines_with_errors(programs)
    assert not found, words


@pytest.mark.long
def test_mistakes_are_found(lines_with_errors):
    wrong = [
        'model.chat("hi", temprature=0)',
        'model.chat("hi", temperature="hot")',
        'model.chat("hi", stream=True).text',
        'model.session(kv_policy="best")',
        'chat.send("hi", top_k=0.5)',
        'tinychat.load("x", kv_bits=5)',
        "tinychat.lod",
        'for event in chat.send("hi"): print(event.stats)',
    ]
    right = ["import tinychat", 'model = tinychat.load("x")', "chat = model.session()"]
    found, words = lines_with_errors({"program.py": "\n".join([*right, *wrong])})
    assert found == {("program.py", len(right) + 1 + i) for i in range(len(wrong))}, words
