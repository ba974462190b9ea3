"""Commands for models on disk: pull, list, show, rm; and quantize, which puts one there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from tinychat.base.characters import is_unicode
from tinychat.base.errors import UsageError
from tinychat.base.machine import human_bytes
from tinychat.cli import model_facts, tables
from tinychat.cli.options import Name, file_type, model_argument


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=not is_unicode(sys.stdout), indent=2, default=str))


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True)
def pull(model: str, as_json: bool) -> None:
    """Download MODEL, or say that it is here already."""
    from tinychat.hub import store

    path = store.pull(model)
    if as_json:
        _echo_json({"model": model, "path": str(path)})
    else:
        click.echo(f"{model} is ready: {path}", err=True)


def _available(name: str, alias: Any) -> dict[str, Any]:
    facts = {"name": name, "family": alias.family, "size": alias.size, "source": str(alias.sources[0])}
    return facts | {"license": alias.license, "draft": alias.draft, "verified": alias.verified}


@click.command("list")
@click.option("--all", "--available", "everything", is_flag=True, help="Models that can be pulled, too.")
@click.option("--json", "as_json", is_flag=True)
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
    available = [_available(name, a) for name, a in aliases.ALIASES.items() if name not in have]
    available = available if everything else []
    if as_json:
        _echo_json(rows if not everything else {"installed": rows, "available": available})
        return
    if not rows and not everything:
        click.echo("No models yet. tinychat pull smollm2-135m gets one (94 MB).", err=True)
        return
    cells = [[r["name"], human_bytes(r["size"]), r["quantization"] or "", r["source"] or ""] for r in rows]
    if cells:
        tables.show(cells, ("model", "size", "weights", "source"))
        click.echo() if available else None
    if available:
        _show_available(available)


def _show_available(available: list[dict[str, Any]]) -> None:
    """Models that can be pulled, the smallest first; where from is said in short, by the repository."""
    cells = []
    for a in sorted(available, key=lambda a: a["size"]):
        where = "/".join(a["source"].partition(":")[2].split("/")[:2])
        draft = f"--draft {a['draft']}" if a["draft"] else ""
        cells.append(
            [a["name"], human_bytes(a["size"]), a["license"], " ".join(filter(None, [where, draft]))]
        )
    tables.show(cells, ("to be pulled", "size", "licence", "from, and what drafts for it"))
    unverified = sum(not a["verified"] for a in available)
    if unverified:
        click.echo(f"{unverified} of them are unverified: nobody has run these with tinychat yet.", err=True)


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True)
def show(model: str, as_json: bool) -> None:
    """Facts about an installed MODEL, a folder or a .gguf file."""
    from tinychat.hub import store

    facts = store.show(model)
    if as_json:
        _echo_json(facts)
        return
    tables.show(model_facts.rows(facts))
    click.echo()
    tables.show(model_facts.weights(facts), ("module", "bits", "bytes", "as"))


@click.command()
@model_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True)
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
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
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
