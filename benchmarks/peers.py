"""tinychat, llama.cpp and OpenVINO GenAI side by side: same shapes, same threads, interleaved rounds.

    python benchmarks/peers.py --shapes smollm2-135m,llama-3.2-1b --tokenizer FILE.gguf --work DIR \\
        --llama-python VENV/bin/python [--openvino-python VENV/bin/python] \\
        [--form q4_k,iq4_xs] [--rounds 3] [--markdown OUT.md] [--plot OUT.png]

With --form all sides read the same synthetic GGUF of that type; without, tinychat runs 4 bits as AWQ has
them and the peers Q4_0. Each peer runs in its own environment; one without a given python is left out.
Absolute figures drift with the machine, so the table gives medians of the rounds, and the median of the
ratios of each round's pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent


def run_json(command: list[str]) -> dict | None:
    """The JSON that a command prints last; None (and its complaint on stderr) if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(shape: str, form: str | None, o: argparse.Namespace, gguf: Path) -> list[dict[str, dict]]:
    """One dict a round: side → its figures."""
    what = [str(gguf)] if form else ["--synthetic", shape]
    ours = [sys.executable, "-m", "tinychat", "bench", *what, "--json", "--threads", str(o.threads)]
    ours += ["-p", str(o.prompt), "-n", str(o.gen)]
    size = [str(gguf), str(o.prompt), str(o.gen), str(o.threads)]
    sides = {"tinychat": ours}
    if o.llama_python:
        sides["llama.cpp"] = [o.llama_python, str(HERE / "llama_cpp_side.py"), *size]
    if o.openvino_python:
        sides["openvino"] = [o.openvino_python, str(HERE / "openvino_side.py"), *size]
    rounds = []
    for _ in range(o.rounds):
        figures = {}
        for side, command in sides.items():
            result = run_json(command)
            if result is None:
                continue
            if side == "tinychat":
                result |= {
                    "prefill_tok_s": result["prefill"][0]["tok_s"],
                    "decode_tok_s": result["decode"][0]["tok_s"],
                    "fraction": result["decode"][0]["fraction_of_bandwidth"],
                    "rounded": any(some["rounded"] for some in result["forms"]),
                }
            figures[side] = result
        rounds.append(figures)
    return rounds


def table(results: dict[str, list[dict[str, dict]]]) -> str:
    """Markdown: medians, and the median of the per-round ratios to each peer."""
    lines = [
        "| shape | side | prefill tok/s | decode tok/s | of bandwidth | prefill, ours ÷ it | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, rounds in results.items():
        for side in ("tinychat", "llama.cpp", "openvino"):
            have = [r for r in rounds if side in r and "tinychat" in r]
            if not have:
                continue

            def median(key: str, have=have, side=side) -> float:
                return statistics.median(r[side][key] for r in have)

            def ratio(key: str, have=have, side=side) -> str:
                if side == "tinychat":
                    return ""
                return f"{statistics.median(r['tinychat'][key] / r[side][key] for r in have):.2f}"

            share = f"{median('fraction'):.2f}" if side == "tinychat" else ""
            note = " (rounded to int8)" if have[0][side].get("rounded") else ""
            rates = f"{median('prefill_tok_s'):.1f} | {median('decode_tok_s'):.1f}"
            lines.append(
                f"| {shape} | {side}{note} | {rates} | {share} "
                f"| {ratio('prefill_tok_s')} | {ratio('decode_tok_s')} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, dict]]], out: Path) -> None:
    """Decode ratios as bars (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5))
    for offset, side in enumerate(("tinychat", "llama.cpp", "openvino")):
        heights = [
            statistics.median(r[side]["decode_tok_s"] for r in rounds if side in r)
            if any(side in r for r in rounds)
            else 0
            for rounds in results.values()
        ]
        axis.bar([i + 0.27 * offset for i in range(len(results))], heights, 0.25, label=side)
    axis.set_xticks([i + 0.27 for i in range(len(results))], list(results))
    axis.set_ylabel("decode tok/s")
    axis.legend()
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    """Parse, measure, print."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shapes", default="smollm2-135m,llama-3.2-1b")
    p.add_argument("--tokenizer", type=Path, required=True, help="a GGUF that lends its tokenizer")
    p.add_argument("--form", help="types of GGUF that all sides read, such as q4_k,iq4_xs")
    p.add_argument("--work", type=Path, required=True, help="folder for the synthetic GGUFs")
    p.add_argument("--llama-python")
    p.add_argument("--openvino-python")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("-p", "--prompt", type=int, default=512)
    p.add_argument("-n", "--gen", type=int, default=64)
    p.add_argument("--markdown", type=Path)
    p.add_argument("--plot", type=Path)
    o = p.parse_args()
    o.work.mkdir(parents=True, exist_ok=True)
    results = {}
    for shape, form in product(o.shapes.split(","), o.form.split(",") if o.form else [None]):
        name = f"{shape} {form}" if form else shape
        gguf = o.work / f"{name.replace(' ', '-')}.gguf"
        if not gguf.exists() and (form or o.llama_python or o.openvino_python):
            make = [sys.executable, str(HERE / "synth_gguf.py"), shape, str(o.tokenizer), str(gguf)]
            subprocess.run(make + ([form] if form else []), check=True)
        results[name] = measure(shape, form, o, gguf)
    text = table(results)
    print(text)
    if o.markdown:
        o.markdown.write_text(text + "\n")
    if o.plot:
        plot(results, o.plot)


if __name__ == "__main__":
    main()
