"""SmolLM3: Llama in which some layers do not rotate queries and keys (NoPE; arXiv 2501.18795)."""

from __future__ import annotations

from tinychat.models.llama import biases, forward, linears, load, norms

__all__ = ["biases", "forward", "linears", "load", "norms"]
