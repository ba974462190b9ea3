"""What quantization costs: perplexity on held-out technical English, the table of docs/quality.md.

    python benchmarks/quality.py --work DIR                      # make and measure every row but llama.cpp's
    python benchmarks/quality.py --work DIR --llama-python PY    # PY: a Python that has llama-cpp-python
    python benchmarks/quality.py --work DIR MODEL...             # these only: folders, .gguf files, aliases
    python benchmarks/quality.py --work DIR --w8a8               # 8-bit weights and activations instead
    python benchmarks/quality.py --work DIR --forms              # round to nearest in other forms instead

Text: the reStructuredText specification, from docutils 0.21.2's source distribution (public domain, 119 kB,
downloaded from PyPI by hash). Windows of 512 tokens, one behind the other; the second half of each is scored,
so every scored token has 256 tokens of context at least. Weights are dequantized and run in float32 with
torch, so the figures are of the weights alone. KL: mean over scored tokens of KL(float ‖ quantized), with
the 95 % interval over windows.

--w8a8: weights are rounded to int8 with one scale a row, and activations by their definition: with one scale
for each token, as compressed-tensors' `int-quantized` promises, or for each 32 inputs, as our kernels have
it. "loud": the same function with activation outliers, made by an exact rescaling: in every norm one channel
in 500 is 50 times as large, and the columns that read it are 50 times smaller.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tinychat.formats import open_checkpoint
from tinychat.formats.gguf_metadata import architecture, tensor_name
from tinychat.hub import store
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.weight_form import TABLES
from tinychat.network.weights import DenseLinear
from tinychat.quantize import calibration, quantize
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.grids import Symmetric
from tinychat.quantize.rounding import nearest
from tinychat.quantize.smooth import per_token

SDIST = "docutils==0.21.2"
SHA256 = "3a6b18732edf182daa3cd12775bbb338cf5691468f91eeeb109deff6ebfa986f"
FILES = ("docs/ref/rst/restructuredtext.txt",)
LENGTH = 512
METHODS = {
    "awq": {"method": "awq"},
    "awq-tuned": {"method": "awq", "tune": True},
    "gptq": {"method": "gptq", "ranges": "whole"},
    "gptq-act-order": {"method": "gptq", "ranges": "whole", "act_order": True},
    "rtn": {"method": "rtn", "ranges": "whole"},
    "rtn-searched": {"method": "rtn"},
}
ROWS = {  # name of the row → what is asked for
    f"{kind}-{bits}-bits-g{group}": wishes | {"bits": bits, "group_size": group}
    for bits, groups in ((4, (64, 32)), (3, (64,)), (2, (64,)), (8, (64,)))
    for kind, wishes in METHODS.items()
    for group in groups
    if bits == 4 or kind in ("awq", "rtn")
} | {"Q4_K.gguf": {"method": "awq"}}
LLAMA_TYPES = {"Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2}
REQUANTIZE = """
import ctypes, sys, llama_cpp, numpy
from llama_cpp.llama_cpp import llama_model_imatrix_data
p = llama_cpp.llama_model_quantize_default_params()
p.allow_requantize, p.ftype = True, int(sys.argv[3])
if len(sys.argv) > 4:
    squares = {name: a.astype(numpy.float32) for name, a in numpy.load(sys.argv[4]).items()}
    p.imatrix = entries = (llama_model_imatrix_data * (len(squares) + 1))()
    for entry, (name, a) in zip(entries, squares.items()):
        entry.name, entry.size = name.encode(), a.size
        entry.data = a.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
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


Round = Callable[[torch.Tensor], torch.Tensor]


def hidden(
    checkpoint: Checkpoint, windows: torch.Tensor, rounded: Round | None = None, weights: Round | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states that predict each window's second half [W, L/2, H], and the head [vocab, H].
    rounded, weights: what becomes of activations […, in] and of linears [out, in].
    """
    embedding = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
    f = Forward(checkpoint.config, rounded)
    x = f.embed(embedding, windows)
    for layer in range(checkpoint.config.n_layers):
        w = read_block(checkpoint, layer)
        if weights is not None:
            w.linear = {name: weights(v) for name, v in w.linear.items()}
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
                bits += 8 * w.form.n_bytes(n, k)
            weights += n * k
    return bits / weights


def scores(
    truth: torch.Tensor, truth_head: torch.Tensor, x: torch.Tensor, head: torch.Tensor, windows: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Of each window the mean of −log p of the scored tokens, and of KL(float ‖ quantized)."""
    nll, kl = [], []
    for i in range(len(windows)):
        p = torch.log_softmax(truth[i] @ truth_head.T, -1)
        q = torch.log_softmax(x[i] @ head.T, -1)
        nll.append(-q.gather(1, windows[i, LENGTH // 2 :, None]).mean().item())
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    return nll, kl


class Loud:
    """A checkpoint that computes the same with activation outliers."""

    EVERY, BY = 500, np.float32(50)

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.json = None

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def fingerprint(self, tell=None) -> str:
        return "loud " + self._checkpoint.fingerprint(tell)

    def vector(self, name: str) -> np.ndarray:
        v = self._checkpoint.vector(name).copy()
        if name.endswith(("input_layernorm", "post_attention_layernorm")):
            v[:: self.EVERY] *= self.BY
        return v

    def linear(self, name: str) -> DenseLinear:
        w = self._checkpoint.linear(name)
        weight = w.dequantize()
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            weight[:, :: self.EVERY] /= self.BY
        return DenseLinear(weight, w.bias)


def by_32(x: torch.Tensor) -> torch.Tensor:
    """Activations as our kernels round them to int8: one scale for each 32 inputs."""
    return per_token(x.unflatten(-1, (-1, 32))).flatten(-2)


def by_row(w: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] rounded to int8 with one scale a row."""
    return nearest(w, Symmetric(8, w.shape[1], cropped=True)).dequantize()


def w8a8(work: Path, source: Path, windows: torch.Tensor) -> None:
    """Print the rows of W8A8, as the model is and with outliers."""
    print("| weights and activations | activations' scales | perplexity | of float | KL, 10⁻³ nats |")
    print("|---|---|---|---|---|")
    for kind in ("", "loud, "):
        float_model = open_checkpoint(source)
        float_model = Loud(float_model) if kind else float_model
        out = work / f"smoothquant{'-loud' if kind else ''}"
        if not (out / "config.json").is_file():
            print(json.dumps(quantize(float_model, out, method="smoothquant")), file=sys.stderr)
        smooth, base, truth = open_checkpoint(out), 0.0, None
        for name, checkpoint, weights, rounded, scales in (
            ("float", float_model, None, None, ""),
            ("plain W8A8", float_model, by_row, per_token, "a token"),
            ("SmoothQuant", smooth, None, per_token, "a token"),
            ("plain W8A8", float_model, by_row, by_32, "32 inputs"),
            ("SmoothQuant", smooth, None, by_32, "32 inputs"),
        ):
            x, head = hidden(checkpoint, windows, rounded, weights)
            truth = (x, head) if truth is None else truth
            nll, kl = scores(*truth, x, head, windows)
            perplexity = math.exp(np.mean(nll))
            base = base or perplexity
            change = f"{100 * (perplexity / base - 1):+.2f} %" if rounded else ""
            print(
                f"| {kind}{name} | {scales} | {perplexity:.3f} | {change} | {1e3 * np.mean(kl):.1f} |",
                flush=True,
            )


def by_table(w: torch.Tensor, table: str, group: int, scale: str) -> torch.Tensor:
    """A weight [out, in] rounded to the nearest values of a table times the scale of its group, which puts
    the largest weight on the largest value: float16; or a power of two as OCP has it ("e8m0"); or e4m3 times
    one float for all ("e4m3").
    """
    levels = torch.from_numpy(np.unique(TABLES[table][np.isfinite(TABLES[table])]))
    groups = w.view(len(w), -1, group or w.shape[1])
    size = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    top = levels.abs().max()
    if scale == "e8m0":
        step = torch.exp2(torch.floor(torch.log2(size)) - torch.floor(torch.log2(top)))
    elif scale == "e4m3":
        whole = size.max() / top / 448
        step = (size / top / whole).to(torch.float8_e4m3fn).float() * whole
    else:
        step = (size / top).half().float()
    middle = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(groups / step, middle)] * step).view_as(w)


FORMS = {
    "NF4, 64 inputs": ("nf4", 64, "fp16", 4 + 16 / 64),
    "MXFP4, 32 inputs": ("e2m1", 32, "e8m0", 4 + 8 / 32),
    "NVFP4, 16 inputs": ("e2m1", 16, "e4m3", 4 + 8 / 16),
    "IQ4_NL, 32 inputs": ("iq4_nl", 32, "fp16", 4 + 16 / 32),
    "FP8 e4m3, a row": ("e4m3", 0, "fp16", 8.03),
}


def forms(source: Path, windows: torch.Tensor) -> None:
    """Print what rounding to nearest costs in forms that no row of the other table has."""
    checkpoint = open_checkpoint(source)
    truth, head = hidden(checkpoint, windows)
    print("| round to nearest | bits a weight | perplexity | KL to float, 10⁻³ nats |")
    print("|---|---|---|---|")
    for name, (*form, bits) in FORMS.items():
        x, _ = hidden(checkpoint, windows, weights=lambda w, form=form: by_table(w, *form))
        nll, kl = scores(truth, head, x, head, windows)
        print(f"| {name} | {bits:.2f} | {math.exp(np.mean(nll)):.3f} | {1e3 * np.mean(kl):.1f} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--work", type=Path, required=True, help="Folder for what is made and downloaded.")
    parser.add_argument("--float", default="smollm2-135m", help="The model whose weights are the float ones.")
    parser.add_argument("--windows", type=int, default=10**9, help="Use the first N windows only.")
    parser.add_argument("--llama-python", help="A Python that imports llama_cpp, for llama.cpp's rows.")
    parser.add_argument("--w8a8", action="store_true", help="Rows of 8-bit weights and activations.")
    parser.add_argument("--forms", action="store_true", help="Rows of other forms, rounded to nearest.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source = store.resolve(args.float)
    reference = open_checkpoint(source)
    ids = np.asarray(reference.tokenizer().encode(held_out_text(args.work)))
    windows = torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))[: args.windows]
    print(f"{len(windows)} windows, {windows.numel() // 2} tokens scored", file=sys.stderr)
    if args.w8a8 or args.forms:
        w8a8(args.work, source, windows) if args.w8a8 else forms(source, windows)
        return
    models = {m: store.resolve(m) for m in args.models} or made(args, source)
    truth, truth_head = hidden(reference, windows)
    print("| weights | bits a weight | perplexity | KL to float, 10⁻³ nats |")
    print("|---|---|---|---|")
    first = True
    for name, path in {"float": source, **models}.items():
        checkpoint = reference if first else open_checkpoint(path)
        x, head = (truth, truth_head) if first else hidden(checkpoint, windows)
        nll, kl = scores(truth, truth_head, x, head, windows)
        error = 1.96 * np.std(kl) / math.sqrt(len(kl))
        bits = "" if first else f"{bits_per_weight(checkpoint):.2f}"
        kl_text = "" if first else f"{1e3 * np.mean(kl):.1f} ± {1e3 * error:.1f}"
        print(f"| {name} | {bits} | {math.exp(np.mean(nll)):.3f} | {kl_text} |", flush=True)
        first = False


def made(args: argparse.Namespace, source: Path) -> dict[str, Path]:
    """The rows of the table, each made where `work` does not have it."""
    models = {}
    for name, wishes in ROWS.items():
        out = args.work / name
        if not (out.is_file() or (out / "config.json").is_file()):
            print(json.dumps(quantize(open_checkpoint(source), out, **wishes)), file=sys.stderr)
        models[name.replace("-", " ")] = out
    importance = args.work / "importance.npz"
    if args.llama_python and not importance.is_file():
        np.savez(importance, **mean_squares(open_checkpoint(source)))
    for kind, number in LLAMA_TYPES.items() if args.llama_python else ():
        for matrix in ([], [str(importance)]):
            path = args.work / f"llama-{kind}{'-importance' * len(matrix)}.gguf"
            if not path.is_file():
                command = [args.llama_python, "-c", REQUANTIZE, str(source), str(path), str(number), *matrix]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            models[f"llama.cpp {kind}" + ", importance matrix" * len(matrix)] = path
    return models


def mean_squares(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """llama.cpp's importance matrix: the mean square of each input over the calibration text, by tensor."""
    f, found = Forward(checkpoint.config), {}
    windows = calibration.windows(checkpoint.tokenizer())
    embedding = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
    x = f.embed(embedding, torch.from_numpy(windows))
    _, form = architecture(checkpoint.config)
    for layer in range(checkpoint.config.n_layers):
        for name, squares in f.mean_squares(x, read_block(checkpoint, layer)).items():
            found[tensor_name(form, f"model.layers.{layer}.{name}") + ".weight"] = squares.numpy()
    return found


if __name__ == "__main__":
    main()
