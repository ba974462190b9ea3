"""The forms of llama.cpp's files: bytes that tinychat reads of each, what it computes, and both perplexities.

    python benchmarks/forms.py table --work DIR --llama-python PY [TYPE...]
    python benchmarks/forms.py perplexity --work DIR --llama-python PY MODEL.gguf... [--types Q4_K_M,Q6_K]

PY: a Python that has llama-cpp-python, which quantizes (and computes, to be compared with).

`table`: a small Llama of random weights in each type. Bytes: of the weights that decoding a token reads, as
tinychat stores them, against those of the file. Error: the worst row of 64, |logits - truth| / |truth|, where
truth is fp32 arithmetic on the weights that the gguf package reads from the file.

`perplexity`: real models, requantized to each type; docutils' specification as in quality.py, windows of 512
tokens, the second half of each scored, the same ids on both sides. llama.cpp runs each file twice: as it is,
where it rounds the inputs of every product to 8 bits, and with the same weights opened to fp32, where it
rounds nothing. Every other column is compared with the latter, with the 95 % interval over windows. The last
one is fp32 arithmetic with inputs rounded as llama.cpp rounds them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

import tinychat
from tinychat.bench import forms_per_token
from tinychat.engine.sampling import log_softmax
from tinychat.formats import open_checkpoint
from tinychat.network.weight_policy import WeightPolicy

HERE = Path(__file__).parent
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, TOKENS = 512, 1536, 4, 8, 4, 2048, 64

# Name → llama.cpp's number of the kind of file, or of the type for all weights of the blocks
FILES = {
    **{"Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7},
    **{"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16},
    **{"Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37},
    **{"IQ3_XXS": 23, "IQ3_S": 26, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ1_S": 24, "IQ1_M": 31},
}
BLOCKS = {"MXFP4": 39}
REAL = ("Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")

# Arguments: source, destination, kind of file, type of the blocks' weights (or -1), and the weights whose
# inputs all matter alike, as JSON {name: inputs}: some types are refused without such a matrix
QUANTIZE = """
import ctypes, json, sys
import llama_cpp as l
p = l.llama_model_quantize_default_params()
p.allow_requantize, p.ftype, p.nthread = True, int(sys.argv[3]), 2
if int(sys.argv[4]) >= 0:
    some = (l.llama_model_tensor_override * 2)()
    some[0].pattern, some[0].type = rb"blk\\..*", int(sys.argv[4])
    p.tt_overrides = some
inputs = json.loads(sys.argv[5])
if inputs:
    matter = (l.llama_model_imatrix_data * (len(inputs) + 1))()
    for one, (name, n) in zip(matter, inputs.items()):
        one.name, one.size, one.data = name.encode(), n, (ctypes.c_float * n)(*[1.0] * n)
    p.imatrix = matter
sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def random_weights() -> dict[str, np.ndarray]:
    """A Llama of normal weights, by GGUF's names, float32."""
    rng = np.random.default_rng(0)
    kv = KV_HEADS * HIDDEN // HEADS
    block = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    shapes = {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    shapes |= {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    weights = {
        f"{name}.weight": rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    norms = [f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm")]
    return weights | {f"{norm}.weight": np.ones(HIDDEN, np.float32) for norm in [*norms, "output_norm"]}


def write(path: Path, weights: dict[str, np.ndarray]) -> None:
    """The Llama with these weights as a GGUF of fp32, with a vocabulary of bytes."""
    w = GGUFWriter(path, "llama")
    w.add_block_count(LAYERS)
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(HIDDEN // HEADS)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    letters = [chr(c) for c in range(0x21, 0x7F)]
    tokens = letters + [f"[{i}]" for i in range(VOCAB - len(letters))]
    w.add_token_list(tokens)
    w.add_token_types([1] * len(letters) + [5] * (VOCAB - len(letters)))
    w.add_token_merges(["a b"])
    w.add_eos_token_id(VOCAB - 1)
    for name, weight in weights.items():
        w.add_tensor(name, weight)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def quantized(o: argparse.Namespace, source: Path, kind: str) -> Path:
    """The source in that kind, made by llama.cpp in `work` if it is not there."""
    out = o.work / f"{source.stem}.{kind}.gguf"
    if not out.exists():
        file, blocks = (FILES["Q8_0"], BLOCKS[kind]) if kind in BLOCKS else (FILES[kind], -1)
        tensors = GGUFReader(source).tensors if kind.startswith(("IQ1", "IQ2", "IQ3")) else ()
        inputs = {t.name: int(t.shape[0]) for t in tensors if len(t.shape) == 2}
        command = [
            o.llama_python,
            "-c",
            QUANTIZE,
            str(source),
            str(out),
            str(file),
            str(blocks),
            json.dumps(inputs),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            out.unlink(missing_ok=True)
            raise SystemExit(f"llama.cpp could not make {out.name}: {done.stderr.strip()[-300:]}")
    return out


def of_llama_cpp(o: argparse.Namespace, path: Path, windows: np.ndarray, what: str) -> np.ndarray:
    """What llama.cpp computes of windows of ids (see llama_cpp_logits.py)."""
    given, out = o.work / "windows.npy", o.work / "out.npy"
    np.save(given, windows.astype(np.int32))
    command = [o.llama_python, str(HERE / "llama_cpp_logits.py"), str(path), str(given), str(out), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp could not run {path.name}: {done.stderr.strip()[-300:]}")
    return np.load(out)


def worst(logits: np.ndarray, truth: np.ndarray) -> float:
    """Largest |row - true row| / |true row|."""
    return float((np.linalg.norm(logits - truth, axis=1) / np.linalg.norm(truth, axis=1)).max())


def row_of(o: argparse.Namespace, source: Path, kind: str) -> str:
    """A type's line of the table."""
    path = quantized(o, source, kind)
    tensors = GGUFReader(path).tensors
    read = [t for t in tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
    in_file = sum(int(t.n_bytes) for t in read)
    types = sorted({GGMLQuantizationType(t.tensor_type).name for t in read})
    forms = forms_per_token(open_checkpoint(path), WeightPolicy())
    exact = o.work / f"{path.stem}.fp32.gguf"
    write(exact, {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in tensors})
    ids = np.random.default_rng(1).integers(0, VOCAB - 1, TOKENS)
    with tinychat.load(str(exact), device="reference", quantize="none", head_bits=16) as m:
        truth = m.logits(ids.tolist())
    exact.unlink()
    errors = []
    for bits in (16, 8):
        with tinychat.load(str(path), device="cpu", act_bits=bits) as m:
            errors.append(worst(m.logits(ids.tolist()), truth))
    errors.append(worst(of_llama_cpp(o, path, ids[None], "logits")[0], truth))
    rounded = ", rounded to int8" if any(f.rounded for f in forms) else ""
    return (
        f"| {kind} | {', '.join(types)}{rounded} | {in_file / 1e6:.2f} MB "
        f"| {sum(f.bytes for f in forms) / in_file:.3f} | " + " | ".join(f"{e:.2%}" for e in errors) + " |"
    )


def table(o: argparse.Namespace) -> None:
    """Bytes and error of each type."""
    source = o.work / "random.gguf"
    write(source, random_weights())
    print("| file | types | bytes a token | ours ÷ it | error, 16-bit activations | 8-bit | llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    for kind in o.names or [*FILES, *BLOCKS]:
        print(row_of(o, source, kind), flush=True)


def windows_of(o: argparse.Namespace, path: Path) -> np.ndarray:
    """int32 [windows, 512] of the text, each behind the token that begins texts, if the model has one."""
    from quality import LENGTH, held_out_text

    tokenizer = open_checkpoint(path).tokenizer()
    ids = np.asarray(tokenizer.encode(held_out_text(o.work)))
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    each = LENGTH - len(first)
    rows = ids[: len(ids) // each * each].reshape(-1, each)[: o.windows]
    return np.concatenate([np.tile(np.asarray(first, int), (len(rows), 1)), rows], axis=1)


def nll_of(path: Path, windows: np.ndarray, **how: object) -> np.ndarray:
    """Mean negative log-probability of each window's second half, float64 [windows]."""
    half, means = windows.shape[1] // 2, []
    with tinychat.load(str(path), ctx=windows.shape[1], **how) as m:
        for window in windows:
            log_p = log_softmax(m.logits(window.tolist())[half - 1 : -1])
            means.append(-log_p[np.arange(half), window[half:]].mean())
    return np.array(means)


def opened(path: Path) -> Path:
    """The same model with its weights in fp32, beside it."""
    out = path.with_suffix(".fp32.gguf")
    reader = GGUFReader(path)
    writer = GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        part = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], part)
    for t in reader.tensors:
        writer.add_tensor(t.name, dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@contextmanager
def inputs_rounded() -> Iterator[None]:
    """Let the reference backend round the inputs of every product as llama.cpp does on CPUs: to int8, by 256
    for weights in superblocks of 256 (Q8_K), which it uses where they divide the inputs, else by 32 (Q8_0).
    """
    import torch

    from tinychat.backends.reference import ReferenceBackend

    def rounded(x: torch.Tensor) -> torch.Tensor:
        wide = x.shape[-1] % 256 == 0
        groups = x.unflatten(-1, (-1, 256 if wide else 32))
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((groups / scale).round() * (scale if wide else scale.half().float())).flatten(-2)

    def behind(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda self, x, *args, **more: product(self, rounded(x), *args, **more)

    plain = {name: getattr(ReferenceBackend, name) for name in ("linear", "lm_head")}
    for name, product in plain.items():
        setattr(ReferenceBackend, name, behind(product))
    try:
        yield
    finally:
        for name, product in plain.items():
            setattr(ReferenceBackend, name, product)


def against(nll: np.ndarray, truth: np.ndarray) -> str:
    """A perplexity, and how far it is from another one on the same windows."""
    d = nll - truth
    off = 1.96 * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
    return f"{np.exp(nll.mean()):.4f} ({np.expm1(d.mean()):+.3%} ± {off:.3%})"


def perplexity(o: argparse.Namespace) -> None:
    """All perplexities of each model in each type."""
    print("| model | type | llama.cpp, fp32 | llama.cpp | fp32 | 16-bit inputs | 8-bit | fp32, its inputs |")
    print("|---|---|---|---|---|---|---|---|")
    reference = {"device": "reference", "head_bits": 16}
    for source in map(Path, o.names):
        windows = windows_of(o, source)
        print(f"{source.name}: {len(windows)} windows", file=sys.stderr)
        for kind in o.types.split(","):
            path = quantized(o, source, kind)
            wide = opened(path)
            truth = of_llama_cpp(o, wide, windows, "nll")
            wide.unlink()
            cells = [f"{np.exp(truth.mean()):.4f}", against(of_llama_cpp(o, path, windows, "nll"), truth)]
            for how in (reference, {"device": "cpu", "act_bits": 16}, {"device": "cpu", "act_bits": 8}):
                cells.append(against(nll_of(path, windows, **how), truth))
            with inputs_rounded():
                cells.append(against(nll_of(path, windows, **reference), truth))
            print(f"| {source.stem} | {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Parse and measure."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=["table", "perplexity"])
    p.add_argument("names", nargs="*", help="table: types (all). perplexity: GGUFs")
    p.add_argument("--work", type=Path, required=True, help="folder for what is made")
    p.add_argument("--llama-python", required=True)
    p.add_argument("--types", default=",".join(REAL))
    p.add_argument("--windows", type=int, default=19)
    o = p.parse_intermixed_args()
    o.work.mkdir(parents=True, exist_ok=True)
    {"table": table, "perplexity": perplexity}[o.what](o)


if __name__ == "__main__":
    main()
