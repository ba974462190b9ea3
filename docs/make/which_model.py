"""docs/which-model.md, from what the program knows of its models (`tinychat/hub/aliases.py`, `fits.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.base.machine import human_bytes
from tinychat.hub.aliases import ALIASES
from tinychat.hub.fits import COMFORTABLE, USABLE, Fit, Machine, fit_of, offer

PAGE = "docs/which-model.md"
MOST_SAID = 200  # tokens a second; beyond, other things than the memory bound a small model
READ_SHARE = 0.75  # of a memory's published bandwidth that a plain read of all cores reaches, about


@dataclass(frozen=True)
class Class:
    """A kind of machine. published: GB/s of its memory on paper. free: bytes that a model may take."""

    name: str
    memory: str
    published: float
    free: float

    @property
    def machine(self) -> Machine:
        return Machine(int(self.free), 1 << 50, self.published * READ_SHARE)


CLASSES = (
    Class("Raspberry Pi 5, 8 GB", "LPDDR4X-4267, 32 bits", 17, 6.5e9),
    Class("small laptop, 8 GB", "DDR4-2666, one channel", 21, 5e9),
    Class("laptop, 16 GB", "DDR4-3200, two channels", 51, 12e9),
    Class("laptop or desktop, 32 GB", "DDR5-5600, two channels", 90, 27e9),
    Class("server, 64 GB and more", "DDR5-4800, eight channels", 307, 58e9),
)


def page() -> str:
    """The whole page."""
    fits = {name: fit_of(name, alias.size, CLASSES[-1].machine, here=True) for name, alias in ALIASES.items()}
    order = sorted(fits.values(), key=lambda f: f.size)
    return f"""# Which model on which machine

This page is made from what the program knows of its models by `python docs/make which-model`; a test
holds that it is up to date. What counts is your machine, and the program measures it: `tinychat list
--available` shows this table for it, and `tinychat doctor` what was measured. `tinychat run` on a
machine without a model offers three that fit.

## Where to begin

| machine | memory | first choice | smaller and quicker |
|---|---|---|---|
{_rows(_first(c) for c in CLASSES)}

These are the program's own choices (`offer` in `tinychat/hub/fits.py`): the largest model that comes in
minutes, leaves other programs their memory, and writes {COMFORTABLE:.0f} tokens a second or more, which
is as fast as most people read; then ones that are a good deal smaller. "slow" is said where nothing
reaches that.

## What each takes and is good for

| model | good for | download | memory | licence | drafted for by |
|---|---|---|---|---|---|
{_rows(_facts(f) for f in order)}

Memory is the weights with a context, tables and what is computed at the time; a long context takes more
(`--ctx`, `--kv-bits 8` halves it). A model that drafts (`--draft auto`) comes on top. Licences of their
own (Gemma's, Llama's) are shown when a model is pulled. "Good for" is what their makers and users say.
Only {", ".join(n for n, a in ALIASES.items() if a.verified)} has been run with tinychat so far; the
others are known by their families and formats, which are tested on small models of the same kind.

## How fast, about

Tokens a second, by the memory alone: each token reads all weights once, or those of its experts.

| model | {" | ".join(f"{c.name}" for c in CLASSES)} |
|---|{"---|" * len(CLASSES)}
{_rows([f.name, *(_rate(f.name, c) for c in CLASSES)] for f in order)}

"–": it does not fit. In brackets: below {USABLE:.0f} tokens a second, where reading along is no
pleasure. The memory of these machines, on paper:

| machine | memory | on paper | read, as assumed | free for a model, as assumed |
|---|---|---|---|---|
{_rows(_memory(c) for c in CLASSES)}

An estimate, not a measurement: {READ_SHARE:.0%} of the paper's bandwidth divided by the bytes of a
token. Decoding reaches nine tenths of what can be read where the cores keep up
([performance.md](performance.md)); on the slowest ones they may not, and a second program on the same
memory takes its share. Reading a long prompt is bound by the cores, not by the memory: `tinychat bench
MODEL` measures both on yours. Drafts ([speculation.md](speculation.md)) make some texts faster than this
table.
"""


def _rows(rows) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _first(c: Class) -> list[str]:
    """A machine, and what is offered on it first."""
    fits = [fit_of(name, alias.size, c.machine, here=True) for name, alias in ALIASES.items()]
    named = [_with_rate(f) for f in offer(fits, c.machine) if not f.demo]
    return [c.name, c.memory, f"**{named[0]}**", ", ".join(named[1:])]


def _with_rate(f: Fit) -> str:
    assert f.rate is not None
    slow = "" if f.rate >= COMFORTABLE else ", slow"
    return f"{f.name} (≈ {_number(f.rate)} tok/s{slow})"


def _facts(f: Fit) -> list[str]:
    alias = ALIASES[f.name]
    facts = [f.name, f.good_for, human_bytes(f.size), human_bytes(f.memory), f.license]
    return [*facts, alias.draft or ""]


def _rate(name: str, c: Class) -> str:
    fit = fit_of(name, ALIASES[name].size, c.machine, here=True)
    if fit.why_not or fit.rate is None:
        return "–"
    if fit.rate > MOST_SAID:
        return f"> {MOST_SAID}"
    return _number(fit.rate) if fit.rate >= USABLE else f"({_number(fit.rate)})"


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _memory(c: Class) -> list[str]:
    read = f"{c.published * READ_SHARE:.0f} GB/s"
    return [c.name, c.memory, f"{c.published:.0f} GB/s", read, human_bytes(c.free)]
