"""Commands that measure and tell: ppl, bench, completion."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from tinychat.base import locations, terminal
from tinychat.base.errors import UsageError
from tinychat.base.files import read_prose
from tinychat.base.load_options import CONTEXT, ENGINE, LoadOptions
from tinychat.base.machine import human_bytes
from tinychat.cli.options import (
    complete_models,
    file_type,
    loading_options,
    model_argument,
    options_of,
    pick,
)

MAX_SCORED = 16 << 20  # bytes of a text whose perplexity is asked for: hours on any machine
TOKENS = click.IntRange(0, 1 << 24)  # that bench reads


@click.command()
@model_argument
@click.argument("file", type=file_type())
@loading_options
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def ppl(model: str, file: Path, as_json: bool, **o: Any) -> None:
    """Perplexity of MODEL on the text FILE: windows of --ctx tokens (512), the second half of each scored."""
    from tinychat.loading import load
    from tinychat.perplexity import perplexity

    text = read_prose(file, MAX_SCORED)
    with load(model, **pick(o, LoadOptions.SETTINGS), progress=partial(click.echo, err=True)) as m:
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


class ThreadCount(click.IntRange):
    """A number of threads, or "auto"."""

    def __init__(self) -> None:
        super().__init__(1, 1024)  # as LoadOptions.threads

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Convert as click.IntRange does."""
        return value if value == "auto" else super().convert(value, param, ctx)


@click.command()
@click.argument("model", required=False, shell_complete=complete_models)
@click.option("--synthetic", metavar="SHAPE", help="Random weights of a known shape instead of MODEL.")
@click.option(
    "--form", metavar="FORM", help="Form of those weights, such as q4_k, gptq3 or fp8.  [default: int4]"
)
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
@click.option(
    "--rows",
    type=click.IntRange(2, 16),
    multiple=True,
    help="Time a step of that many tokens too, as drafts are checked; may be given several times.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Measurements; the median counts.",
)
@click.option(
    "--parallel",
    type=click.IntRange(2, 256),
    multiple=True,
    help="Measure that many answers at once too; may be given several times.",
)
@click.option(
    "--threads",
    type=ThreadCount(),
    metavar="N|auto",
    help="CPU threads; auto measures several numbers in turns and says which is the best.",
)
@options_of(LoadOptions, [name for name in LoadOptions.group(CONTEXT, ENGINE) if name != "threads"])
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def bench(
    model: str | None,
    synthetic: str | None,
    form: str | None,
    contexts: tuple[int, ...],
    rows: tuple[int, ...],
    parallel: tuple[int, ...],
    as_json: bool,
    **o: Any,
) -> None:
    """Prefill and decode rates of MODEL, and the share of the memory's bandwidth that decoding reaches."""
    if (model is None) == (synthetic is None):
        raise UsageError("bench needs either a MODEL or a --synthetic SHAPE.", "tinychat bench smollm2-135m")
    if form is not None and synthetic is None:
        raise UsageError("--form is of random weights.", f"tinychat bench --synthetic SHAPE --form {form}")
    from tinychat import bench as benchmark
    from tinychat.synthetic import DEFAULT

    if o["threads"] == "auto":
        if contexts or rows or parallel:
            raise UsageError(
                "--threads auto measures prefill and decode only.",
                "Find the number of threads first; give --context, --rows or --parallel with it then.",
            )
        return _try_threads(model, synthetic, form or DEFAULT, as_json, o)
    result = benchmark.run(
        model,
        synthetic,
        form or DEFAULT,
        n_prompt=o["n_prompt"],
        n_gen=o["n_gen"],
        contexts=contexts or (0,),
        rows=rows,
        rounds=o["rounds"],
        options=LoadOptions(**pick(o, LoadOptions.group(ENGINE))),
        parallel=parallel,
        progress=partial(click.echo, err=True),
    )
    if as_json:
        click.echo(json.dumps(result))
        return
    _tell(result)


def _try_threads(
    model: str | None, synthetic: str | None, form: str, as_json: bool, o: dict[str, Any]
) -> None:
    from tinychat.base.cores import cores
    from tinychat.bench import measured
    from tinychat.bench_threads import try_threads
    from tinychat.loading import make_backend

    options = LoadOptions(**pick({**o, "threads": None}, LoadOptions.group(ENGINE)))
    if options.device == "cuda":
        raise UsageError("--threads auto is for the CPU.", "Leave out --device cuda.")
    checkpoint = measured(model, synthetic, form, offline=bool(options.offline))

    def load(n: int) -> Any:
        return make_backend(checkpoint, options.but(threads=n), partial(click.echo, err=True))

    sizes = checkpoint.config.vocab_size, o["n_prompt"], max(o["n_gen"], 32), o["rounds"]
    result = {"model": model or synthetic, **try_threads(load, cores(), *sizes)}
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{result['model']} · cores: {result['cores']}")
    for row in result["tried"]:
        prefill = f"prefill {row['prefill_tok_s']:>8.1f} tok/s   " if row["prefill_tok_s"] else ""
        click.echo(f"{row['threads']:>4} threads   {prefill}decode {row['decode_tok_s']:>8.1f} tok/s")
    best = result["best"]
    if best == result["default"]:
        click.echo(f"{best} threads are the best, and what is taken without --threads.")
    else:
        click.echo(f"{best} threads are the best: --threads {best}, or threads = {best} under [load] in")
        click.echo(f"{locations.config_file()}.")


def _tell(result: dict[str, Any]) -> None:
    """Print what the benchmark found."""
    per_token = human_bytes(result["weight_bytes_per_token"])
    threads = f" · {result['threads']} threads" if result["threads"] else ""
    click.echo(f"{result['model']} · {result['backend']} {result['isa']}{threads}")
    click.echo(f"{per_token} of weights a token · read bandwidth {result['read_bandwidth_gb_s']:.1f} GB/s")
    for row in result["forms"]:
        click.echo(f"{human_bytes(row['bytes']):>9}  {_form_said(row)}")
    for row in result["prefill"]:
        click.echo(
            f"prefill {row['n_tokens']:>6} tokens  {row['tok_s']:>8.1f} tok/s  ±{row['spread'] / 2:.0%}"
        )
    for row in result["decode"]:
        share = f"{row['fraction_of_bandwidth']:.0%} of the bandwidth"
        if row["more_than_memory"]:
            share += f" ({row['more_than_memory']})"
        click.echo(
            f"decode at {row['context']:>6}      {row['tok_s']:>8.1f} tok/s  ±{row['spread'] / 2:.0%}  "
            f"{row['gb_s']:.1f} GB/s, {share}"
        )
    for row in result.get("rows", ()):
        click.echo(
            f"{row['rows']:>3} tokens in a step   {row['step_s'] * 1e3:>8.1f} ms     "
            f"±{row['spread'] / 2:.0%}  {row['times_one']:.2f} × one"
        )
    for row in result.get("parallel", ()):
        click.echo(
            f"{row['sequences']:>3} answers at once    {row['tok_s']:>8.1f} tok/s  ±{row['spread'] / 2:.0%}  "
            f"{row['times_one']:.2f} × one"
        )


def _form_said(row: dict[str, Any]) -> str:
    """The form of some weights; where they run in another one, both."""
    if row["runs_as"] == row["given"]:
        return row["given"]
    how = "rounded to" if row["rounded"] else "run as"
    return f"{row['runs_as']}: {how} that, given {human_bytes(row['given_bytes'])} of {row['given']}"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for SHELL, for its start-up file."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    cli = click.get_current_context().find_root().command
    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    click.echo(kind(cli, {}, "tinychat", "_TINYCHAT_COMPLETE").source())


commands = [ppl, bench, completion]
