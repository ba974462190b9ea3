"""Lines that `show` prints of a model: its facts, and its weights by kind of module and form."""

from __future__ import annotations

from typing import Any

from tinychat.base.machine import human_bytes, human_rate

INT8 = "8-bit, groups of 32, fp16 scale"
NEAR = 0.02  # sizes that differ by less are one: padding, orders of columns


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each line but the weights'."""
    parts = f" in {facts['parts']} parts" if "parts" in facts else ""
    tied = ", tied embeddings" if facts["tied_embeddings"] else ""
    types = ", ".join(f"{name} {human_bytes(n)}" for name, n in facts.get("weights", {}).items())
    layers = f"{facts['layers']}, {facts['hidden_size']} wide, MLP {facts['intermediate_size']}"
    lines = {
        "size": human_bytes(facts["size_bytes"]) + parts,
        "weights": types or facts.get("quantization"),
        "parameters": _count(facts["parameters"]),
        "layers": layers + (f", experts {facts['experts']}" if "experts" in facts else ""),
        "heads": f"{facts['heads']}, {facts['head_dim']} wide, {facts['kv_heads']} of keys and values",
        "vocabulary": f"{facts['vocab_size']} tokens{tied}",
        "context": f"{facts['context_length']} tokens{_rope(facts)}",
        "template": "yes" if facts["chat_template"] else "no",
        "stops at": " ".join(facts["stop_tokens"]),
    }
    as_they_are = ("name", "path", "source", "pulled_at", "sha256", "license", "family")
    told = {name.replace("_", " "): str(facts[name]) for name in as_they_are if name in facts}
    if told["name"] == told["path"]:
        del told["name"]
    return [(name, value) for name, value in (told | lines).items() if value]


def weights(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Kind of module, bits a weight, bytes, form and what runs instead; and what a token reads."""
    lines = []
    for kind, forms in facts["modules"].items():
        for form, w in sorted(forms.items(), key=lambda item: -item[1]["bytes"]):
            lines.append((kind, f"{w['bits']:.3g}", human_bytes(w["bytes"]), form + _runs(form, w)))
    stored, runs = facts["token"]["stored_bytes"], facts["token"]["runs_bytes"]
    more = "" if abs(runs - stored) <= NEAR * stored else f"; {human_bytes(stored)} as stored"
    return [*lines, ("token", "", human_bytes(runs), f"read for each token{more}")]


TAKES = {
    "gpu": "the GPU, with all of it",
    "gpu and ram": "the GPU, with a part in RAM",
    "cpu": "the CPU",
    None: "nothing here",
}


def fit(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a model would take, a line each (`fitting.facts`)."""
    gpu, cpu = facts["gpu"], facts["cpu"]
    lines = [("context", f"{facts['context']} tokens, cached in {facts['kv_bits']} bits")]
    if gpu is None:
        lines.append(("GPU", "none"))
    elif "why_not" in gpu:
        lines.append(("GPU", gpu["why_not"]))
    else:
        weights, cache, work = (human_bytes(gpu[name]) for name in ("weights", "cache", "work"))
        takes = f"weights {weights}, cache {cache}, work {work}"
        lines.append(("GPU", f"{gpu['name']}: {takes}, of {human_bytes(gpu['limit'])}"))
        if gpu["away"]:
            lines.append(("RAM", f"{gpu['away']}, read over the bus"))
        lines.append(("", f"{human_rate(gpu['tokens_per_s'])} tokens a second"))
    takes = f"weights {human_bytes(cpu['weights'])}, cache {human_bytes(cpu['cache'])}"
    room = "" if cpu["fits"] else "too much: "
    lines.append(("CPU", f"{room}{takes}, of {human_bytes(cpu['free'])} that are free"))
    if cpu["fits"]:
        lines.append(("", f"{human_rate(cpu['tokens_per_s'])} tokens a second"))
    lines.append(("runs on", TAKES[facts["takes"]]))
    return lines + [("would fit", words) for words in facts["advice"]]


def _runs(form: str, w: dict[str, Any]) -> str:
    if w["runs_as"] == form and abs(w["runs_bytes"] - w["bytes"]) <= NEAR * w["bytes"]:
        return ""
    as_what = "it is" if w["runs_as"] == form else "int8" if w["runs_as"] == INT8 else w["runs_as"]
    return f"; runs {'rounded to' if w['rounded'] else 'as'} {as_what}, {human_bytes(w['runs_bytes'])}"


def _rope(facts: dict[str, Any]) -> str:
    if "rope_theta" not in facts:
        return ""
    kind = facts.get("rope_scaling", "none")
    return f", rope theta {facts['rope_theta']:g}" + ("" if kind == "none" else f", {kind} scaling")


def _count(n: int) -> str:
    """Such as "135 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
