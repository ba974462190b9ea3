"""Values of options."""

from __future__ import annotations

import click
import pytest


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


def test_help_explains_every_option_of_every_command():
    from tinychat.cli.main import cli

    silent = [
        f"{name} {option.opts[0]}"
        for name, command in cli.commands.items()
        for option in command.params
        if option.param_type_name == "option" and not (option.help or "").strip()
    ]
    assert not silent
    assert all(command.help for command in cli.commands.values())


def test_the_shell_completes_models_files_drafts_chats_and_prompts(tmp_path, monkeypatch):
    from branchy import held, small
    from click.shell_completion import ShellComplete

    from tinychat.chats.chat_store import ChatStore
    from tinychat.cli.main import cli

    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    store = ChatStore()
    held(store, small()).close()
    store.close()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "review.md").write_text("Review {{input}}")

    def completed(*words):
        shell = ShellComplete(cli, {}, "tinychat", "_TINYCHAT_COMPLETE")
        return [(c.value, c.type, c.help) for c in shell.get_completions(list(words[:-1]), words[-1])]

    assert ("smollm2-135m", "plain", None) in completed("run", "smol")
    assert completed("run", "./mo") == [("./mo", "file", None)]
    assert completed("run", "smollm2-135m", "Sa") == []
    assert ("ngram", "plain", None) in completed("run", "--draft", "")
    assert ("smollm2-135m", "plain", None) in completed("run", "--draft", "smol")
    assert completed("run", "--resume", "") == [("1", "plain", "How do I reverse a list?")]
    assert completed("run", "-p", "re") == [("review", "plain", None)]
    assert completed("chats", "ex") == [("export", "plain", None)]
    assert completed("chats", "export", "") == [("1", "plain", "How do I reverse a list?")]
