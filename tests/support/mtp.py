"""Models with a layer that predicts further: Qwen's `mtp`, out of transformers' own modules."""

from __future__ import annotations

import json

import numpy as np
import torch
from families import CASES, random_model
from safetensors.torch import save_file
from tiny import byte_tokenizer

MODULES = {
    "Qwen3_5ForCausalLM": "qwen3_5.modeling_qwen3_5.Qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5Moe",
    "Qwen3NextForCausalLM": "qwen3_next.modeling_qwen3_next.Qwen3Next",
}


class Mtp(torch.nn.Module):
    """The layer as vLLM and llama.cpp run it: hidden states are those behind the model's last norm."""

    def __init__(self, hf):
        super().__init__()
        import importlib

        path, _, name = MODULES[type(hf).__name__].rpartition(".")
        module = importlib.import_module(f"transformers.models.{path}")
        norm, c = getattr(module, f"{name}RMSNorm"), hf.config
        attends = max(i for i, kind in enumerate(c.layer_types) if kind == "full_attention")
        self.fc = torch.nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.pre_fc_norm_embedding = norm(c.hidden_size, eps=c.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(c.hidden_size, eps=c.rms_norm_eps)
        self.norm = norm(c.hidden_size, eps=c.rms_norm_eps)
        self.layers = torch.nn.ModuleList([getattr(module, f"{name}DecoderLayer")(c, attends)])
        for parameter, p in self.named_parameters():
            if "norm" in parameter:
                torch.nn.init.uniform_(p, -0.5, 0.5)
            else:
                torch.nn.init.normal_(p, 0, 1.2 * p.shape[-1] ** -0.5)

    @torch.inference_mode()
    def run(self, hf, ids, hidden):
        """Its own hidden states and the logits: hidden[i] is what stands beside the embedding of ids[i]."""
        at, n = torch.arange(len(ids))[None], len(ids)
        x = hf.model.embed_tokens(torch.tensor([list(map(int, ids))]))
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(x), self.pre_fc_norm_hidden(hidden[None])], -1))
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        x = self.layers[0](x, position_embeddings=hf.model.rotary_emb(x, at), attention_mask=mask)
        x = self.norm(x[0] if isinstance(x, tuple) else x)
        return x[0], hf.lm_head(x)[0].numpy()


def model_with_mtp(case: str):
    """(transformers' model, its layer)."""
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    torch.manual_seed(1)
    return hf, Mtp(hf).float().eval()


@torch.inference_mode()
def guesses(hf, mtp, ids, k) -> np.ndarray:
    """Logits of the last of `ids` and of k - 1 further rows, each of the token before's argmax."""
    states = hf.model(torch.tensor([list(map(int, ids[:-1]))])).last_hidden_state[0]
    hidden, ids, out = torch.cat([torch.zeros(1, states.shape[1]), states]), list(ids), []
    for _ in range(k):
        own, logits = mtp.run(hf, ids, hidden)
        out.append(logits[-1])
        ids.append(int(logits[-1].argmax()))
        hidden = torch.cat([hidden, own[-1:]])
    return np.stack(out)


def save_with_mtp(folder, hf, mtp, damage: str = "") -> None:
    """The folder, with the layer's tensors as Qwen has them; damage: what is wrong with them."""
    hf.save_pretrained(folder)
    byte_tokenizer().save(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"mtp_num_hidden_layers": 1}))
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    state |= {f"mtp.{name}": t.contiguous() for name, t in mtp.state_dict().items()}
    if damage == "fc":
        del state["mtp.fc.weight"]
    elif damage == "a second layer":
        state |= {n.replace("layers.0", "layers.1"): t.clone() for n, t in state.items() if "mtp.layers" in n}
    elif damage == "a head of its own":
        state["mtp.lm_head.weight"] = hf.lm_head.weight.detach().clone()
    save_file(state, folder / "model.safetensors")
