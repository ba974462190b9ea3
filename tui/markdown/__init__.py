"""Markdown as it streams in: what is complete is laid out once and never again.

`document.py` takes text in pieces and seals what is complete, `blocks.py` turns the parser's tokens into
leaves (`formulas.py` keeps formulas as they are), `leaves.py` lays those out at a width, `highlight.py`
colours code.
"""

from tinychat.tui.markdown.blocks import parse
from tinychat.tui.markdown.document import Document
from tinychat.tui.markdown.highlight import highlight
from tinychat.tui.markdown.leaves import Code, Leaf, Paragraph, Rule, Table

__all__ = ["Code", "Document", "Leaf", "Paragraph", "Rule", "Table", "highlight", "warm_up"]


def warm_up() -> None:
    """Load the parser and the highlighter, which takes a moment the first time."""
    parse("*a*")
    highlight("a", "python")
