"""What `config.toml` says where the command line says nothing, and `tinychat config`, which shows it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import click

from tinychat.base.load_options import LoadOptions
from tinychat.base.preferences import KINDS, Preferences, Section
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.terminal import one_line
from tinychat.cli.first import usual_model
from tinychat.cli.options import complete_models, pick

VARIABLES = {  # what the environment may say
    "TINYCHAT_HOME": "where tinychat keeps its files",
    "TINYCHAT_ISA": "instructions that the CPU's kernels use",
    "TINYCHAT_API_KEY": "key of a server",
    "HF_TOKEN": "key of the model hub",
}
SECRET = ("TINYCHAT_API_KEY", "HF_TOKEN")


def load_options(section: Section, o: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `tinychat.load`: the file's, and those of the command line in their place."""
    return {**section.load, **pick(dict(o), LoadOptions.SETTINGS)}


def sampling_options(section: Section, o: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters, likewise."""
    return {**section.sampling, **pick(dict(o), SamplingParams.SETTINGS)}


@click.command()
@click.argument("model", required=False, shell_complete=complete_models)
def config(model: str | None) -> None:
    """Show what holds for MODEL where the command line says nothing, and who says so.

    The file is config.toml; docs/models.md says what may stand in it.
    """
    preferences = Preferences.read()
    there = "" if preferences.path.exists() else " (not there yet)"
    click.echo(f"{preferences.path}{there}\n")
    name, source = (model, "asked for") if model else usual_model(preferences)
    rows = [("model", name or "-", source or "none yet: tinychat run offers some")]
    rows.append(("theme", preferences.theme or "as chosen last", "config.toml" if preferences.theme else ""))
    rows += _keys(preferences)
    rows += _settings(preferences, name)
    rows += [
        (variable, "(set)" if variable in SECRET else os.environ[variable], f"environment: {what}")
        for variable, what in VARIABLES.items()
        if os.environ.get(variable)
    ]
    width = max(len(name) for name, _, _ in rows)
    for setting, value, source in rows:
        click.echo(f"{setting:<{width}}  {one_line(value):<16}  {one_line(source)}".rstrip())


def _keys(preferences: Preferences) -> Iterator[tuple[str, str, str]]:
    """Keys that the file changes. Raises UsageError for what the chat screen would refuse."""
    if preferences.vi or preferences.keys:
        from tinychat.tui.app import keys_of

        keys_of(preferences)
    if preferences.vi:
        yield "vi", "true", "config.toml"
    for key, those in preferences.keys.items():
        yield f"keys.{key}", ", ".join(those), "config.toml"


def _settings(preferences: Preferences, model: str) -> Iterator[tuple[str, str, str]]:
    """Name, value and source of each setting of a model."""
    own, general = preferences.models.get(model, Section()), preferences.general
    section = f'config.toml, [models."{model}"]'
    if own.system is not None or general.system is not None:
        said = own.system if own.system is not None else general.system or ""
        yield "system", " ".join(said.split())[:60], section if own.system is not None else "config.toml"
    else:
        yield "system", "-", "the model's template"
    for kind, settings in KINDS.items():
        for name, setting in settings.SETTINGS.items():
            source = ""
            value = setting.default
            if name in getattr(own, kind):
                value, source = getattr(own, kind)[name], section
            elif name in getattr(general, kind):
                value, source = getattr(general, kind)[name], "config.toml"
            elif value not in (None, ()):
                source = "the model's own, or built in" if kind == "sampling" else "built in"
            text = ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
            yield f"{kind}.{name}", "-" if value in (None, ()) else text, source


commands = [config]
