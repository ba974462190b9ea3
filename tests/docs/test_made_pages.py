"""What `python docs/make` writes is what stands in the documents."""

from __future__ import annotations

import re

import pytest
import transcripts
import which_model
from cli_helpers import in_process
from documents import REPOSITORY, blocks, pages

from tinychat.hub.aliases import ALIASES


def test_which_model_is_up_to_date():
    page = (REPOSITORY / which_model.PAGE).read_text(encoding="utf-8")
    assert page == which_model.page(), "python docs/make which-model writes it anew"
    assert all(f"| {name} |" in page for name in ALIASES)


def test_a_speed_on_that_page_is_bandwidth_over_bytes():
    """By hand: 0.75 · 51 GB/s over 4.92 GB is 7.8; over 0.11 · 18.6 GB on 90 GB/s it is 33."""
    rows = {r[0]: r for r in re.findall(r"^\| ([\w.-]+) \| (.*) \|$", which_model.page(), re.MULTILINE)}
    assert rows["llama-3.1-8b"][1].split(" | ")[2] == "7.8"
    assert rows["qwen3-30b-a3b"][1].split(" | ")[3] == "33"


def test_answers_of_tinychat_in_the_documents_are_made_by_the_script():
    """A console block in which something is answered has the mark by which it is made anew."""
    by_hand = []
    for page, text in pages().items():
        made = [block.rstrip("\n") for block in transcripts.blocks(text)]
        for line, language, lines in blocks(text):
            answers = [at for at in lines if not re.match(r"[\w.-]*\$ ", at)]
            if (
                language == "console"
                and "\n".join(lines) not in made
                and any("tinychat" in at for at in lines)
                and answers
            ):
                by_hand.append(f"{page}:{line}")
    assert not by_hand
    assert sum(len(transcripts.blocks(text)) for text in pages().values()) >= 3


def test_a_transcript_is_made_anew():
    text = (
        f"a\n\n{transcripts.MARK}\n```console\n$ echo x\nold\n$ pwd\n```\n\n```console\n$ echo y\nkept\n```\n"
    )
    made = transcripts.remade(text, lambda line: f"ran {line}\n")
    assert made == text.replace("old\n", "ran echo x\n").replace("$ pwd\n", "$ pwd\nran pwd\n")


@pytest.mark.long
def test_the_demo_answers_what_its_transcript_says(demo_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    first = transcripts.blocks(pages()["README.md"])[0].splitlines()
    assert first[0] == '$ tinychat run smollm2-135m "Name the capital of France." --temp 0'
    code, out, _ = in_process("run", demo_gguf, "Name the capital of France.", "--temp", "0")
    assert (code, out.splitlines()) == (0, first[1:2])
