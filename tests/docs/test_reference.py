"""The Python reference says what the docstrings say, and leaves out nothing that is public."""

from __future__ import annotations

import re

import reference
from documents import REPOSITORY

import tinychat


def test_the_reference_is_up_to_date():
    page = (REPOSITORY / reference.PAGE).read_text(encoding="utf-8")
    assert page == reference.page(), "python docs/make/reference.py writes it anew"


def test_every_public_name_has_an_entry():
    entries = set(re.findall(r"^### (\w+)$", reference.page(), re.MULTILINE))
    assert set(tinychat.__all__) - entries == {"Event", "__version__"}  # a union, which a sentence explains


def test_methods_of_bases_and_their_keywords_are_there():
    page = reference.page()
    assert "#### Session.asend\n\n```python\nasend(\n    text: str,\n    *,\n" in page
    assert "**sampling: Unpack[SamplingKeywords],\n) -> Aside[Event]\n```\n\n`send` for coroutines.\n" in page
    assert "#### Session.tree\n\n```python\ntree: Tree\n```" in page


def test_what_is_left_out_exists():
    """A name that is gone or renamed is not left out in silence."""
    for name, members in reference.INSIDE.items():
        (thing,) = (
            t for _, _, names in reference.PARTS for t in map(reference._object, names) if t.__name__ == name
        )
        assert members <= {member for member, _ in reference._members(thing)}, name
