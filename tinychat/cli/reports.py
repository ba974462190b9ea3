"""Commands that measure and tell: ppl, bench, doctor, completion."""

from __future__ import annotations

import json
import os
import platform
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from tinychat import terminal
from tinychat.cli.options import LOADING, complete_models, file_type, loading_options, model_argument, pick
from tinychat.errors import UsageError
from tinychat.files import read_prose
from tinychat.machine import available_memory, cpu_count, human_bytes

MAX_SCORED = 16 << 20  # bytes of a text whose perplexity is asked for: hours on any machine
TOKENS = click.IntRange(0, 1 << 24)  # that bench reads


@click.command()
@model_argument
@click.argument("file", type=file_type())
@loading_options
@click.option("--json", "as_json", is_flag=True)
def ppl(model: str, file: Path, as_json: bool, **o: Any) -> None:
    """Perplexity of MODEL on the text FILE: windows of --ctx tokens (512), the second half of each scored."""
    from tinychat.model import load
    from tinychat.perplexity import perplexity

    text = read_prose(file, MAX_SCORED)
    with load(model, **pick(o, LOADING), progress=partial(click.echo, err=True)) as m:
        window, ids = min(o["ctx"] or 512, m.n_ctx), m.tokenizer.encode(text)
        if sys.stderr.isatty():
            with terminal.bar("windows") as progress:
                value, n = perplexity(m.logits, ids, window, progress)
        else:
            value, n = perplexity(m.logits, ids, window)
        if as_json:
            click.echo(json.dumps({**m.describe(), "ctx": window, "perplexity": value, "n_tokens": n}))
        else:
            click.echo(f"{value:.4f}  ({n} tokens scored)")


@click.command()
@click.argument("model", required=False, shell_complete=complete_models)
@click.option("--synthetic", metavar="SHAPE", help="Random weights of a known shape instead of MODEL.")
@click.option("-p", "--n-prompt", type=TOKENS, default=512, show_default=True, help="Prefill tokens.")
@click.option(
    "-n", "--n-gen", type=click.IntRange(1, 1 << 24), default=128, show_default=True, help="Decoded tokens."
)
@click.option(
    "--context",
    "contexts",
    type=TOKENS,
    multiple=True,
    help="Decode after this many tokens.",
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True)
@loading_options
@click.option("--json", "as_json", is_flag=True)
def bench(
    model: str | None, synthetic: str | None, contexts: tuple[int, ...], as_json: bool, **o: Any
) -> None:
    """Prefill and decode rates of MODEL, and the share of the memory's bandwidth that decoding reaches."""
    if (model is None) == (synthetic is None):
        raise UsageError("bench needs either a MODEL or a --synthetic SHAPE.", "tinychat bench smollm2-135m")
    from tinychat import bench as benchmark

    result = benchmark.run(
        model,
        synthetic,
        n_prompt=o["n_prompt"],
        n_gen=o["n_gen"],
        contexts=contexts or (0,),
        rounds=o["rounds"],
        **{
            k: v
            for k, v in pick(o, LOADING).items()
            if k not in ("ctx", "kv_budget", "kv_policy", "kv_disk_budget")
        },
        progress=partial(click.echo, err=True),
    )
    if as_json:
        click.echo(json.dumps(result))
        return
    per_token = human_bytes(result["weight_bytes_per_token"])
    threads = f" · {result['threads']} threads" if result["threads"] else ""
    click.echo(f"{result['model']} · {result['backend']} {result['isa']}{threads}")
    click.echo(f"{per_token} of weights a token · read bandwidth {result['read_bandwidth_gb_s']:.1f} GB/s")
    for row in result["prefill"]:
        click.echo(
            f"prefill {row['n_tokens']:>6} tokens  {row['tok_s']:>8.1f} tok/s  ±{row['spread'] / 2:.0%}"
        )
    for row in result["decode"]:
        click.echo(
            f"decode at {row['context']:>6}      {row['tok_s']:>8.1f} tok/s  ±{row['spread'] / 2:.0%}  "
            f"{row['gb_s']:.1f} GB/s, {row['fraction_of_bandwidth']:.0%} of the bandwidth"
        )


@click.command()
@click.option("--verify", metavar="MODEL", help="Read all of MODEL and its packs; say what is damaged.")
@click.option("--json", "as_json", is_flag=True)
def doctor(verify: str | None, as_json: bool) -> None:
    """What this machine has, what tinychat uses of it, and what is wrong."""
    if verify is not None:
        sys.exit(_verify(verify, as_json))
    facts = _facts()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            if name != "problems":
                click.echo(f"{name:<{width}}  {value}")
        for problem in facts["problems"]:
            click.echo(f"{click.style('problem', fg='red')}: {problem}")
        if not facts["problems"]:
            click.echo(click.style("All well.", fg="green"))
    sys.exit(1 if facts["problems"] else 0)


def _verify(model: str, as_json: bool) -> int:
    """The exit code: 1 where something is damaged."""
    from tinychat.hub import store

    found = store.verify(model, partial(click.echo, err=True))
    damaged = found.bad_files | found.bad_packs
    if as_json:
        click.echo(json.dumps({"model": model, **vars(found)}, indent=2))
        return 1 if damaged else 0
    for name in (*found.files, *found.packs):
        if name not in damaged:
            click.echo(f"{name}: whole")
    for name, what in found.bad_files.items():
        click.echo(f"{click.style('damaged', fg='red')}: {name}: {what}. Get it again: tinychat pull {model}")
    for name, what in found.bad_packs.items():
        click.echo(f"{click.style('damaged', fg='red')}: {name}: {what}. The next load makes it again.")
    return 1 if damaged else 0


def _facts() -> dict[str, Any]:
    from tinychat import locations

    problems = []
    facts: dict[str, Any] = {
        "tinychat": metadata.version("tinychat"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in ("numpy", "torch", "tokenizers", "textual"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            problems.append(f"{package} is not installed: pip install {package}")
    facts["cores"] = cpu_count()
    facts["memory_free"] = human_bytes(available_memory())
    try:
        from tinychat.kernels_cpu import _native

        facts["isa"] = _native.isa()
        facts["read_bandwidth_gb_s"] = round(_native.read_bandwidth(cpu_count(), 1 << 28), 1)
    except (ImportError, AttributeError) as e:
        problems.append(f"The CPU kernels do not load ({e}): reinstall tinychat.")
    from tinychat import jetson
    from tinychat.backends import cuda_device

    facts |= cuda_device.report()
    if problem := facts.pop("gpu_problem", None):
        problems.append(problem)
    board = jetson.report()
    problems += board.pop("problems", [])
    facts |= board
    home = locations.home()
    facts["home"] = str(home)
    existing = next(p for p in (home, *home.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        problems.append(f"{home} cannot be written: set TINYCHAT_HOME to a folder of yours.")
    try:
        from tinychat.hub import store

        facts["models"] = [m.name for m in store.installed()]
    except OSError as e:
        problems.append(f"The models in {home} cannot be read: {e}")
    facts["problems"] = problems
    return facts


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for SHELL, for its start-up file."""
    from click.shell_completion import get_completion_class

    from tinychat.cli.main import cli

    click.echo(get_completion_class(shell)(cli, {}, "tinychat", "_TINYCHAT_COMPLETE").source())


commands = [ppl, bench, doctor, completion]
