"""What quantization costs: perplexity on held-out technical English, the table of docs/quality.md.

    python benchmarks/quality.py --work DIR                      # make and measure every row but llama.cpp's
    python benchmarks/quality.py --work DIR --llama-python PY    # PY: a Python that has llama-cpp-python
    python benchmarks/quality.py --work DIR MODEL...             # these only: folders, .gguf files, aliases

Text: the reStructuredText specification, from docutils 0.21.2's source distribution (public domain, 119 kB,
downloaded from PyPI by hash). Windows of 512 tokens, one behind the other; the second half of each is scored,
so every scored token has 256 tokens of context at least. Weights are dequantized and run in float32 with
torch, so the figures are of the weights alone. KL: mean over scored tokens of KL(float ‖ quantized), with
the 95 % interval over windows.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch

from tinychat.formats import open_checkpoint
from tinychat.hub import store
from tinychat.network.checkpoint import Checkpoint
from tinychat.quantize import quantize
from tinychat.quantize.forward import Forward, read_block

SDIST = "docutils==0.21.2"
SHA256 = "3a6b18732edf182daa3cd12775bbb338cf5691468f91eeeb109deff6ebfa986f"
FILES = ("docs/ref/rst/restructuredtext.txt",)
LENGTH = 512
METHODS = {
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "gptq-act-order": {"method": "gptq", "act_order": True},
    "rtn": {"method": "rtn"},
}
LLAMA_TYPES = {"Q4_K_M": 15, "Q4_0": 2}
REQUANTIZE = """
import ctypes, sys, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.allow_requantize, p.ftype = True, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def held_out_archive(work: Path) -> Path:
    """The source distribution in `work`, downloaded if it is not there."""
    path = work / "docutils-0.21.2.tar.gz"
    if not path.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(work)]
        subprocess.run([*pip, SDIST], check=True, stdout=sys.stderr)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{path} is not the file that the published figures were measured on.")
    return path


def held_out_text(work: Path) -> str:
    """The text that is scored."""
    with tarfile.open(held_out_archive(work)) as tar:
        return "\n".join(tar.extractfile(f"docutils-0.21.2/{f}").read().decode() for f in FILES)


def hidden(checkpoint: Checkpoint, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states that predict each window's second half [W, L/2, H], and the head [vocab, H]."""
    embedding = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
    f = Forward(checkpoint.config)
    x = f.embed(embedding, windows)
    for layer in range(checkpoint.config.n_layers):
        w = read_block(checkpoint, layer)
        for i in range(0, len(x), 4):
            x[i : i + 4] = f.block(x[i : i + 4], w)
    x = f.normed(x[:, windows.shape[1] // 2 - 1 : -1], torch.from_numpy(checkpoint.vector("model.norm")))
    tied = checkpoint.config.tie_embeddings
    return x, embedding if tied else torch.from_numpy(checkpoint.linear("lm_head").dequantize())


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Stored bits of the blocks' linears for each weight: codes, scales, zeros or offsets."""
    from tinychat.formats.gguf import GGUFCheckpoint
    from tinychat.models import FAMILIES
    from tinychat.network.weights import QuantizedLinear

    bits = weights = 0
    for layer in range(checkpoint.config.n_layers):
        for name, (n, k) in FAMILIES[checkpoint.config.family].linears(checkpoint.config, layer).items():
            if isinstance(checkpoint, GGUFCheckpoint):
                bits += 8 * checkpoint._tensor(name).n_bytes
            else:
                w = checkpoint.linear(name)
                assert isinstance(w, QuantizedLinear)
                bits += n * k * 4 + w.scales.size * (16 + 4)
            weights += n * k
    return bits / weights


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--work", type=Path, required=True, help="Folder for what is made and downloaded.")
    parser.add_argument("--float", default="smollm2-135m", help="The model whose weights are the float ones.")
    parser.add_argument("--windows", type=int, default=10**9, help="Use the first N windows only.")
    parser.add_argument("--llama-python", help="A Python that imports llama_cpp, for llama.cpp's rows.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source = store.resolve(args.float)
    reference = open_checkpoint(source)
    models = {m: store.resolve(m) for m in args.models} or made(args, source)

    ids = np.asarray(reference.tokenizer().encode(held_out_text(args.work)))
    windows = torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))[: args.windows]
    print(f"{len(windows)} windows, {windows.numel() // 2} tokens scored", file=sys.stderr)
    truth, truth_head = hidden(reference, windows)
    print("| weights | bits a weight | perplexity | KL to float, 10⁻³ nats |")
    print("|---|---|---|---|")
    first = True
    for name, path in {"float": source, **models}.items():
        checkpoint = reference if first else open_checkpoint(path)
        x, head = (truth, truth_head) if first else hidden(checkpoint, windows)
        nll, kl = [], []
        for i in range(len(windows)):
            p = torch.log_softmax(truth[i] @ truth_head.T, -1)
            q = torch.log_softmax(x[i] @ head.T, -1)
            nll.append(-q.gather(1, windows[i, LENGTH // 2 :, None]).mean().item())
            kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        error = 1.96 * np.std(kl) / math.sqrt(len(kl))
        bits = "" if first else f"{bits_per_weight(checkpoint):.2f}"
        kl_text = "" if first else f"{1e3 * np.mean(kl):.1f} ± {1e3 * error:.1f}"
        print(f"| {name} | {bits} | {math.exp(np.mean(nll)):.3f} | {kl_text} |", flush=True)
        first = False


def made(args: argparse.Namespace, source: Path) -> dict[str, Path]:
    """The rows of the table, each made where `work` does not have it."""
    models = {}
    for kind, group in itertools.product(METHODS, (64, 32)):
        out = args.work / f"{kind}-g{group}"
        if not (out / "config.json").is_file():
            started = time.monotonic()
            facts = quantize(open_checkpoint(source), out, group_size=group, **METHODS[kind])
            print(json.dumps(facts | {"wall_s": round(time.monotonic() - started)}), file=sys.stderr)
        models[f"{kind.upper()} g{group}"] = out
    for kind, number in LLAMA_TYPES.items() if args.llama_python else ():
        path = args.work / f"{kind}.gguf"
        if not path.is_file():
            command = [args.llama_python, "-c", REQUANTIZE, str(source), str(path), str(number)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        models[f"llama.cpp {kind}"] = path
    return models


if __name__ == "__main__":
    main()
