"""Counts since the server began, in the text form that Prometheus reads."""

from __future__ import annotations

import time
from collections import Counter

from tinychat.base.events import Done

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
HELP = {
    "tinychat_requests_total": ("counter", "Requests by path and status."),
    "tinychat_answers_total": ("counter", "Answers by how they ended."),
    "tinychat_prompt_tokens_total": ("counter", "Tokens of prompts."),
    "tinychat_cached_tokens_total": ("counter", "Tokens of prompts that were not read again."),
    "tinychat_generated_tokens_total": ("counter", "Tokens of answers."),
    "tinychat_drafted_tokens_total": ("counter", "Tokens that were drafted."),
    "tinychat_accepted_tokens_total": ("counter", "Drafted tokens that were right."),
    "tinychat_running": ("gauge", "Answers that are being made."),
    "tinychat_waiting": ("gauge", "Answers that wait for their turn."),
    "tinychat_models_loaded": ("gauge", "Models that are loaded."),
    "tinychat_uptime_seconds": ("gauge", "Seconds since the server began."),
}


class Metrics:
    """Counters and one histogram; changed by one thread at a time, the event loop's."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._first = Counter[float]()  # seconds to the first token, by bucket
        self._first_sum, self._first_count = 0.0, 0
        self._began = time.monotonic()

    def count(self, name: str, n: int = 1, **labels: str) -> None:
        """Add to a counter."""
        inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
        self.counts[name, f"{{{inner}}}" if inner else ""] += n

    def done(self, event: Done) -> None:
        """Count an answer that has ended."""
        stats = event.stats
        self.count("tinychat_answers_total", reason=event.finish_reason)
        self.count("tinychat_prompt_tokens_total", stats.prompt_tokens)
        self.count("tinychat_cached_tokens_total", stats.cached_tokens)
        self.count("tinychat_generated_tokens_total", stats.generated_tokens)
        self.count("tinychat_drafted_tokens_total", stats.drafted_tokens)
        self.count("tinychat_accepted_tokens_total", stats.accepted_tokens)
        if stats.ttft_s:
            for bound in BUCKETS:
                self._first[bound] += stats.ttft_s <= bound
            self._first_sum += stats.ttft_s
            self._first_count += 1

    def text(self, **gauges: float) -> str:
        """Everything, with what is measured now."""
        values = {(f"tinychat_{name}", ""): value for name, value in gauges.items()}
        values["tinychat_uptime_seconds", ""] = round(time.monotonic() - self._began, 3)
        lines = []
        for name, (kind, words) in HELP.items():
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            found = {labels: v for (n, labels), v in [*self.counts.items(), *values.items()] if n == name}
            lines += [f"{name}{labels} {v}" for labels, v in sorted((found or {"": 0}).items())]
        name = "tinychat_first_token_seconds"
        lines += [f"# HELP {name} Seconds from the turn of a request to its first token."]
        lines += [f"# TYPE {name} histogram"]
        lines += [f'{name}_bucket{{le="{bound}"}} {self._first[bound]}' for bound in BUCKETS]
        lines += [f'{name}_bucket{{le="+Inf"}} {self._first_count}']
        lines += [f"{name}_sum {self._first_sum:.6f}", f"{name}_count {self._first_count}"]
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
