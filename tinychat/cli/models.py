"""Commands for models on disk: pull, list, show, rm; and quantize, which puts one there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinychat.base.characters import is_unicode
from tinychat.base.errors import UsageError
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import human_bytes, human_rate
from tinychat.cli import model_facts, tables
from tinychat.cli.options import Name, file_type, model_argument, options_of, pick

if TYPE_CHECKING:
    from tinychat.hub.aliases import Alias
    from tinychat.hub.fits import Fit, Machine


FITTED = ("ctx", "kv_bits", "gpu_memory", "quantize", "head_bits")  # load options that sizes depend on


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=not is_unicode(sys.stdout), indent=2, default=str))


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def pull(model: str, as_json: bool) -> None:
    """Download MODEL, or say that it is here already."""
    from tinychat.hub import store

    path = store.pull(model)
    if as_json:
        _echo_json({"model": model, "path": str(path)})
    else:
        click.echo(f"{model} is ready: {path}", err=True)


def _available(fit: Fit, alias: Alias) -> dict[str, Any]:
    facts = {"name": fit.name, "family": alias.family, "size": fit.size, "source": str(alias.sources[0])}
    facts |= {"license": alias.license, "draft": alias.draft, "verified": alias.verified}
    facts |= {"memory_bytes": fit.memory, "tokens_per_s": fit.rate and round(fit.rate, 1)}
    return facts | {"fits": not fit.why_not, "why_not": fit.why_not or None, "good_for": alias.good_for}


@click.command("list")
@click.option("--all", "--available", "everything", is_flag=True, help="Models that can be pulled, too.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def list_models(everything: bool, as_json: bool) -> None:
    """Models on this machine."""
    from tinychat.hub import aliases, store

    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "size": m.size,
            "quantization": m.quantization,
            "source": m.source,
            "path": str(m.path),
        }
        for m in store.installed()
    ]
    have = {r["name"] for r in rows}
    fits: list[Fit] = []
    if everything:
        from tinychat.hub.fits import Machine, fit_of, read_bandwidth

        machine = Machine.here(read_bandwidth())
        known = [(name, a) for name, a in aliases.ALIASES.items() if name not in have]
        fits = sorted((fit_of(name, a.size, machine) for name, a in known), key=lambda f: f.size)
    if as_json:
        _echo_json(
            rows
            if not everything
            else {"installed": rows, "available": [_available(f, aliases.ALIASES[f.name]) for f in fits]}
        )
        return
    if not rows and not everything:
        click.echo("No models yet. tinychat run offers some; tinychat list --available has all.", err=True)
        return
    cells = [[r["name"], human_bytes(r["size"]), r["quantization"] or "", r["source"] or ""] for r in rows]
    if cells:
        tables.show(cells, ("model", "size", "weights", "source"))
        click.echo() if fits else None
    if fits:
        _show_available(fits, machine)


def _show_available(fits: list[Fit], machine: Machine) -> None:
    """Models that can be pulled, the smallest first, a line each in 80 columns; dim: what does not fit."""
    from tinychat.hub.aliases import ALIASES

    cells = [
        (
            f.name,
            human_bytes(f.size),
            human_bytes(f.memory),
            human_rate(f.rate),
            f.license,
            f.why_not or f.good_for,
        )
        for f in fits
    ]
    dim = [i for i, f in enumerate(fits) if f.why_not]
    header = ("to be pulled", "size", "memory", "tok/s", "licence", "good for, or: needs")
    tables.show(cells, header, dim)
    free = f"{human_bytes(machine.memory)} of memory and {human_bytes(machine.disk)} of disk are free"
    click.echo(f"{sum(not f.why_not for f in fits)} of {len(fits)} fit: {free}.", err=True)
    if machine.bandwidth:
        reads = f"the memory gives {machine.bandwidth:.0f} GB/s now"
        click.echo(f"tok/s is an estimate: {reads}, divided by the bytes of a token.", err=True)
    if unverified := sum(not ALIASES[f.name].verified for f in fits):
        click.echo(f"{unverified} of them are unverified: nobody has run these with tinychat yet.", err=True)


@click.command()
@model_argument
@click.option("--fit", is_flag=True, help="What it takes of GPU and RAM, and how fast that is.")
@options_of(LoadOptions, FITTED)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def show(model: str, fit: bool, as_json: bool, **o: Any) -> None:
    """Facts about an installed MODEL, a folder or a .gguf file."""
    from tinychat.hub import store

    given = pick(o, FITTED)
    if fit:
        return _show_fit(model, LoadOptions(**given), as_json)
    if given:
        flag = f"--{next(iter(given)).replace('_', '-')}"
        raise UsageError(f"{flag} is for what a model takes.", f"tinychat show {model} --fit {flag} …")
    facts = store.show(model)
    if as_json:
        _echo_json(facts)
        return
    tables.show(model_facts.rows(facts))
    click.echo()
    tables.show(model_facts.weights(facts), ("module", "bits", "bytes", "as"))


def _show_fit(model: str, options: LoadOptions, as_json: bool) -> None:
    """Where the model would lie, before any of it is loaded."""
    from tinychat import fitting
    from tinychat.formats import open_checkpoint
    from tinychat.hub import store

    checkpoint = open_checkpoint(store.resolve(model, offline=True))
    facts = fitting.facts(checkpoint, options, fitting.supposed(options, fitting.here()))
    if as_json:
        _echo_json(facts)
    else:
        tables.show(model_facts.fit(facts))


@click.command()
@model_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def rm(model: str, yes: bool, as_json: bool) -> None:
    """Delete an installed MODEL."""
    from tinychat.hub import store

    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete {model}?", abort=True, err=True)
    freed = store.remove(model)
    if as_json:
        _echo_json({"model": model, "freed_bytes": freed})
    else:
        click.echo(f"Deleted {model}" + (f", {human_bytes(freed)}." if freed else "."), err=True)


class GroupSize(click.ParamType):
    """A number of inputs; "row" for all of them, as -1."""

    name = "32|64|128|row"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Raises UsageError for what is none."""
        if value == "row":
            return -1
        try:
            size = int(value)
        except ValueError:
            size = 0
        if size <= 0:
            raise UsageError(f"A group of {value} makes no sense.", "Use 32, 64, 128 or row.")
        return size


@click.command()
@model_argument
@click.option("--out", required=True, type=Name(), help="Folder (or .gguf file) to write.")
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), help="Default: 4; 8 with smoothquant.")
@click.option(
    "--method",
    type=click.Choice(["awq", "gptq", "rtn", "smoothquant"]),
    default="awq",
    show_default=True,
    help="smoothquant: 8 bits for weights and activations (W8A8).",
)
@click.option(
    "--format",
    type=click.Choice(["awq", "gptq", "compressed-tensors", "gguf"]),
    help="Default: gguf for an OUT that ends so, else awq or gptq, as the method and the bits have it.",
)
@click.option(
    "--group-size",
    type=GroupSize(),
    help="Inputs that share a scale: 32, 64, 128 or row (default: largest of the numbers that fits).",
)
@click.option("--calib", "calib_file", type=file_type(), help="Calibration text.")
@click.option(
    "--ranges",
    type=click.Choice(["searched", "whole"]),
    default="searched",
    show_default=True,
    help="Ranges of groups: chosen by the error on the text, or from smallest to largest weight.",
)
@click.option("--symmetric", is_flag=True, help="Zero in the middle (gptq, compressed-tensors).")
@click.option(
    "--gguf-type",
    type=click.Choice(["Q4_K", "Q4_1", "Q4_0", "Q8_0"]),
    help="Type in a GGUF (default: Q4_K or Q8_0).",
)
@click.option("--act-order", is_flag=True, help="gptq: round inputs with large activations first.")
@click.option(
    "--tune", is_flag=True, help="Then distil scales and norms against the float model (some minutes more)."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same weights.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def quantize(model: str, out: Path, bits: str | None, as_json: bool, **wishes: Any) -> None:
    """Make a checkpoint of MODEL with 2, 3, 4 or 8 bits a weight: the folder or .gguf file OUT."""
    # Threads with nothing to do sleep: where they spin beside another program, quantizing takes 4 times as
    # long. OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from tinychat.quantize import quantize_model

    facts = quantize_model(model, out, bits=int(bits) if bits else None, **wishes)
    if as_json:
        _echo_json(facts)
    else:
        for type, n in facts["substitutes"].items():
            click.echo(f"{n} linears are {type}: 256 does not divide their inputs.", err=True)
        click.echo(f"Wrote {out}. Chat with it: tinychat run {out}", err=True)


commands = [pull, list_models, show, rm, quantize]
