"""The user's own settings: `config.toml`, which nobody but its owner writes (and `/default` in the screen).

    model = "qwen3-4b"               what `tinychat run` and `serve` take where no model is named
    system = "Be brief."             the system prompt of new conversations
    theme = "dark"
    vi = true                        vi's keys in the chat screen

    [keys]                           keys of the chat screen by name (F1 lists the names)
    send = "ctrl+s"
    newline = ["enter", "ctrl+j"]

    [sampling]                       fields of SamplingParams
    temperature = 0.5

    [load]                           fields of LoadOptions
    ctx = 16384

    [models."qwen3-4b"]              the same for one model, by the name that it is asked for with
    sampling.temperature = 0.6
    load.kv_bits = 8

What the command line says holds in place of what the file says, and what it says of a model in place of
what it says of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinychat.base import arguments, locations
from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.files import read_text, write_atomically
from tinychat.base.load_options import LoadOptions
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Settings

KINDS: dict[str, type[Settings]] = {"sampling": SamplingParams, "load": LoadOptions}
ALONE = ("model", "system", "theme", "vi")  # settings outside of a section
THEMES = ("dark", "light", "contrast")


@dataclass(frozen=True)
class Section:
    """What the file says of all models, or of one. `sampling` and `load` are checked values by field."""

    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)

    def over(self, other: Section) -> Section:
        """This in place of the other, setting by setting."""
        return Section(
            other.system if self.system is None else self.system,
            {**other.sampling, **self.sampling},
            {**other.load, **self.load},
        )


@dataclass(frozen=True)
class Preferences:
    """The whole file; empty where there is none."""

    path: Path
    model: str | None = None
    theme: str | None = None
    general: Section = Section()
    models: Mapping[str, Section] = field(default_factory=dict)
    vi: bool = False
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # as they stand there

    def of(self, model: str) -> Section:
        """What holds for that model."""
        return self.models.get(model, Section()).over(self.general)

    @classmethod
    def read(cls, path: Path | None = None) -> Preferences:
        """The file at that path (default: the user's). Raises UsageError, which names the line."""
        path = path or locations.config_file()
        try:
            text = text_of(path)
        except FileNotFoundError:
            return cls(path)
        except (OSError, TinychatError, ValueError) as e:
            said = getattr(e, "strerror", None) or getattr(e, "what", None) or "it is not UTF-8"
            raise UsageError(f"{path} cannot be read: {said}.", "Mend it, or remove it.") from e
        return Reader(path, text).read()

    def wrong_key(self, name: str, what: str) -> UsageError:
        """The error for a name in [keys], with the line where it stands."""
        try:
            text = text_of(self.path)
        except (OSError, TinychatError, ValueError):  # gone since it was read
            text = ""
        return Reader(self.path, text)._wrong_at(("keys", name), what)

    def with_chat(self, model: str, system: str | None, sampling: Mapping[str, Any]) -> str:
        """The file's text with these as the defaults of new conversations; comments and order stay."""
        import tomlkit

        try:
            document = tomlkit.parse(text_of(self.path))
        except FileNotFoundError:
            document = tomlkit.document()
        document["model"] = model
        if system is None:
            document.pop("system", None)
        else:
            document["system"] = system
        section = document.setdefault("sampling", tomlkit.table())
        for name in [n for n in section if n not in sampling]:
            del section[name]
        for name, value in sampling.items():
            section[name] = list(value) if isinstance(value, tuple) else value
        if not section:
            del document["sampling"]
        return tomlkit.dumps(document)

    def keep_chat(self, model: str, system: str | None, sampling: Mapping[str, Any]) -> None:
        """Write that. Raises UsageError where the file is damaged, OSError."""
        self.read(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, self.with_chat(model, system, sampling).encode())


def text_of(path: Path) -> str:
    """The file's text, without the mark that some editors set at its beginning."""
    return read_text(path).removeprefix("\ufeff")


class Reader:
    """Checks every word: what is misspelled must not be passed over in silence."""

    def __init__(self, path: Path, text: str):
        self.path, self.lines = path, text.splitlines()
        self.text = text

    def read(self) -> Preferences:
        """config.toml. Raises UsageError, which names the line."""
        found = self._parsed()
        self._known(found, (), (*ALONE, *KINDS, "models", "keys"))
        models = found.get("models", {})
        if not isinstance(models, dict):
            raise self._wrong_at(("models",), 'models is not a section: write [models."NAME"]')
        sections = {}
        for name, given in models.items():
            if not isinstance(given, dict):
                raise self._wrong_at(("models", name), f'it is not a section: write [models."{name}"]')
            self._known(given, ("models", name), ("system", *KINDS))
            sections[name] = self._section(given, ("models", name))
        model, theme = (self._text(found, (), name) for name in ("model", "theme"))
        if theme not in (None, *THEMES):
            raise self._wrong_at(("theme",), f"theme is {arguments.shown(theme)}. Use {', '.join(THEMES)}")
        general = self._section(found, ())
        return Preferences(self.path, model, theme, general, sections, self._vi(found), self._keys(found))

    def _vi(self, found: Mapping[str, Any]) -> bool:
        vi = found.get("vi", False)
        if not isinstance(vi, bool):
            raise self._wrong_at(("vi",), f"vi is {arguments.shown(vi)}. Use true or false")
        return vi

    def _keys(self, found: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """Keys by name; whether they are some, the screen says."""
        given = found.get("keys", {})
        if not isinstance(given, dict):
            raise self._wrong_at(("keys",), "keys is not a section: write [keys]")
        keys = {}
        for name, value in given.items():
            those = [value] if isinstance(value, str) else value
            if not (isinstance(those, list) and those and all(isinstance(k, str) and k for k in those)):
                said = arguments.shown(value)
                raise self._wrong_at(("keys", name), f'{name} is {said}. Use "ctrl+s", or ["enter", "f5"]')
            keys[name] = tuple(those)
        return keys

    def prompt(self) -> Preferences:
        """What a prompt's file says before its text: model, system and sampling."""
        found = self._parsed()
        self._known(found, (), ("model", "system", "sampling"))
        return Preferences(self.path, self._text(found, (), "model"), None, self._section(found, ()))

    def _parsed(self) -> dict[str, Any]:
        import tomlkit
        from tomlkit.exceptions import ParseError, TOMLKitError

        try:
            return tomlkit.parse(self.text).unwrap()
        except ParseError as e:
            raise self._wrong(e.line, re.sub(r" at line \d+ col \d+$", "", str(e))) from e
        except (TOMLKitError, RecursionError, ValueError) as e:
            raise self._wrong(None, " ".join(str(e).split())) from e

    def _section(self, given: Mapping[str, Any], at: tuple[str, ...]) -> Section:
        values: dict[str, dict[str, Any]] = {}
        for kind, settings in KINDS.items():
            part = given.get(kind, {})
            if not isinstance(part, dict):
                raise self._wrong_at((*at, kind), f"{kind} is not a section: write [{'.'.join((*at, kind))}]")
            self._known(part, (*at, kind), tuple(settings.SETTINGS))
            values[kind] = {}
            for name, value in part.items():
                try:
                    values[kind][name] = settings.SETTINGS[name].check(name, value)
                except UsageError as e:
                    raise self._wrong_at((*at, kind, name), f"{e.what} {e.todo}") from e
        return Section(self._text(given, at, "system"), values["sampling"], values["load"])

    def _text(self, given: Mapping[str, Any], at: tuple[str, ...], name: str) -> str | None:
        try:
            return None if name not in given else arguments.text(name, given[name])
        except UsageError as e:
            raise self._wrong_at((*at, name), f"{e.what} {e.todo}") from e

    def _known(self, given: Mapping[str, Any], at: tuple[str, ...], known: tuple[str, ...]) -> None:
        for name in given:
            if name not in known:
                raise self._wrong_at((*at, name), f"{name} is not known there. Known: {', '.join(known)}")

    def _wrong_at(self, key: tuple[str, ...], what: str) -> UsageError:
        return self._wrong(self._line(key), what)

    def _wrong(self, line: int | None, what: str) -> UsageError:
        where = f"{self.path}, line {line}" if line else str(self.path)
        return UsageError(f"{where}: {what.rstrip('.')}.", "Mend it, or take it out.")

    def _line(self, key: tuple[str, ...]) -> int | None:
        """Where a key, or something in it, first stands."""
        section: tuple[str, ...] = ()
        for n, line in enumerate(self.lines, 1):
            if header := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line):
                section = _words(header[1])
                if section[: len(key)] == key:
                    return n
            elif (pair := re.match(r"\s*([^=#]+?)\s*=", line)) and (*section, *_words(pair[1]))[
                : len(key)
            ] == key:
                return n
        return None


def _words(dotted: str) -> tuple[str, ...]:
    """The parts of a dotted key, quoted ones without their quotes."""
    return tuple(w.strip().strip("\"'") for w in re.findall(r'"[^"]*"|\'[^\']*\'|[^.]+', dotted.strip()))
