"""`tinychat run --schema`: one answer that is held to a JSON schema; the exit code says if it was cut."""

from __future__ import annotations

import json

from cli_helpers import GREEDY, tinychat

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def test_a_schema_from_a_file_or_as_text_holds_the_answer(folder, here):
    (here / "schema.json").write_text(json.dumps(SCHEMA))
    args = ("run", folder, "--temp", "1", "--seed", "1", "--max-tokens", "100")
    outs = [
        tinychat(*args, "hello", "--schema", "schema.json"),
        tinychat(*args, "--schema", json.dumps(SCHEMA), stdin="hello\n"),
    ]
    for out in outs:
        assert out.returncode == 0, out.stderr
        assert json.loads(out.stdout)["ok"] in (True, False)
    assert outs[0].stdout == outs[1].stdout


def test_an_answer_that_was_cut_is_said_and_has_an_exit_code_of_its_own(folder, here):
    cut = tinychat("run", folder, "hello", "--max-tokens", "4", "--temp", "0", "--schema", json.dumps(SCHEMA))
    assert cut.returncode == 5
    assert cut.stdout.startswith("{")
    assert "cut before it was complete" in cut.stderr


def test_a_schema_that_is_wrong_is_refused_with_its_place_and_a_conversation_takes_none(folder, here):
    wrong = tinychat("run", folder, "hello", *GREEDY, "--schema", '{"items": {"type": "foo"}}')
    assert wrong.returncode == 2
    assert "#/items: Invalid type: foo" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 2
    missing = tinychat("run", folder, "hello", *GREEDY, "--schema", "no-such.json")
    assert missing.returncode == 2
    assert "no-such.json" in missing.stderr
