"""Makes what the documents show: tables of facts, what commands answer, and pictures of the screen.

python docs/make                  everything
python docs/make which-model      docs/which-model.md
python docs/make reference        docs/reference.md, from docstrings and types
python docs/make transcripts      what follows each command under a mark <!-- transcript -->
python docs/make pictures         docs/tui.svg, docs/tree.svg; --model NAME: by another model than the demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import documents
import reference
import screenshots
import transcripts
import which_model

PARTS = ("which-model", "reference", "transcripts", "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--model", default="smollm2-135m", help="Who answers in the pictures.")
    chosen = parser.parse_args()
    parts = chosen.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for part, maker in (("which-model", which_model), ("reference", reference)):
        if part in parts:
            (documents.REPOSITORY / maker.PAGE).write_text(maker.page(), encoding="utf-8")
    if "transcripts" in parts:
        for page, text in documents.pages().items():
            if (made := transcripts.remade(text)) != text:
                (documents.REPOSITORY / page).write_text(made, encoding="utf-8")
    if "pictures" in parts:
        screenshots.make(documents.REPOSITORY / "docs", chosen.model)


if __name__ == "__main__":
    main()
