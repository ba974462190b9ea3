"""Links of README.md and docs/ lead somewhere."""

from __future__ import annotations

from documents import REPOSITORY, anchors, links, pages


def test_links_and_pictures_lead_to_files_and_headings_that_are_there():
    shown, wrong, n = pages(), [], 0
    for page, text in shown.items():
        for target in links(text):
            file, _, heading = target.partition("#")
            path = (REPOSITORY / page).parent / file if file else REPOSITORY / page
            n += 1
            if not path.exists():
                wrong.append(f"{page}: {target}: there is no such file")
            elif heading and heading not in anchors(path.read_text(encoding="utf-8")):
                wrong.append(f"{page}: {target}: there is no such heading")
    assert n > 20, "the links were not found"
    assert not wrong, "\n".join(wrong)


def test_every_page_is_linked_to():
    """A page that nothing leads to is not found by who reads."""
    shown = pages()
    linked = {
        ((REPOSITORY / page).parent / target.partition("#")[0]).resolve()
        for page, text in shown.items()
        for target in links(text)
    }
    alone = [page for page in shown if page != "README.md" and (REPOSITORY / page).resolve() not in linked]
    assert not alone, f"no page links to {', '.join(alone)}"


def test_a_page_that_code_and_comments_name_is_there():
    named = {}
    for folder in ("tinychat", "tui", "models", "benchmarks", "kernels_cpu", "kernels_cuda", "tests"):
        for file in (REPOSITORY / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".hpp", ".inl", ".cu", ".cuh"):
                for word in file.read_text(encoding="utf-8").split():
                    if word.lstrip("(`\"'").startswith("docs/") and ".md" in word:
                        named[word.strip("(`\"'),.;:").partition(".md")[0] + ".md"] = file.name
    assert len(named) > 5, "nothing was found"
    wrong = [f"{where}: {page}" for page, where in named.items() if not (REPOSITORY / page).exists()]
    assert not wrong, "\n".join(wrong)
