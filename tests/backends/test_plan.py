"""What is said of weights without reading them is what a backend stores when it has read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gguf
from cli_helpers import in_process
from families import random_model
from family_gguf import Kind
from family_gguf import write as write_family
from tiny_gguf import write

from tinychat.backends import cpu_pack, cuda_pack
from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.plan import plan, rounded
from tinychat.base.machine import human_bytes
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.models import FAMILIES
from tinychat.network.weight_policy import WeightPolicy

ALL = Kernels.of(
    ["2", "3", "4", "5", "6", "8", "iq4_nl", "e2m1"],
    [("fp16", "none"), ("fp16", "fp16"), ("fp32", "none"), ("fp32", "fp32"), ("e8m0", "none")],
)
POLICIES = [WeightPolicy(), WeightPolicy("rtn"), WeightPolicy("none", 16)]
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4]


def stored(checkpoint: GGUFCheckpoint, policy: WeightPolicy, kernels: Kernels) -> list[ExactForm]:
    """What a backend makes of each weight, in the order of a plan."""
    cfg = checkpoint.config
    out = [policy.embedding(checkpoint, "model.embed_tokens")]
    for i in range(cfg.n_layers):
        for name in FAMILIES[cfg.family].linears(cfg, i):
            read = policy.router if name.endswith("mlp.gate") else policy.linear
            out.append(read(checkpoint, name))
    if not cfg.tie_embeddings:
        out.append(policy.embedding(checkpoint, "lm_head"))
    return [ExactForm.of(w, kernels) for w in out]


def agree(checkpoint: GGUFCheckpoint) -> None:
    for policy in POLICIES:
        for kernels in (cpu_pack.KERNELS, cuda_pack.KERNELS, ALL):
            planned = list(plan(checkpoint, policy, kernels))
            for w, exact in zip(planned, stored(checkpoint, policy, kernels), strict=True):
                k = w.shape[1]
                runs, stands = (replace(f, group=f.group or k) for f in (w.runs, exact.form))
                assert (runs, w.shape) == (stands, exact.shape)
                assert w.runs_bytes == exact.form.n_bytes(*exact.shape)
                by_policy = w.form.is_float and not exact.form.is_float
                assert w.rounded == (exact.rounded or by_policy)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_what_is_planned_is_what_is_stored(kind, tmp_path):
    write(tmp_path / "m.gguf", kind)
    agree(GGUFCheckpoint(tmp_path / "m.gguf"))


@pytest.mark.parametrize("floats", [True, False])
def test_a_router_and_a_head_of_their_own_too(floats, tmp_path):
    hf = random_model("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=1, num_hidden_layers=1)
    write_family(tmp_path / "m.gguf", hf, "llama", lambda name: None if floats else Kind.Q4_1)
    agree(GGUFCheckpoint(tmp_path / "m.gguf"))


def test_a_first_load_says_what_is_rounded_for_want_of_kernels(tmp_path: Path, monkeypatch):
    """The i-quants of one to three bits have no words: they are read as floats and run as int8."""
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tinychat.formats.gguf.FORMS", {})
    monkeypatch.setattr("tinychat.formats.gguf.UNPACK", {})
    write(tmp_path / "m.gguf", Kind.Q5_0)
    command = ("run", str(tmp_path / "m.gguf"), "hi", "--max-tokens", "1", "--device", "cpu", "--no-store")
    code, _, err = in_process(*command)
    assert code == 0
    (line,) = [line for line in err.splitlines() if "rounded" in line]
    n = tiny_gguf.VOCAB * tiny_gguf.H + 2 * (144 * 64 + 48 * 64 + 3 * tiny_gguf.H * tiny_gguf.F)
    sizes = f"{human_bytes(n // 32 * 22)} of weights run rounded to 8 bits ({human_bytes(n // 32 * 34)})"
    assert line.startswith(sizes)
    assert line.endswith("for want of kernels that read Q5_0")
    assert "rounded" not in in_process(*command)[2]  # the pack is there
    monkeypatch.undo()
    write(tmp_path / "f.gguf", Kind.F16)
    assert rounded(GGUFCheckpoint(tmp_path / "f.gguf"), WeightPolicy(), cpu_pack.KERNELS) is None
