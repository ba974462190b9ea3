"""Colours: the themes, and what the style atoms of `text.py` look like in them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rich.style import Style
from textual.app import App
from textual.theme import Theme

DARK = Theme(
    name="tinychat-dark",
    primary="#6ea8fe",
    secondary="#8b949e",
    accent="#e0af68",
    foreground="#d6dae0",
    background="#15181d",
    surface="#1b1f26",
    panel="#222833",
    success="#7bc47f",
    warning="#e0af68",
    error="#ef6b73",
    dark=True,
)
LIGHT = Theme(
    name="tinychat-light",
    primary="#1b5fc1",
    secondary="#5b6570",
    accent="#9a5b00",
    foreground="#1d2229",
    background="#fbfbf9",
    surface="#f2f2ee",
    panel="#e7e8e4",
    success="#216e2b",
    warning="#8a5200",
    error="#b3202c",
    dark=False,
)
CONTRAST = Theme(
    name="tinychat-contrast",
    primary="#00ffff",
    secondary="#ffffff",
    accent="#ffff00",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#666666",
    success="#00ff00",
    warning="#ffff00",
    error="#ff6060",
    dark=True,
    text_alpha=1.0,
)
THEMES = (DARK, LIGHT, CONTRAST)
SHORT_NAMES = {"dark": DARK.name, "light": LIGHT.name, "contrast": CONTRAST.name}

_PALETTES = {
    "dark": {
        "faint": "#737c88",
        "url": "#737c88",
        "notice": "#e0af68",
        "bad": "#ef6b73",
        "user": "#eef1f5",
        "userbar": "#6ea8fe",
        "quote": "italic",
        "quotebar": "#59616d",
        "marker": "#6ea8fe",
        "heading": "bold #6ea8fe",
        "link": "underline #6ea8fe",
        "code": "#e6c384",
        "math": "#b4d4a8",
        "codeblock": "on #1f242d",
        "codehead": "#737c88",
        "thought": "italic #8b949e",
        "tok-comment": "italic #737c88",
        "tok-keyword": "#c792ea",
        "tok-string": "#9ece6a",
        "tok-number": "#ff9e64",
        "tok-function": "#7aa2f7",
        "tok-builtin": "#56b6c2",
    },
    "light": {
        "faint": "#6a727c",
        "url": "#6a727c",
        "notice": "#8a5200",
        "bad": "#b3202c",
        "user": "#10151b",
        "userbar": "#1b5fc1",
        "quote": "italic",
        "quotebar": "#9aa2ab",
        "marker": "#1b5fc1",
        "heading": "bold #1b5fc1",
        "link": "underline #1b5fc1",
        "code": "#8a3a00",
        "math": "#2c5a3b",
        "codeblock": "on #eeeee8",
        "codehead": "#6a727c",
        "thought": "italic #5b6570",
        "tok-comment": "italic #6a727c",
        "tok-keyword": "#7a2aa5",
        "tok-string": "#2c6a1b",
        "tok-number": "#a04a00",
        "tok-function": "#1b4fb0",
        "tok-builtin": "#00667a",
    },
    "contrast": {
        "faint": "#d0d0d0",
        "url": "#d0d0d0",
        "notice": "bold #ffff00",
        "bad": "bold #ff6060",
        "user": "bold #ffffff",
        "userbar": "bold #00ffff",
        "quote": "italic",
        "quotebar": "#ffffff",
        "marker": "bold #00ffff",
        "heading": "bold underline #00ffff",
        "link": "underline #00ffff",
        "code": "bold #ffff00",
        "math": "bold #80ff80",
        "codeblock": "on #202020",
        "codehead": "#ffffff",
        "thought": "italic #ffffff",
        "tok-comment": "italic #d0d0d0",
        "tok-keyword": "bold #ff80ff",
        "tok-string": "#80ff80",
        "tok-number": "#ffb060",
        "tok-function": "#80c0ff",
        "tok-builtin": "#00ffff",
    },
}
_COMMON = {
    "strong": "bold",
    "em": "italic",
    "s": "strike",
    "h1": "underline",
    "focused": "bold",
    "found": "bold reverse",
}


def palette_of(app: App[Any]) -> str:
    """Palette that goes with the app's theme, ours or one of Textual's. Asked for every paint."""
    if app.theme not in _palette_names:
        _palette_names[app.theme] = "dark" if app.current_theme.dark else "light"
    return _palette_names[app.theme]


_palette_names = {CONTRAST.name: "contrast"}


@lru_cache(4096)
def resolve(atoms: str, palette: str) -> Style:
    """The Rich style of a span."""
    colours = _PALETTES[palette]
    style = Style.null()
    for atom in atoms.split(" "):
        if atom.startswith("@"):
            style += Style.from_meta({"@click": atom[1:]})
        elif definition := colours.get(atom) or _COMMON.get(atom):
            style += Style.parse(definition)
    return style
