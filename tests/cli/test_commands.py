"""The commands of the plain conversation are those of the screen."""

from __future__ import annotations

import re

import pytest
from tiny import tiny_folder

from tinychat.base.errors import TinychatError, UsageError
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.keeper import Keeper
from tinychat.cli.repl import Repl
from tinychat.cli.repl_commands import ReplCommands
from tinychat.loading import load
from tinychat.tui import completing
from tinychat.tui.commands import BY_NAME, COMMANDS
from tinychat.tui.screens.actions import ChatActions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny")) as loaded:
        yield loaded


@pytest.fixture
def repl(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    store = ChatStore()
    session = model.session(temperature=0, max_tokens=3)
    keeper = Keeper(store, session)
    yield Repl(session, keeper)
    keeper.close()
    store.close()


@pytest.fixture
def run(repl, capsys):
    """Run a line; what was said."""

    def run(line):
        name, _, rest = line[1:].partition(" ")
        repl.run_command(name, rest)
        return capsys.readouterr().err

    return run


def test_every_command_of_the_screen_works_or_says_why_it_does_not():
    """A new command is written for both, or says in `Command.screen` why it needs the screen."""
    for c in COMMANDS:
        assert hasattr(ChatActions, f"command_{c.name}"), f"/{c.name} is not on the screen"
        assert bool(c.screen) != hasattr(ReplCommands, f"command_{c.name}"), f"/{c.name}, line by line"
    here = {n.removeprefix("command_") for n in dir(ReplCommands) if n.startswith("command_")}
    assert here <= {c.name for c in COMMANDS}


def test_the_list_of_commands_is_that_table(run):
    shown = set(re.findall(r"^/(\w+)", run("/help"), re.M))
    assert shown == {c.name for c in COMMANDS if not c.screen}


def test_what_needs_the_screen_says_so_and_a_mistyped_command_what_it_may_mean(repl):
    for c in COMMANDS:
        if c.screen:
            with pytest.raises(UsageError, match=re.escape(f"/{c.name} is for the chat screen: ")):
                repl.run_command(c.name, "x")
    with pytest.raises(UsageError) as e:
        repl.run_command("tere", "")
    assert "/tree" in e.value.todo
    with pytest.raises(UsageError, match="/go needs N"):
        repl.run_command("go", "")
    assert all(repl.run_command(name, "") for name in ("exit", "bye", "quit") if BY_NAME[name])


def test_branches_line_by_line(repl, run):
    with pytest.raises(UsageError, match="still empty"):
        run("/tree")
    repl.answer(repl.session.send("the first question"))
    run("/regen")
    repl.answer(repl.session.send("more"))
    run("/help")
    shown = run("/tree").splitlines()
    assert shown[0].startswith("3 branches · tiny")
    assert re.match(r"1\s+▌ the first question", shown[1])
    assert "●" in shown[3]
    assert run("/go 1") == "You are there already.\n"
    assert ">>> the first question" in run("/go 2")
    assert [repl.session.nodes[i].role for i in repl.session.path()] == ["user", "assistant"]
    assert repl.keeper.store.tree(1)[1].leaf == 1
    run("/branch")
    assert repl.session.path()[1] == 2
    with pytest.raises(UsageError, match="There is no branch 9"):
        run("/go 9")
    with pytest.raises(UsageError, match="There is no branch 9"):
        run("/branch 9")


def test_chats_line_by_line(repl, run, tmp_path):
    repl.answer(repl.session.send("about foxes"))
    assert "“Foxes” now" in run("/rename Foxes")
    run("/system Be kind.")
    run("/new")
    repl.answer(repl.session.send("about rivers"))
    store = repl.keeper.store
    assert [c.title for c in store.chats()] == ["about rivers", "Foxes"]
    assert "    1  " in run("/resume foxes")
    assert "about foxes" in run("/resume 1")
    assert (repl.session.system, store.chat(1).id) == ("Be kind.", repl.keeper.held.chat.id)
    with pytest.raises(UsageError, match="This chat is open"):
        run("/resume 1")
    repl.answer(repl.session.send("and wolves"))
    assert len(store.messages(1)) == 4
    assert "/undo brings it back" in run("/delete")
    assert [c.title for c in store.chats()] == ["about rivers"]
    assert "“Foxes” is back." in run("/undo")
    assert len(repl.session.nodes) == 4
    run("/save chat.md")
    assert "and wolves" in (tmp_path / "chat.md").read_text()
    with pytest.raises(UsageError, match="exists"):
        run("/save chat.md")
    run("/save chat.json")
    assert "user: and wolves" in run("/load chat.json")
    assert run("/system -") == "No system prompt: the template's own holds.\n"
    with pytest.raises(TinychatError, match="There is no chat 99"):
        run("/resume 99")


def test_another_model_goes_on_with_the_same_chat(repl, run, tmp_path):
    other = load(tiny_folder(tmp_path / "other", seed=3))
    asked = []
    repl.load_model = lambda name: asked.append(name) or other
    run("/set temperature 0")
    repl.answer(repl.session.send("to the first"))
    assert "other answers from now on." in run("/model other")
    repl.answer(repl.session.send("to the second"))
    chat, tree, _ = repl.keeper.store.tree(1)
    names = [m.model and m.model.rpartition("/")[2] for m in tree.nodes]
    assert names == [None, "tiny", None, "other"]
    assert (asked, chat.model) == (["other"], tree.nodes[3].model)
    assert repl.session.params.temperature == 0
    assert "other. /model NAME" in run("/model")
    other.close()


def test_tab_completes_commands_models_files_prompts_and_chats(repl, tmp_path):
    (tmp_path / "home" / "prompts").mkdir(parents=True)
    (tmp_path / "home" / "prompts" / "review.md").write_text("Review {{input}}")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "my model.gguf").write_text("x")
    repl.answer(repl.session.send("about foxes"))

    def completed(line):
        return completing.lines(line, repl.keeper.store, repl.session.tree)

    assert completed("/reg") == ["/regen"]
    assert completed("/prompt re") == ["/prompt review"]
    assert completed("/save no") == ["/save notes.md"]
    assert completed("/resume ") == ["/resume 1"]
    assert completed("/go ") == ["/go 1"]
    assert completed("/set top") == ["/set top_k", "/set top_p"]
    assert "/model smollm2-135m" in completed("/model smol")
    assert completed("/model ./my") == ["/model ./my model.gguf"]
    assert completed("see @no") == ["see @notes.md"]
    assert completed("nothing") == []
    assert repl._completion("/reg", 0) == "/regen"
    assert repl._completion("/reg", 1) is None
