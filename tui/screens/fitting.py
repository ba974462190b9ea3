"""What the choices of a model say of each: one line in a list, and all that is known of it in two."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from tinychat.base.machine import human_rate
from tinychat.tui.text import clean, pad, plain, shorten
from tinychat.tui.widgets.turn import human_size

NAME = 18  # cells of a model's name
RATE = 12  # and of its speed


def padded(text: str, width: int) -> str:
    """A name in a column."""
    return plain(pad([(shorten(clean(text), width), "")], width, ""))


def row(m: dict[str, Any], width: int, mark: str, here: bool) -> Content:
    """A model in a list of that width: name, size, speed or that it does not fit, and what it is good for."""
    fits = not m["why_not"] or m["name"] == mark
    size = human_size(m["size"]) if m["size"] else "?"
    rate = f"{human_rate(m['rate'])} tok/s" if fits else "does not fit"
    left = f"{'●' if m['name'] == mark else ' '} {padded(m['name'], NAME)}{size:>8}  "
    room = width - 2 - NAME - 8 - 2 - RATE - 1
    good = m["good_for"] or m.get("quantization", "")
    return Content.assemble(
        left if here else (left, "dim"),
        (f"{rate:<{RATE}}", "" if here and fits else "dim"),
        (f" {shorten(clean(good), room)}" if room >= 12 else "", "dim"),
    )


def facts(m: dict[str, Any]) -> str:
    """Everything but the name and what it is for, in a line of 48 cells for all but the largest."""
    if not m["size"]:
        return "its size is not known"
    size = human_size(m["size"])
    parts = [size, f"memory {human_size(m['memory'])}", f"{human_rate(m['rate'])} tok/s"]
    return ", ".join([*parts, *filter(None, [clean(m.get("license", ""))])])


def begun(m: dict[str, Any]) -> str:
    """How much of its download is here."""
    return f"{m['held'] * 100 // m['size']} % is here" if m.get("held") and m["size"] else ""


def verdict(m: dict[str, Any]) -> str:
    """What it is good for, and whether it fits."""
    good = clean(m["good_for"] or m.get("quantization", ""))
    if m["good_for"]:
        good = f"{good[:1].upper()}{good[1:]}" if m["demo"] else f"Good for {good}"
    fits = f"Does not fit: needs {m['why_not']}" if m["why_not"] else "Fits" if m["size"] else ""
    return "".join(f"{said}. " for said in (good, fits, begun(m)) if said).rstrip()


def machine(found: dict[str, Any]) -> str:
    """What the machine has, in a line."""
    speed = f", {found['bandwidth']:.0f} GB/s" if found.get("bandwidth") else ""
    return f"memory: {human_size(found['memory'])} free{speed} · disk: {human_size(found['disk'])} free"
