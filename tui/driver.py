"""The terminal: Textual's driver, with an input that no bytes can end and a size that can be painted."""

from __future__ import annotations

import os
import selectors
import time
from contextlib import suppress
from typing import Any

from textual import constants
from textual.drivers.linux_driver import LinuxDriver

from tinychat.tui.first_frame import usual_size
from tinychat.tui.keyboard import Keyboard, bounded
from tinychat.tui.text import clean

READ = 1 << 16
LOOK = 0.1  # seconds between two looks at whether to end
REST = constants.ESCAPE_DELAY  # without a byte, after which a sequence that has begun is a key of its own
PASTE_REST = 3.0  # without a byte, after which a paste has ended
LONGEST_TITLE = 80
MOST_WAITING = 5000  # events that the screen has not got to; then the terminal has to wait


class TerminalDriver(LinuxDriver):
    """Reads bytes, survives them all."""

    def __init__(self, app: Any, **options: Any):
        super().__init__(app, **options)
        self._size = self._size or self._get_terminal_size()
        self._title = ""

    def start_application_mode(self) -> None:
        """Take the terminal; it keeps the title that its window had."""
        super().start_application_mode()
        self.write("\x1b[22;2t")
        self.show_title(self._title)

    def stop_application_mode(self) -> None:
        """Give it back, and the title."""
        self.write("\x1b[23;2t")
        super().stop_application_mode()

    def show_title(self, title: str) -> None:
        """What the terminal's window or tab is called: one line without control characters."""
        self._title = " ".join(clean(title).split())[:LONGEST_TITLE]
        if self._title:
            self.write(f"\x1b]2;{self._title}\x07")

    def _get_terminal_size(self) -> tuple[int, int]:
        """Size as the terminal says; some have none (0 × 0), and some claim more than anybody can see."""
        try:
            width, height = os.get_terminal_size(self._file.fileno())  # type: ignore[union-attr]
        except (OSError, ValueError, AttributeError):
            width = height = 0
        if width <= 0 or height <= 0:
            width, height = usual_size()
        return bounded(width, height)

    def _run_input_thread(self) -> None:
        try:
            self.run_input_thread()
        except Exception as e:  # a bug: it ends the program as any other does
            self._app.call_later(self._app._handle_exception, e)

    def run_input_thread(self) -> None:
        """Events until the driver stops, or the terminal is gone."""
        keyboard = Keyboard()
        with selectors.DefaultSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            heard = time.monotonic()
            while not self.exit_event.is_set():
                if selector.select(REST if keyboard.waits else LOOK):
                    try:
                        data = os.read(self.fileno, READ)
                    except BlockingIOError:  # another program made the terminal so
                        continue
                    except OSError:
                        data = b""
                    if not data:
                        self._app.call_later(self._app.exit, None, 1)
                        return
                    heard, found = time.monotonic(), keyboard.feed(data)
                elif keyboard.pasting and time.monotonic() - heard > PASTE_REST:
                    found = keyboard.end_paste()
                elif not keyboard.pasting:
                    found = keyboard.rest()
                else:
                    continue
                for event in found:
                    self._wait_for_the_screen()
                    self.process_message(event)

    def _wait_for_the_screen(self) -> None:
        while self._waiting() > MOST_WAITING and not self.exit_event.is_set():
            time.sleep(0.01)

    def _waiting(self) -> int:
        waiting: int = self._app._message_queue.qsize()
        with suppress(Exception):  # there may be no screen yet, or no longer
            if self._app.focused is not None:
                waiting += self._app.focused._message_queue.qsize()
        return waiting
