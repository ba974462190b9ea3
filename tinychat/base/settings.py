"""Settings: fields of a dataclass that say what they may hold, and how people are told.

A setting is one line of `SamplingParams` or `LoadOptions`. From that line follow its option on the command
line, `/set`, its field on the screen, what is believed of a stored chat, and the check of what programs give.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, Field, dataclass, field
from typing import Any, ClassVar, TypeVar

from tinychat.base import arguments
from tinychat.base.errors import UsageError

S = TypeVar("S", bound="Settings")
WIDTH = 110
MOST_TEXTS, LONGEST_TEXTS = 256, 1 << 16  # each is looked for in every piece of an answer
MOST_BIASES = 1024


@dataclass(frozen=True, eq=False, repr=False)  # neither is used, and they cost start-up time
class Setting:
    """A setting of any kind: its default, and the words about it. None is a value only as the default.

    help     a sentence for the command line
    hint     what an empty field on the screen says
    about    a sentence for programs, where `help` does not say enough
    flag     its name on the command line, where that is not its own
    metavar  how the command line names the value
    group    the settings that commands take together
    unit     what is counted: "tokens", "bytes"
    """

    default: Any
    _: KW_ONLY
    help: str = ""
    hint: str = ""
    about: str = ""
    flag: str = ""
    metavar: str | None = None
    group: str = ""
    unit: str = ""

    def check(self, name: str, value: Any) -> Any:
        """The value as it is kept. Raises UsageError, which says `name`."""
        raise NotImplementedError

    def range(self) -> str:
        """The values that it may have, in words."""
        raise NotImplementedError

    def sentence(self) -> str:
        """`help`, or else `hint` as a sentence."""
        return self.help or (f"{self.hint[0].upper()}{self.hint[1:]}." if self.hint else "")


@dataclass(frozen=True, eq=False, repr=False)
class Number(Setting):
    """A number from `low` to `high`, both among them."""

    low: float = 0
    high: float | None = None
    kind: ClassVar[type] = float

    def check(self, name: str, value: Any) -> Any:
        """Check as `arguments.number` does."""
        return arguments.number(name, value, self.low, float("inf") if self.high is None else self.high)

    def parse(self, name: str, text: str) -> Any:
        """The value that somebody typed. Raises UsageError."""
        try:
            value = self.kind(text)
        except ValueError:
            raise UsageError(f"{text} is not a number.", f"Use /set {name} NUMBER.") from None
        return self.check(name, value)

    def range(self) -> str:
        """Range in words: "0 to 1", "1 or more tokens"."""
        words = f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"
        return f"{words} {self.unit}".rstrip()


class Whole(Number):
    """A whole number from `low` to `high`, both among them."""

    kind: ClassVar[type] = int

    def check(self, name: str, value: Any) -> int:
        """Check as `arguments.integer` does."""
        return arguments.integer(name, value, int(self.low), None if self.high is None else int(self.high))


@dataclass(frozen=True, eq=False, repr=False)
class Choice(Setting):
    """One of some texts, or one of some whole numbers. `unlisted` ones are for experiments."""

    choices: tuple[str, ...] | tuple[int, ...] = ()
    unlisted: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """Check as `arguments.choice` does; whole numbers of any kind."""
        *first, last = map(str, sorted(self.choices) if self.numbers else self.choices)
        todo = f"Use {', '.join(first)} or {last}."
        if not self.numbers:
            arguments.choice(name, value, (*self.choices, *self.unlisted), todo)
            return value
        if (number := arguments.integer(name, value)) not in self.choices:
            raise UsageError(f"{name} is {number}.", todo)
        return number

    @property
    def numbers(self) -> bool:
        """Whether it is one of some whole numbers."""
        return isinstance(self.choices[0], int)

    def range(self) -> str:
        """Choices in words: '"auto" | "cpu"'."""
        return " | ".join(str(c) if self.numbers else f'"{c}"' for c in self.choices)


class Gigabytes(Setting):
    """A number of GB, or "auto"."""

    MOST: ClassVar[float] = 1e6

    def check(self, name: str, value: Any) -> Any:
        """A number above 0, or that word."""
        if isinstance(value, str) and value == "auto":
            return value
        todo = 'Give GB, such as 8 or 7.5, or "auto".'
        try:
            number = arguments.number(name, value, 0, self.MOST)
        except UsageError as e:
            raise UsageError(e.what, todo) from None
        if not number:
            raise UsageError(f"{name} is {number}.", todo)
        return number

    def range(self) -> str:
        """Both."""
        return '"auto" | GB'


class Flag(Setting):
    """Yes or no; with the default None, the command line has an option for no, too."""

    def check(self, name: str, value: Any) -> bool:
        """Check as `arguments.flag` does."""
        return arguments.flag(name, value)

    def range(self) -> str:
        """Both of them."""
        return "True | False"


class Text(Setting):
    """A text of at least one character."""

    def check(self, name: str, value: Any) -> str:
        """Check as `arguments.text` does."""
        return arguments.text(name, value)

    def range(self) -> str:
        """The metavar, which says it better."""
        return self.metavar or "a text"


class Texts(Setting):
    """Some texts, each of at least one character."""

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        """Check as `arguments.texts` does."""
        found = arguments.texts(name, value)
        if len(found) > MOST_TEXTS or sum(map(len, found)) > LONGEST_TEXTS:
            raise UsageError(
                f"{name} has {len(found):,} texts of {sum(map(len, found)):,} characters.",
                f"Give {MOST_TEXTS} of {LONGEST_TEXTS:,} characters together, at most.",
            )
        return found

    def range(self) -> str:
        """So many of them."""
        return f"texts, {MOST_TEXTS} at most"


class Biases(Setting):
    """What is added to the logits of single tokens: pairs of an id and a number from -100 to 100, by id."""

    def check(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        """Check a mapping (of ids, or of their digits as JSON has them), or pairs, or texts "ID=NUMBER"."""
        pairs = list(value.items()) if isinstance(value, Mapping) else arguments.items(name, value, "pairs")
        if len(pairs) > MOST_BIASES:
            raise UsageError(f"{name} has {len(pairs):,} tokens.", f"Give {MOST_BIASES:,} at most.")
        return tuple(sorted(dict(self._pair(name, pair) for pair in pairs).items()))

    @staticmethod
    def _pair(name: str, pair: Any) -> tuple[int, float]:
        try:
            id, bias = pair.split("=") if isinstance(pair, str) else pair
            bias = float(bias) if isinstance(pair, str) else bias
            id = int(id) if isinstance(id, str) and id.isdecimal() and len(id) < 10 else id
        except (TypeError, ValueError):
            raise UsageError(
                f"{name} has {arguments.shown(pair)}.", "Give a token id and a number for each."
            ) from None
        return arguments.integer(f"A token id of {name}", id, 0, (1 << 31) - 1), arguments.number(
            f"A number of {name}", bias, -100, 100
        )

    def range(self) -> str:
        """So many of them."""
        return f"token ids with numbers, {MOST_BIASES} at most"


def setting(s: Setting) -> Any:
    """The field of a settings class that holds such a value."""
    return field(default=s.default, metadata={"setting": s})


class Settings:
    """The base of frozen dataclasses whose fields are settings: checked when one is made, by keyword."""

    SETTINGS: ClassVar[Mapping[str, Setting]] = {}
    WHAT: ClassVar[str] = "setting"  # one of them, in errors

    def __init_subclass__(cls) -> None:
        found = {name: f.metadata["setting"] for name, f in vars(cls).items() if isinstance(f, Field)}
        cls.SETTINGS = found
        if cls.__doc__:  # python -OO has none
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{cls.table()}"

    def __post_init__(self) -> None:
        for name, s in self.SETTINGS.items():
            value = getattr(self, name)
            if value is not None or s.default is not None:  # None is right only where it is the default
                object.__setattr__(self, name, s.check(name, value))

    @classmethod
    def made(cls: type[S], values: Mapping[str, Any]) -> S:
        """The settings with these values. Raises UsageError for unknown names and wrong values."""
        unknown = [name for name in values if name not in cls.SETTINGS]
        if unknown:
            raise UsageError(
                f"Unknown {cls.WHAT} {', '.join(sorted(map(str, unknown)))}.",
                f"Known: {', '.join(cls.SETTINGS)}.",
            )
        return cls(**values)

    def but(self: S, **changes: Any) -> S:
        """A copy with the given settings changed. Raises as `made`; None values are left out."""
        return self.made({**vars(self), **{k: v for k, v in changes.items() if v is not None}})

    @classmethod
    def sound(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some stored values that can be meant."""
        out = {}
        for name, value in values.items():
            with suppress(UsageError):
                if name in cls.SETTINGS and value is not None:
                    cls.SETTINGS[name].check(name, value)
                    out[name] = value
        return out

    @classmethod
    def group(cls, *names: str) -> tuple[str, ...]:
        """The settings of some groups."""
        return tuple(name for name, s in cls.SETTINGS.items() if s.group in names)

    @classmethod
    def numbers(cls) -> dict[str, Number]:
        """The settings that are typed as one number: by `/set`, on the screen."""
        return {name: s for name, s in cls.SETTINGS.items() if isinstance(s, Number)}

    @classmethod
    def parse(cls, name: str, text: str) -> float | int | None:
        """The number that somebody typed; None for "-", "default" or nothing: the model's own.

        Raises UsageError.
        """
        known = cls.numbers()
        if name not in known:
            raise UsageError(f"{name} is not a {cls.WHAT}.", f"Known: {', '.join(known)}.")
        return None if text in ("", "-", "default") else known[name].parse(name, text)

    @classmethod
    def table(cls) -> str:
        """Name, values, default and meaning of each, for docstrings."""
        lines = []
        for name, s in cls.SETTINGS.items():
            words = f"{s.range()}. {s.about or s.sentence()}"
            if s.default not in (None, ()):
                words += f" Default: {s.default}."
            lines += textwrap.wrap(f"{name:<15} {words}", WIDTH, subsequent_indent=" " * 16)
        return "\n".join(lines)
