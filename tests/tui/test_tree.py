"""The tree of the chat: what it shows, and that enter goes there."""

from __future__ import annotations

import pytest
from branchy import held, small, wide_and_deep
from scripted import Script, screen_text, wait_until
from textual.widgets import Input
from tui_helpers import answered, make_app, say

from tinychat.chats.outline import outline
from tinychat.tui.branches import headline, rows
from tinychat.tui.text import line_width, plain

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("width", [20, 40, 49, 70, 120])
async def test_lines_fit_and_are_in_columns_however_deep(width):
    for tree in (small(), wide_and_deep()):
        branches = outline(tree)
        lines = rows(branches, width)
        assert len(lines) == len(branches)
        assert all(line_width(line) <= width for line in lines)
    if width >= 49:
        ends = [plain(line) for line in lines if plain(line).endswith("tok/s")]
        assert len(ends) >= 400
        assert {len(line) for line in ends} == {width}


async def test_the_model_is_said_once_where_it_is_the_same():
    several, one = outline(small()), outline(wide_and_deep(3))
    assert headline(one) == f"{len(one)} branches · demo"
    assert "demo" not in "".join(map(plain, rows(one, 80)))
    assert headline(several) == "4 branches"
    assert plain(rows(several, 80)[1]).endswith("qwen3-4b · 12.2 tok/s")


async def test_enter_goes_to_a_branch_with_its_first_message_in_view(store):
    app = make_app(store, conversation=held(store, small()))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "The tree of this chat · 4 branches" in screen_text(app))
        await wait_until(pilot, lambda: "2 ● └" in screen_text(app) or "2 ● ├" in screen_text(app))
        await pilot.press("down", "down", "down", "enter")  # the list ends there
        await wait_until(pilot, lambda: "With sorted." in screen_text(app))
        assert app.chat.conversation.tree.leaf == 6
        assert app.focused.node == 5
        await say(pilot, "/go 3")
        await wait_until(pilot, lambda: "逆順" in screen_text(app))
        await say(pilot, "/go 77")
        await wait_until(pilot, lambda: "There is no branch 77" in screen_text(app))
    assert store.tree(1)[1].leaf == 4  # it is where the chat opens the next time


async def test_two_hundred_branches_are_found_by_word_and_number(store):
    tree = wide_and_deep()
    app = make_app(store, conversation=held(store, tree))
    async with app.run_test(size=(60, 20)) as pilot:
        await say(pilot, "/tree")
        await wait_until(pilot, lambda: "602 branches" in screen_text(app) and "●" in screen_text(app))
        assert "esc closes" in screen_text(app)
        app.screen.query_one(Input).value = "question 150"
        await wait_until(pilot, lambda: "Deeper question 150" in screen_text(app))
        assert "Alternative" not in screen_text(app)
        await pilot.press("enter")
        at = next(i for i, m in enumerate(tree.nodes) if m.content == "Deeper question 150")
        await wait_until(pilot, lambda: getattr(app.focused, "node", None) == at)
        await wait_until(pilot, lambda: "▌ Deeper question 150" in screen_text(app))
        assert app.chat.conversation.tree.leaf == len(tree.nodes) - 1  # it was on the present branch
        await pilot.press("f3")
        await wait_until(pilot, lambda: "602 branches" in screen_text(app))
        await pilot.press(*"7", "enter")
        await wait_until(pilot, lambda: app.chat.conversation.tree.leaf != len(tree.nodes) - 1)


async def test_a_branch_is_not_left_while_its_answer_is_made(store):
    app = make_app(store, Script("one two", hang=True), conversation=held(store, small()))
    async with app.run_test(size=(80, 24)) as pilot:
        await say(pilot, "more")
        await wait_until(pilot, lambda: "one two" in screen_text(app))
        await say(pilot, "/go 4")
        await wait_until(pilot, lambda: "Still answering" in screen_text(app))
        await pilot.press("escape")
        await answered(pilot, 3)


async def test_an_empty_chat_has_no_tree(store):
    app = make_app(store)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("f3")
        await wait_until(pilot, lambda: "This chat is still empty" in screen_text(app))
