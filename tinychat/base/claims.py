"""Claims on something that only one may use at a time."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from typing import TypeVar

G = TypeVar("G", bound=Generator)


class Claim:
    """Claim of a generator, from when it is made until the generator has ended, however that was: an
    exception in its last words, or a listener that is gone, leaves nothing claimed.
    """

    def __init__(self) -> None:
        self._generator: weakref.ref[Generator] | None = None

    def of(self, generator: G) -> G:
        """The generator whose claim this is."""
        self._generator = weakref.ref(generator)
        return generator

    @property
    def generator(self) -> Generator | None:
        """The generator, as long as it has not ended."""
        generator = None if self._generator is None else self._generator()
        # It has no frame any more once it has ended.
        return None if getattr(generator, "gi_frame", None) is None else generator
