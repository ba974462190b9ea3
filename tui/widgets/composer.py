"""Widget in which the user writes: several lines, history, completion of commands and file names, files
attached with @.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import OptionList
from textual.widgets.option_list import Option
from textual.widgets.text_area import Selection

from tinychat.base.errors import UsageError
from tinychat.conversation import Tree
from tinychat.tui import commands, completing
from tinychat.tui.attachments import Attachment, complete_path, mentions, missed, read
from tinychat.tui.host import Host
from tinychat.tui.messages import Attached, Submitted, Trouble
from tinychat.tui.text import clean
from tinychat.tui.vi import Vi
from tinychat.tui.vi_keys import ViArea
from tinychat.tui.widgets.chips import Chips
from tinychat.tui.widgets.queue import Queue

LONG_PASTE = 4000  # characters from which on a paste becomes an attachment
LONG_PASTE_LINES = 60
MOST_ASIDE = 20  # cleared drafts that are kept


class Input(ViArea):
    """The text itself."""

    app: Host
    BINDING_GROUP_TITLE = "The composer"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "send", priority=False, id="send"),
        Binding("ctrl+j,shift+enter,alt+enter", "newline", "new line", id="newline"),
        Binding("up", "up", "earlier message, at the first line", show=False, id="earlier"),
        Binding("down", "down", "later message, at the last line", show=False, id="later"),
        Binding("tab", "complete", "complete a command or a file name", show=False, id="complete"),
        Binding("ctrl+l", "clear", "clear the draft (↑ brings it back)", id="clear"),
        Binding("ctrl+g", "screen.editor", "write in $EDITOR", id="editor"),
    ]

    def __init__(self, composer: Composer):
        super().__init__(
            id="input", soft_wrap=True, tab_behavior="focus", show_line_numbers=False, compact=True
        )
        self.composer = composer
        self.cursor_blink = False  # a blinking cursor repaints twice a second for ever
        self.highlight_cursor_line = False

    async def _on_key(self, event: events.Key) -> None:
        does = self.app.keys.name_of(self.BINDING_GROUP_TITLE, event.key)
        if self.vi_key(event) or does in ("send", "newline"):  # enter would be written
            event.prevent_default()
            event.stop()
            if does == "send":
                self.action_submit()
            elif does == "newline":
                self.action_newline()
            return
        if event.key == "backspace" and not self.text and self.composer.drop_paste():
            event.prevent_default()
            event.stop()
            return
        await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        text = event.text.replace("\r\n", "\n").replace("\r", "\n")
        event.prevent_default()
        event.stop()
        if len(text) > LONG_PASTE or text.count("\n") > LONG_PASTE_LINES:
            self.composer.paste(text)
            return
        if result := self._replace_via_keyboard(clean(text), *self.selection):
            self.move_cursor(result.end_location)

    def on_mount(self) -> None:
        """Take vi's keys, if they are wanted."""
        self.vi = Vi() if self.app.preferences.vi else None

    def busy(self) -> bool:
        return bool(self.composer.completing)

    def beyond(self, step: int) -> None:
        self.composer.recall(-step)

    def action_clear(self) -> None:
        """An empty line; what was there is the latest earlier message."""
        self.composer.set_aside()

    def action_submit(self) -> None:
        """Send, or take the highlighted completion."""
        if not self.composer.take_completion(on_enter=True):
            self.composer.submit()

    def action_newline(self) -> None:
        """A new line at the cursor."""
        self.replace("\n", *self.selection)

    def action_complete(self) -> None:
        """Take the completion; without one, leave the composer."""
        if not self.composer.take_completion():
            self.screen.focus_next()

    def action_up(self) -> None:
        """Up: in the completions, in the text, in the history."""
        if not self.composer.move_completion(-1):
            if self.cursor_at_first_line:
                self.composer.recall(1)
            else:
                self.action_cursor_up()

    def action_down(self) -> None:
        """Down: in the completions, in the text, in the history."""
        if not self.composer.move_completion(1):
            if self.cursor_at_last_line:
                self.composer.recall(-1)
            else:
                self.action_cursor_down()


class Composer(Vertical):
    """Input, the list of completions above it, and what is attached."""

    app: Host

    def __init__(self, history: Callable[[], list[str]], tree: Callable[[], Tree] = Tree):
        """history: what was said, newest first. tree: that of the open chat."""
        super().__init__(id="composer")
        self._conversation = tree
        self.history = history
        self._recalled: list[str] | None = None
        self._at = 0
        self._draft = ""
        self._aside: list[tuple[str, list[Attachment]]] = []  # drafts that were cleared, the latest first
        self._pastes: list[Attachment] = []
        self._files: dict[str, Attachment] = {}
        self._kind = ""
        self._refused: str | None = None  # the text that was not sent for a file
        self._offered_for: str | None = None  # the text that the completions are of

    def compose(self):
        """The completions are mounted when first needed."""
        yield Queue()
        yield Chips()
        yield Input(self)

    def on_mount(self) -> None:
        """Nothing is attached yet."""
        self.chips.display = False

    @property
    def input(self) -> Input:
        """The text area."""
        return self.query_one(Input)

    @property
    def chips(self) -> Chips:
        """Files that are attached."""
        return self.query_one(Chips)

    @property
    def queue(self) -> Queue:
        """Messages that wait for the end of the running answer."""
        return self.query_one(Queue)

    @property
    def text(self) -> str:
        """Text that is typed."""
        return self.input.text

    @text.setter
    def text(self, value: str) -> None:
        self._offered_for = None
        self.input.text = clean(value)  # a text area writes what it has to the terminal as it is
        self.input.move_cursor(self.input.document.end)

    @property
    def attachments(self) -> list[Attachment]:
        """Everything that will be sent along."""
        return [*self._files.values(), *self._pastes]

    def submit(self) -> None:
        """Hand over what is typed and attached. The text stays until the screen accepts it (`clear`).

        With a file that cannot be sent nothing is, the first time.
        """
        self._files = {written: a for written, a in self._files.items() if not a.problem}
        self.look_for_files(written=True)
        text = self.text.strip("\n")
        wrong = next((a for a in self.attachments if a.problem), None)
        if wrong is not None and self._refused != text:
            self._refused = text
            what = f"{clean(wrong.name)} cannot be sent: {clean(wrong.problem)}."
            self.post_message(Trouble(UsageError(what, "Correct the name; enter again sends it as text.")))
            return
        good = [a for a in self.attachments if not a.problem]
        if text.strip() or good:
            self.post_message(Submitted(text, [a.stored() for a in good]))

    def clear(self) -> None:
        """Empty, ready for the next message."""
        self.text = ""
        self._pastes, self._files, self._recalled, self._refused = [], {}, None, None
        self.chips.show([])
        self.input.set_insert(True)

    def set_aside(self) -> None:
        """Clear the draft; ↑ brings it back."""
        if self.text.strip() or self._pastes:
            self._aside.insert(0, (self.text, self._pastes))
            del self._aside[MOST_ASIDE:]
        self.clear()
        self.close_completion()

    def restore(self, text: str, attachments: Sequence[dict[str, str]]) -> None:
        """A message as it was sent, its files among it: those that the text names go with their names, the
        others like pastes.
        """
        kept = [Attachment.of(a) for a in attachments]
        files: dict[str, Attachment] = {}
        for written, path in mentions(clean(text)):
            same = next((a for a in kept if a.name == path.name), None)
            if same is not None:
                kept.remove(same)
                files[written] = same
        self._files, self._pastes = files, kept
        self.text = text
        self._attached()

    def take_back(self) -> None:
        """Have what waits in the composer again, before what is typed, as one message."""
        waiting = [self.queue.take(0) for _ in list(self.queue.words)]
        if waiting:
            texts = [t for w in waiting if (t := w.text.strip("\n"))]
            files = [a for w in waiting for a in w.attachments]
            files += [a.stored() for a in self.attachments if not a.problem]
            self.restore("\n\n".join([*texts, *([self.text] if self.text else [])]), files)

    # Attachments

    def paste(self, text: str) -> None:
        """A long paste is sent along instead of typed: the composer stays quick and readable."""
        self._pastes.append(Attachment(f"paste {len(self._pastes) + 1}", text))
        self._attached()

    def drop_paste(self) -> bool:
        """Remove the last paste; False if there is none."""
        if not self._pastes:
            return False
        self._pastes.pop()
        self._attached()
        return True

    def look_for_files(self, written: bool = False) -> None:
        """Read the files that the text names, once each. written: also the name that one is at the end of."""
        found: dict[str, Path] = {}
        if "@" in self.text:
            at = None if written else self.input.cursor_place()
            named = [*mentions(self.text), *missed(self.text, at)]
            found = dict(sorted(named, key=lambda item: self.text.find(item[0])))
        if found.keys() != self._files.keys():
            self._files = {written: self._files.get(written) or read(path) for written, path in found.items()}
            self._attached()

    def _attached(self) -> None:
        self.chips.show(self.attachments)
        self.post_message(Attached())

    # Completion

    def on_text_area_changed(self) -> None:
        """Look at what is typed: for files, and for what completes it."""
        self.look_for_files()
        self._complete()
        if self._recalled is not None and self._at and self.text != self._shown():
            self._forget_recalled()  # it is a new message now

    def _complete(self) -> None:
        """Offer what goes with the text. Keys may be ahead of the message that tells of a change: who takes a
        completion looks first.
        """
        text = self.text
        if text == self._offered_for:
            return
        self._offered_for = text
        options: list[Option] = []
        if found := commands.complete(text):
            self._kind = "command"
            options = [Option(f"/{c.name} {c.argument}".ljust(30) + c.help, c.name) for c in found]
            if len(found) == 1 and text[1:] == found[0].name:
                options = []
        elif (typed := completing.begun_argument(text)) is not None:
            self._kind = "argument"
            offers = completing.arguments(*typed, self.app.store, self._conversation())
            options = [Option(clean(shown), value) for value, shown in offers]
        elif (fragment := self._fragment()) is not None:
            self._kind = "file"
            options = [Option(clean(name), name) for name in complete_path(fragment)]
            if len(options) == 1 and options[0].id == fragment:
                options = []
        self._offer(options)

    def _fragment(self) -> str | None:
        row, column = self.input.cursor_location
        word = self.input.document.get_line(row)[:column].rpartition(" ")[2]
        return word[1:] if word.startswith("@") else None

    def _offer(self, options: list[Option]) -> None:
        lists = self.query(OptionList)
        if not options:
            for each in lists:
                each.display = False
            return
        if lists:
            each = lists.first()
        else:
            each = OptionList(id="completions", markup=False)
            each.can_focus = False
            self.mount(each, before=0)
        each.clear_options()
        each.add_options(options)
        each.highlighted = 0
        each.display = True

    @property
    def completing(self) -> bool:
        """Whether completions are offered."""
        return self._open_list is not None

    @property
    def _open_list(self) -> OptionList | None:
        return next((each for each in self.query(OptionList) if each.display and each.option_count), None)

    def close_completion(self) -> bool:
        """Hide the completions; False if none were shown."""
        if (each := self._open_list) is None:
            return False
        each.display = False
        return True

    def move_completion(self, step: int) -> bool:
        """Another completion; False if none are shown."""
        self._complete()
        if (each := self._open_list) is None:
            return False
        each.highlighted = ((each.highlighted or 0) + step) % each.option_count
        return True

    def take_completion(self, on_enter: bool = False) -> bool:
        """Put the highlighted completion into the text; False if none are shown (or enter should send)."""
        self._complete()
        each = self._open_list
        if each is None or each.highlighted is None:
            return False
        chosen = each.get_option_at_index(each.highlighted).id or ""
        each.display = False
        if self._kind == "command":
            command = commands.BY_NAME[chosen]
            if on_enter and not command.needs_argument:
                self.text = f"/{chosen}"
                return False
            self.text = f"/{chosen} "
            return True
        if self._kind == "argument":
            name, begun = completing.begun_argument(self.text) or ("", "")
            if on_enter and name != "prompt":  # what is typed may be meant as it is
                return False
            self.text = self.text[: len(self.text) - len(begun)] + chosen
            if name in ("prompt", "set"):
                self.text += " "
            return True
        fragment = self._fragment() or ""
        row, column = self.input.cursor_location
        end = "" if chosen.endswith("/") else " "
        self.input.replace(chosen + end, (row, column - len(fragment)), (row, column))
        return True

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A click on a completion."""
        event.stop()
        event.option_list.highlighted = event.option_index
        self.take_completion()
        self.input.focus()

    # History

    def recall(self, step: int) -> None:
        """An earlier (1) or later (-1) message; one that waits is taken back first."""
        if step > 0 and self.queue.words and not self.text and not self.attachments:
            words = self.queue.take(-1)
            self.restore(words.text, words.attachments)
            return
        if self._recalled is None:
            if step < 0:
                return
            earlier = [text for text, _ in self._aside] + self.history()
            self._recalled, self._at, self._draft = earlier, 0, self.text
        at = self._at + step
        if 0 <= at <= len(self._recalled):
            self._at = at
            self.text = self._shown()
            if 0 < at <= len(self._aside) and (pastes := self._aside[at - 1][1]):
                self._pastes = list(pastes)
                self._attached()
            if self.input.vi is not None and not self.input.vi.insert:
                self.input.move_cursor((0, 0))
            elif at:
                # Selected, so that what is typed takes its place: only a key that moves makes it a draft.
                self.input.selection = Selection(self.input.document.end, (0, 0))
            self.close_completion()
        if self._at == 0:
            self._recalled = None

    def _shown(self) -> str:
        """The text that goes with the place in the history."""
        return clean(self._recalled[self._at - 1]) if self._recalled and self._at else self._draft

    def _forget_recalled(self) -> None:
        if self._draft.strip():
            self._aside.insert(0, (self._draft, []))
        self._recalled, self._at = None, 0
