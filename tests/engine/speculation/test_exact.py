"""The demo model says the same with and without a draft, whatever else is on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "speculation_exact.py"


@pytest.mark.parametrize("prompts", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_prompts_have_the_same_ids_with_speculation(prompts, demo_gguf):
    command = [sys.executable, SCRIPT, "--model", demo_gguf, "--prompts", prompts, "--tokens", "128"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["different"] == []
    assert done.returncode == 0
    assert result["accepted_tokens"] > 8 * prompts
    assert result["evicted_tokens"] > 8 * prompts
