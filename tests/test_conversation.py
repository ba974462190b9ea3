"""The message tree: saying, editing, answering again, switching; its form on disk; damaged messages."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tinychat.chats import database, records
from tinychat.conversation import Message, Tree

FILE = {"name": "a.txt", "text": "alpha"}


def talk():
    """A question with two answers, one of which was gone on with; and an edited question beside the first."""
    tree = Tree()
    question = tree.append(Message("user", "one"))
    first = tree.append(Message("assistant", "1", question))
    tree.append(Message("user", "two", first))
    tree.append(Message("assistant", "2", question))
    tree.append(Message("user", "uno"))
    return tree


def test_branches_lead_to_their_newest_leaf():
    tree = talk()
    assert [m.content for m in tree.messages()] == ["uno"]
    assert tree.siblings(0) == tree.siblings(4) == [0, 4]
    tree.switch(0)
    assert [m.content for m in tree.messages()] == ["one", "2"]
    assert tree.branches() == [(0, [0, 4]), (3, [1, 3])]
    tree.switch(1)
    assert [m.content for m in tree.messages()] == ["one", "1", "two"]
    assert (tree.last("user"), tree.last("assistant")) == (2, 1)
    assert tree.path(3) == [0, 3]


def test_a_path_alone_is_a_tree_without_branches():
    tree = talk()
    tree.switch(1)
    alone = Tree.of_path(tree.messages())
    assert [(m.content, m.parent) for m in alone.nodes] == [("one", None), ("1", 0), ("two", 1)]
    assert alone.leaf == 2
    assert Tree.of_path([]).leaf is None
    assert tree.nodes[2].parent == 1


def test_what_is_saved_is_what_earlier_versions_read():
    tree = Tree([Message("user", "one", model="demo", created=5.0), Message("assistant", "1", 0)], 1)
    saved = json.loads(json.dumps(tree.as_dict("demo", None, {})))
    assert list(saved) == ["tinychat_session", "model", "system", "params", "leaf", "nodes"]
    old = ["role", "content", "parent", "prompt_text", "prompt_ids", "ids", "finish_reason", "stats"]
    assert [list(node) for node in saved["nodes"]] == [old, old]
    tree.nodes[0].attachments = [FILE]
    assert list(tree.nodes[0].as_dict()) == [*old, "attachments"]


def test_a_saved_tree_comes_back():
    tree = talk()
    tree.nodes[1].ids, tree.nodes[1].stats = [1, 2], {"decode_tps": 1.5}
    tree.nodes[0].attachments = [FILE]
    saved = Tree.from_dict(json.loads(json.dumps(tree.as_dict("demo", "Be brief.", {"top_k": 3}))))
    assert (saved.tree.nodes, saved.tree.leaf) == (tree.nodes, tree.leaf)
    assert (saved.model, saved.system, saved.params) == ("demo", "Be brief.", {"top_k": 3})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no Message"),
        ({"role": "user"}, "content is missing"),
        ({"role": "wizard", "content": ""}, "role"),
        ({"role": "user", "content": "", "ids": [1.5]}, "ids: not every item is int"),
        ({"role": "user", "content": "", "ids": [True]}, "ids: not every item is int"),
        ({"role": "user", "content": "", "parent": True}, "parent: True is no int"),
        ({"role": "user", "content": "", "stats": []}, "stats: .* is no object"),
        ({"role": "user", "content": "", "attachments": [{"name": "x"}]}, "attachments"),
        ({"role": "user", "content": "", "later": 1}, "unknown field later"),
    ],
)
def test_what_is_no_message_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Message.from_dict(given)


def test_a_newer_sides_fields_are_left_out_where_that_is_asked_for():
    given = {"role": "user", "content": "hi", "later": [1]}
    assert Message.from_dict(given, strangers=True) == Message("user", "hi")


def test_a_damaged_message_keeps_what_makes_sense():
    m = Message.mended(
        {
            "role": "?",
            "content": "said",
            "ids": [1, -2],
            "prompt_ids": "no",
            "model": "demo",
            "finish_reason": "because",
            "stats": {"a": 1, "b": "c", "d": float("nan"), "e": True},
            "created": 1e300,
            "attachments": [{"name": 1}],
        }
    )
    assert m == Message(
        "assistant", "said", finish_reason="error", stats={"a": 1}, model="demo", ids=[], prompt_ids=[]
    )
    assert Message.mended({}) == Message("user", "")


def test_ids_mean_nothing_to_another_model():
    m = Message("assistant", "hi", 0, "<a>", [1], [2], "stop", model="demo", created=3.0)
    assert m.for_model("demo") == Message("assistant", "hi", 0, "<a>", [1], [2], "stop")
    assert m.for_model("other") == Message("assistant", "hi", 0, finish_reason="stop")
    assert m.ids == [2]


def test_a_title_is_one_short_line_of_what_was_asked():
    assert Message("user", "a\n  b").title() == "a b"
    assert len(Message("user", "word " * 100).title()) <= 60
    assert Message("user", " ", attachments=[FILE, FILE]).title() == "a.txt, a.txt"


def test_every_field_of_a_message_is_in_the_store_or_its_tree():
    fields = {*Message.__dataclass_fields__} - {"parent"}
    assert fields == {*records.FIELDS}
    columns = " ".join(s for statements in database.MIGRATIONS for s in statements)
    assert all(f" {name} " in columns for name in records.FIELDS)


def test_a_new_field_is_one_line():
    """It goes to files and over the protocol, and an earlier version's files are read."""

    @dataclass
    class Newer(Message):
        pinned: bool = False

    m = Newer.from_dict({"role": "user", "content": "x", "pinned": True})
    assert m.as_dict()["pinned"] is True
    assert not Newer.from_dict(Message("user", "x").as_dict()).pinned
    with pytest.raises(ValueError, match="pinned"):
        Newer.from_dict({"role": "user", "content": "x", "pinned": 1})
