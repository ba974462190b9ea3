from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def text(tmp_path) -> Path:
    """A short calibration text of random bytes: the random model knows no language."""
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 6000))))
    return path
