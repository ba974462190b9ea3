"""How fast this chat went: tok/s answer by answer, and what the machine could do."""

from __future__ import annotations

from typing import Any

from textual.app import ComposeResult
from textual.containers import VerticalScroll

from tinychat.conversation import Message
from tinychat.tui.host import Host
from tinychat.tui.screens.panel import PanelScreen
from tinychat.tui.text import Line, wrap
from tinychat.tui.widgets.lines import Lines
from tinychat.tui.widgets.turn import human_size, seconds

BARS = " ▁▂▃▄▅▆▇█"
HEIGHT = 6


def plot(values: list[float], width: int, height: int = HEIGHT) -> list[Line]:
    """Bars from zero, one column a value (the last `width - 8` of them), with a scale on the left."""
    values = values[-max(1, width - 8) :]
    top = max(values, default=0) or 1.0
    out: list[Line] = []
    for row in range(height, 0, -1):
        label = f"{top:6.1f} " if row == height else f"{0:6.1f} " if row == 1 else " " * 7
        cells = "".join(BARS[round(8 * min(1, max(0, v / top * height - (row - 1))))] for v in values)
        out.append([(label, "faint"), (cells, "marker")])
    return out


class StatsLines(Lines):
    """Plot and numbers."""

    def __init__(self, path: list[Message], facts: dict[str, Any]):
        super().__init__()
        self.answers = [m for m in path if m.role == "assistant" and m.stats.get("generated_tokens")]
        self.facts = facts

    def layout_lines(self, width: int) -> list[Line]:
        out: list[Line] = [[("Speed of this chat, tok/s", "heading")]]
        rates = [m.stats.get("decode_tps") or 0.0 for m in self.answers]
        out += plot(rates, width) if rates else [[("no answer yet", "faint")]]
        out.append([])
        for name, value in self._rows(rates):
            for i, piece in enumerate(wrap([(value, "")], width - 22)):
                out.append([(name.ljust(22) if not i else " " * 22, "faint"), *piece])
        return out

    def _rows(self, rates: list[float]) -> list[tuple[str, str]]:
        f = self.facts
        rows = [("model", str(f.get("model", "")))]
        rows.append(("backend", " ".join(str(f[k]) for k in ("backend", "isa") if f.get(k))))
        if not (served := f.get("server")):
            rows.append(("bits", f"activations {f.get('act_bits', '?')}, KV cache {f.get('kv_bits', '?')}"))
            rows.append(("threads", str(f.get("threads", "?"))))
        if not self.answers:
            return rows
        last = self.answers[-1].stats
        rows.append(
            ("answers", f"{len(rates)}, {sum(m.stats['generated_tokens'] for m in self.answers)} tokens")
        )
        rows.append(("last answer", f"{last.get('decode_tps', 0):.1f} tok/s, best {max(rates):.1f}"))
        prompt, cached = last.get("prompt_tokens", 0), last.get("cached_tokens", 0)
        reading = "" if served else f", {last.get('prefill_tps', 0):.0f} tok/s"
        rows.append(("last prompt", f"{prompt} tokens, {cached} of them cached{reading}"))
        rows.append(("first token", seconds(last.get("ttft_s", 0))))
        if served:
            return rows
        rows.append(("memory bandwidth", self._bandwidth(last)))
        rows.append(("KV cache", human_size(last.get("kv_bytes", 0))))
        rows.append(("engine's memory", f"{human_size(last.get('peak_rss_bytes', 0))} at its peak"))
        if last.get("evicted_tokens"):
            rows.append(("evicted", f"{last['evicted_tokens']} tokens"))
        if last.get("drafted_tokens"):
            rows.append(("drafts accepted", f"{last.get('accepted_tokens', 0)} of {last['drafted_tokens']}"))
        return rows

    def _bandwidth(self, last: dict[str, Any]) -> str:
        """Bandwidth of the last answer: a step reads the weights once, whatever it decides."""
        rate = last.get("decode_tps", 0) / (last.get("tokens_per_step") or 1)
        per_token, limit = self.facts.get("weight_bytes_per_token"), self.facts.get("read_bandwidth_gb_s")
        if not per_token or not rate:
            return "not measured yet (an answer is running?)"
        used = per_token * rate / 1e9
        if not limit:
            return f"{used:.1f} GB/s"
        why = " (some stays in the processor's cache, or the read was slowed)" if used > limit else ""
        return f"{used:.1f} GB/s, {used / limit:.0%} of the {limit:.1f} GB/s that a plain read reaches{why}"


class StatsScreen(PanelScreen[None]):
    """Esc closes."""

    app: Host

    def __init__(self, path: list[Message], facts: dict[str, Any]):
        super().__init__()
        self.path_, self.facts = path, facts

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="panel", can_focus=True):
            lines = StatsLines(self.path_, self.facts)
            lines.styles.height = "auto"
            yield lines

    def on_mount(self) -> None:
        """Have the machine's limits measured beside painting."""
        self.run_worker(self._ask())

    async def _ask(self) -> None:
        if limits := await self.app.engine.limits():
            self.facts |= limits
            self.query_one(StatsLines).refresh(layout=True)
