"""What `show` says of a model: each kind of module, its form and its bytes, read from headers."""

from __future__ import annotations

import json

import pytest
import tiny_gguf
from cli_helpers import in_process
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file
from tiny import tiny_folder

from tinychat.formats import awq
from tinychat.hub import store
from tinychat.network.weights import quantize_rtn


def test_a_gguf_says_the_form_of_each_kind_of_module(tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", Kind.Q4_1)
    facts = store.show(str(tmp_path / "m.gguf"))
    form = "4-bit, groups of 32, fp16 scale and offset"
    h, f, rows = tiny_gguf.H, tiny_gguf.F, (4 + 2 + 2) * 16
    numbers = {
        "embedding": tiny_gguf.VOCAB * h,
        "attention": 2 * (rows * h + h * h),
        "mlp": 2 * 3 * h * f,
    }
    assert facts["modules"] == {kind: {form: n // 32 * 20} for kind, n in numbers.items()}
    code, out, _ = in_process("show", str(tmp_path / "m.gguf"))
    assert code == 0
    assert f"{form}: 10.4 kB" in out
    code, out, _ = in_process("show", "--json", str(tmp_path / "m.gguf"))
    assert json.loads(out)["modules"] == facts["modules"]


def test_a_type_that_has_no_words_is_called_by_its_name(tmp_path, monkeypatch):
    from tinychat.formats import gguf

    tiny_gguf.write(tmp_path / "m.gguf", Kind.Q5_0)
    monkeypatch.setattr(gguf, "FORMS", {})
    assert list(store.show(str(tmp_path / "m.gguf"))["modules"]["mlp"]) == ["Q5_0"]


@pytest.mark.parametrize("described", [True, False])
def test_a_folder_says_forms_by_its_tensors_and_settings(tmp_path, described):
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight")).removesuffix(".weight")
    w = tensors.pop(f"{name}.weight")
    parts = awq.pack(quantize_rtn(w.astype("float32"), 32))
    save_file(tensors | {f"{name}.{p}": a for p, a in parts.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if described:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    mlp = store.show(str(folder))["modules"]["mlp"]
    form = "4-bit, groups of 32, fp16 scale and zero point"
    words = form if described else "codes that config.json does not describe"
    assert mlp.pop(words) == sum(a.nbytes for a in parts.values())
    (rest,) = mlp.values()
    assert rest == sum(a.nbytes for n, a in tensors.items() if ".mlp." in n)
