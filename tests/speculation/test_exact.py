"""The demo model says the same with and without a draft, whatever else is on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "speculation_exact.py"


def test_24_prompts_have_the_same_ids_with_speculation(demo_gguf):
    command = [sys.executable, str(SCRIPT), "--model", str(demo_gguf), "--prompts", "24", "--tokens", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["different"] == []
    assert done.returncode == 0
    assert result["accepted_tokens"] > 200
    assert result["evicted_tokens"] > 200
