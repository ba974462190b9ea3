"""`tinychat doctor`: what this machine has, what is made of it, which models fit, and what is wrong."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import click

from tinychat.base import locations, machine, terminal
from tinychat.base.cores import cores
from tinychat.base.machine import available_memory, cpu_count, human_bytes, human_rate
from tinychat.cli import tables

NETWORK_SECONDS = 2.0


@click.command()
@click.option(
    "--verify",
    metavar="MODEL",
    help="Read all of MODEL and its packs; say what is damaged.",
)
@click.option(
    "--gpu",
    is_flag=True,
    help="Check the GPU's kernels against the CPU, which takes some minutes; keep how they are to be run.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def doctor(verify: str | None, gpu: bool, as_json: bool) -> None:
    """What this machine has, what tinychat uses of it, which models fit, and what is wrong."""
    if gpu:
        sys.exit(_check_gpu(as_json))
    if verify is not None:
        sys.exit(_verify(verify, as_json))
    facts = gather()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        tables.show(sentences(facts))
        if facts["fits"]:
            click.echo()
            tables.show(_rows(facts["fits"]), ("model that fits", "memory", "speed", "get it"))
        click.echo()
        for problem in facts["problems"]:
            terminal.label("problem", "red")
            click.echo(f": {problem}")
        if not facts["problems"]:
            terminal.label("All well.", "green")
            click.echo()
    sys.exit(1 if facts["problems"] else 0)


def _check_gpu(as_json: bool) -> int:
    """The exit code: 1 where the GPU may not be trusted."""
    from tinychat.backends import cuda_proof

    record = cuda_proof.run(tell=partial(click.echo, err=True))
    if as_json:
        click.echo(json.dumps(asdict(record), indent=2))
        return 0 if record.passed else 1
    tables.show(
        [(name, f"{result:.2f} s" if isinstance(result, float) else result)
         for name, result in record.trials.items()]
    )  # fmt: skip
    click.echo()
    without = [word for word, on in asdict(record.variant).items() if not on]
    if record.passed:
        terminal.label("All well.", "green")
        speed = record.facts.get("bandwidth_gb_s")
        click.echo(f" {record.facts.get('gpu')} copies {speed} GB/s." if speed else "")
        if without:
            click.echo(f"Kernels are run without {' and '.join(without)} here; with it they fail.")
        return 0
    terminal.label("problem", "red")
    click.echo(": The GPU computes something else than the CPU, or nothing. Use --device cpu.")
    click.echo(f"To report it, attach {locations.gpu_check_file()}.")
    return 1


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
    own = Path(model).exists()  # a file of the user's, which no command can get
    again = "Get it again from where it came." if own else f"Get it again: tinychat pull {shlex.quote(model)}"
    for bad, advice in (
        (found.bad_files, again),
        (found.bad_packs, "The next load makes it again."),
    ):
        for name, what in bad.items():
            terminal.label("damaged", "red")
            click.echo(f": {name}: {what.removesuffix('.')}. {advice}")
    return 1 if damaged else 0


def gather() -> dict[str, Any]:
    """Everything, as `--json` prints it."""
    problems: list[str] = []
    facts: dict[str, Any] = {
        "tinychat": metadata.version("tinychat"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in ("numpy", "tokenizers", "textual", "torch"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "torch":  # only quantizing and the reference need it
                facts[package] = None
            else:
                problems.append(f"{package} is not installed: pip install {package}")
    network = _started(_network)
    facts |= {"cores": cpu_count(), "cores_of_machine": os.cpu_count(), "cache_bytes": machine.cache_bytes()}
    facts["cores_said"] = cores().sentence()
    free = available_memory()
    facts |= {"memory_free": human_bytes(free), "memory_free_bytes": free}
    facts["memory_total_bytes"] = machine.total_memory()
    try:
        from tinychat.kernels_cpu import _native

        facts["isas"] = list(_native.isas())
        facts["isa"] = _native.isa()
        facts["amx_problem"] = _native.amx_problem()
        facts["read_bandwidth_gb_s"] = round(_native.read_bandwidth(cpu_count(), 1 << 28), 1)
    except (ImportError, AttributeError) as e:
        problems.append(f"The CPU kernels do not load ({e}): reinstall tinychat.")
    except MemoryError:
        problems.append(f"{human_bytes(free)} of memory are too little to measure its speed.")
    except RuntimeError as e:  # TINYCHAT_ISA
        problems.append(" ".join(str(e).split()))
    from tinychat.backends import cuda_device
    from tinychat.base import jetson

    facts |= cuda_device.report()
    if problem := facts.pop("gpu_problem", None):
        problems.append(problem)
    board = jetson.report()
    problems += board.pop("problems", [])
    facts |= board
    facts |= _store(problems)
    facts["network"] = network()
    facts["fits"] = _fits(facts)
    facts["problems"] = problems
    return facts


def _store(problems: list[str]) -> dict[str, Any]:
    home = locations.home()
    facts: dict[str, Any] = {"home": str(home)}
    try:
        existing = next(p for p in (home, *home.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            problems.append(f"{home} cannot be written: set TINYCHAT_HOME to a folder of yours.")
        facts["disk_free_bytes"] = shutil.disk_usage(existing).free
        from tinychat.hub import store

        facts["models"] = [m.name for m in store.installed()]
    except OSError as e:
        problems.append(f"The models in {home} cannot be read: {e}")
    return facts


def _network() -> str:
    """Whether models can be downloaded, in words. A connection is opened and closed; nothing is sent."""
    from tinychat.hub.store import offline_by_environment

    if offline_by_environment():
        return "not used: HF_HUB_OFFLINE or TINYCHAT_OFFLINE is set"
    if proxy := getproxies().get("https"):
        return f"through the proxy {_host(proxy) or proxy}"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not (host := _host(endpoint)):
        return f"HF_ENDPOINT is {endpoint}, which is no address; models that are here work without"
    try:
        socket.create_connection((host, 443), NETWORK_SECONDS).close()
    except (OSError, ValueError):
        return f"{host} is not reached; models that are here work without"
    return f"{host} is reached"


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # brackets that do not close, characters that no host has
        return None


def _started(question: Callable[[], str]) -> Callable[[], str]:
    """Ask beside other work. The result gives the answer, or after a while that there is none."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    thread.start()

    def answer() -> str:
        thread.join(NETWORK_SECONDS)
        return answers[0] if answers else "no answer; models that are here work without"

    return answer


def _fits(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Models that run in the memory that is free, largest first: those that are here, and known ones."""
    from tinychat.hub import store
    from tinychat.hub.aliases import ALIASES
    from tinychat.hub.fits import Machine, fit_of

    machine = Machine(
        facts["memory_free_bytes"], facts.get("disk_free_bytes", 0), facts.get("read_bandwidth_gb_s")
    )
    here = {m.name: m.size for m in store.installed()} if "models" in facts else {}
    sizes = {name: a.size for name, a in ALIASES.items()} | here
    rows = []
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        fit = fit_of(name, size, machine, here=True)  # a disk can be cleared
        if size > 0 and not fit.why_not:
            rate = fit.rate and round(fit.rate, 1)
            rows.append(
                {"name": name, "memory_bytes": fit.memory, "tokens_per_s": rate, "here": name in here}
            )
    return rows


def _rows(fits: list[dict[str, Any]]) -> list[list[str]]:
    from tinychat.hub.fits import USABLE

    rows = []
    for m in fits:
        slow = " (slow)" if m["tokens_per_s"] is not None and m["tokens_per_s"] < USABLE else ""
        get = "here" if m["here"] else f"tinychat pull {m['name']}"
        rows.append(
            [m["name"], human_bytes(m["memory_bytes"]), f"{human_rate(m['tokens_per_s'])} tok/s{slow}", get]
        )
    return rows


def sentences(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Measurements and decisions, a name and a sentence or two each."""
    said = [("tinychat", f"{facts['tinychat']} on Python {facts['python']}, {facts['platform']}")]
    libraries = [f"{p} {facts[p]}" for p in ("numpy", "tokenizers", "textual", "torch") if facts.get(p)]
    torch = "" if facts["torch"] else "; no torch, which only quantize and --device reference need"
    said.append(("libraries", ", ".join(libraries) + torch))
    n, all_cores = facts["cores"], facts["cores_of_machine"]
    few = "" if n == all_cores else f" (the machine has {all_cores}; affinity or a cgroup allows no more)"
    compute = f"{n} threads compute" if n > 1 else "1 thread computes"
    ask = "tinychat bench MODEL --threads auto finds the best number"
    said.append(("cores", f"{facts['cores_said']}{few}; {compute}, --threads changes it ({ask})"))
    if "isa" in facts:
        best, isa = facts["isas"][0], facts["isa"]
        why = "the fastest that this processor runs"
        if isa != best:
            faster = (
                f"whether faster than {best}, nobody has timed yet"
                if isa == "amx"
                else f"{best} would be faster"
            )
            why = f"as TINYCHAT_ISA says; {faster}"
        unused = f"; its AMX is not used: {facts['amx_problem']}" if facts["amx_problem"] else ""
        said.append(("kernels", f"{isa}, {why} (of {', '.join(facts['isas'])}){unused}"))
    total = human_bytes(facts["memory_total_bytes"])
    said.append(("memory", f"{facts['memory_free']} of {total} are free"))
    if speed := facts.get("read_bandwidth_gb_s"):
        said.append(
            ("bandwidth", f"{speed} GB/s read; divided by the bytes of a model it bounds tokens a second")
        )
    said += _gpu(facts)
    said += [
        (k.replace("_", " "), facts[k]) for k in ("jetson", "l4t", "power_mode", "gpu_clock") if k in facts
    ]
    disk = f", {human_bytes(facts['disk_free_bytes'])} free" if "disk_free_bytes" in facts else ""
    said.append(("store", f"{facts['home']}{disk} (TINYCHAT_HOME moves it)"))
    if "models" in facts:
        said.append(("models", ", ".join(facts["models"]) or "none yet"))
    said.append(("network", facts["network"]))
    return said


def _gpu(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "gpu_memory" not in facts:
        return [("GPU", f"{facts['gpu']}; the CPU computes")]
    used = "--device auto takes it, once it has passed tinychat doctor --gpu"
    if "gpu_compiler" not in facts:
        used = "it cannot be used yet (see below); the CPU computes"
    details = ("gpu_driver", "gpu_memory", "gpu_compiler", "gpu_kernels")
    said = ". ".join(str(facts[k]) for k in details if k in facts)
    return [("GPU", f"{facts['gpu']}; {used}"), ("GPU details", said)]


commands = [doctor]
