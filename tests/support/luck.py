"""Bad luck: TINYCHAT_TEST_LUCK=1 ends answers that have no seed with three of ten tokens. A test that fails
then depends on what a random model happens to say; some are about just that (`test_sampling_flags_…`).
"""

from __future__ import annotations

import random

from tinychat.engine.generation import Generation


def install() -> None:
    """From now on, in this process."""
    chosen = Generation._choose

    def choose(self: Generation, *given, **also) -> int:
        token, ends = chosen(self, *given, **also), sorted(self.engine.tokenizer.eos_ids)
        free = self.params.seed is None and self.params.temperature > 0 and self.guide is None
        return ends[0] if free and ends and random.random() < 0.3 else token

    Generation._choose = choose  # type: ignore[method-assign]
