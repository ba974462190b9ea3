"""Networks: one short file an architecture family, written in the verbs of `tinychat.ops`."""

from __future__ import annotations

from types import ModuleType

from tinychat.models import llama

FAMILIES: dict[str, ModuleType] = {"llama": llama}
