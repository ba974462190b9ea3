"""Values of options."""

from __future__ import annotations

import click
import pytest


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("500MB", 500_000_000),
        ("4 gb", 4_000_000_000),
        ("1.5GiB", 3 << 29),
        ("10k", 10_000),
        ("7b", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    from tinychat.cli.options import Size

    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "4 apples", "1e9", "ib", "5ib"])
def test_what_is_not_a_size_is_refused(text):
    from tinychat.cli.options import Size

    with pytest.raises(click.UsageError, match="is not a size"):
        Size().convert(text, None, None)
