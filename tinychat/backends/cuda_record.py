"""How kernels are run on this machine's GPU, as its self-check has found out: a file under TINYCHAT_HOME."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinychat.base import locations
from tinychat.kernels_cuda import modules
from tinychat.kernels_cuda.modules import Modules

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Variant:
    """hints: copies have cache hints where they can. overlap: kernels begin before the last one has ended."""

    hints: bool = True
    overlap: bool = True

    def apply(self, to: Modules) -> None:
        """Run kernels so; what the device cannot do it does not do."""
        to.hints = self.hints
        to.device.overlaps = to.device.overlaps and self.overlap


# The best first.
VARIANTS = (Variant(), Variant(overlap=False), Variant(hints=False), Variant(hints=False, overlap=False))


@dataclass
class Record:
    """What a self-check came to.

    key       what it holds for
    passed    whether the GPU may be trusted, with `variant`
    trials    each with its seconds, or what went wrong, in their order, of the last variant
    facts     of the GPU
    stamp     what it holds for, as far as can be seen without opening the GPU
    """

    key: str
    passed: bool
    variant: Variant = VARIANTS[0]
    trials: dict[str, float | str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    stamp: str = field(default_factory=lambda: stamp())

    def store(self) -> None:
        """Raises OSError."""
        path = locations.gpu_check_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as f:
            json.dump(asdict(self), f, indent=1)
        os.replace(f.name, path)


def key_of(on: Modules) -> str:
    """Whatever a self-check depends on: GPU, driver, compiler and kernels."""
    device = on.device
    driver = "{}.{}".format(*device.driver_version)
    return "|".join((device.name, on.target, f"driver {driver}", on.cache.compiler.name, _kernels()))


def stamp() -> str:
    """Kernels and driver, found without the driver's help: one that is new may hang when it is first used."""
    try:
        driver = DRIVER.read_text().partition("\n")[0]
    except (OSError, ValueError):
        driver = ""  # a Jetson, or WSL
    return f"{_kernels()}|{driver}"


@lru_cache
def _kernels() -> str:
    key = hashlib.sha256()
    for file in sorted((*modules.SOURCES.glob("*.cu"), *modules.SOURCES.glob("*.cuh"))):
        key.update(file.read_bytes())
    return key.hexdigest()[:16]


def stored() -> Record | None:
    """The last one, if there is one that can be read."""
    try:
        data = json.loads(locations.gpu_check_file().read_text())
        variant = Variant(**{k: bool(v) for k, v in data.pop("variant").items()})
        return Record(**{"stamp": "", **data, "variant": variant})
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def variant_for(on: Modules) -> Variant:
    """The variant that the self-check of just this GPU, driver and compiler found to work, or the best."""
    record = stored()
    return record.variant if record and record.passed and record.key == key_of(on) else VARIANTS[0]
