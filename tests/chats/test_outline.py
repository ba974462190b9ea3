"""The branches of a chat as a list."""

from __future__ import annotations

import pytest
from branchy import answer, question, small, wide_and_deep

from tinychat.base.errors import UsageError
from tinychat.chats.outline import RAILS, here, numbered, outline
from tinychat.conversation import Tree


def test_each_branch_says_where_it_begins_its_first_words_its_model_and_rate():
    found = [(b.number, b.start, b.end, b.depth, b.words, b.model, b.rate) for b in outline(small())]
    assert found == [
        (1, 0, 2, 0, "How do I reverse a list?", "demo", 21.5),
        (2, 3, 3, 1, "The same slice", "qwen3-4b", 12.25),
        (3, 4, 4, 1, "逆順にするにはスライスを使います。", "demo", 0.0),
        (4, 5, 6, 0, "How do I sort a list?", "demo", 20.0),
    ]
    assert [b.on_path for b in outline(small())] == [True, True, False, False]
    assert here(outline(small())).number == 2
    assert outline(Tree()) == []


def test_every_message_is_in_one_branch_however_deep_and_wide():
    tree = wide_and_deep(300)
    branches = outline(tree)
    assert sum(b.messages for b in branches) == len(tree.nodes)
    assert max(b.depth for b in branches) == 301
    assert max(len(b.rails) for b in branches) == RAILS
    # A branch ends where several begin, or where nothing follows.
    parents = [m.parent for m in tree.nodes]
    assert all(parents.count(b.end) != 1 for b in branches)


def test_a_long_chain_takes_no_recursion():
    nodes = [question("a")]
    for i in range(20_000):
        nodes.append((answer, question)[i % 2](str(i), i))
    assert [b.messages for b in outline(Tree(nodes, 20_000))] == [20_001]


@pytest.mark.parametrize("text", ["", "0", "5", "x", "-1", "9" * 30, "²"])
def test_a_number_that_is_no_branch_is_refused(text):
    with pytest.raises(UsageError, match="There is no branch"):
        numbered(small(), text)


def test_a_number_means_the_branch_of_the_list():
    assert numbered(small(), "4").start == 5
    with pytest.raises(UsageError, match="no branches yet"):
        numbered(Tree(), "1")
