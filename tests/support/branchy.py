"""Conversations with branches, for the tests of what shows them."""

from __future__ import annotations

from tinychat.conversation import Message, Tree


def question(text, parent=None):
    return Message("user", text, parent)


def answer(text, parent, model="demo", rate=20.0):
    stats = {"decode_tps": rate, "generated_tokens": 3, "prompt_tokens": 5}
    return Message("assistant", text, parent, model=model, ids=[1], finish_reason="stop", stats=stats)


def small() -> Tree:
    """Two ways to begin; two answers to the second question of the first."""
    nodes = [
        question("How do I reverse a list?"),
        answer("**Use** the slice.", 0, rate=21.5),
        question("And a string?", 1),
        answer("<think>hm</think>\n\n# The same slice", 2, "qwen3-4b", 12.25),
        answer("逆順にするにはスライスを使います。", 2, rate=0.0),
        question("How do I sort a list?"),
        answer("With sorted.", 5),
    ]
    return Tree(nodes, 3)


def wide_and_deep(n=200) -> Tree:
    """One question with n answers, and n questions that were each asked in two ways, one within the other."""
    nodes = [question("The beginning"), answer("The first answer", 0)]
    nodes += [answer(f"Answer number {i} in other words", 0) for i in range(n)]
    at = 1
    for i in range(n):
        nodes += [question(f"Alternative {i}", at), question(f"Deeper question {i}", at)]
        nodes.append(answer(f"Deep {i}", len(nodes) - 1))
        at = len(nodes) - 1
    return Tree(nodes, at)


def held(store, tree, model="demo"):
    """A conversation of the screen with that tree, stored."""
    from tinychat.tui.conversation import Conversation

    conversation = Conversation(store, model)
    leaf = tree.leaf
    for m in tree.nodes:
        conversation.held.change(conversation.held.add(m))
    conversation.tree.leaf = leaf
    conversation.keep()
    return conversation
