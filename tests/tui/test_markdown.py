from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.tui.markdown import Code, Document, highlight
from tinychat.tui.text import clean, fold, plain, width_of, wrap

SAMPLE = """# Title

Hello **bold** and *em* `code` ~~gone~~ [link](http://a.b/c) <b>html</b> [bold]
second line

- a
- b
  - nested **x**

    ```python
    def f(): pass
    ```
- [x] done

3. three
4. four

> quote
> more

| a | b |
|---|--:|
| 1 | two words |

```python
def f(x):
    return "s" # c
```

---
[foo]: http://x
end
"""


def document(source, piece=10**9):
    d = Document()
    for i in range(0, len(source), piece):
        d.append(source[i : i + piece])
        d.advance()
    d.end()
    assert d.advance()
    assert not d.live
    return d


def text_of(d, width=60):
    return "\n".join(plain(line).rstrip() for leaf in d.sealed + d.live for line in leaf.lines(width))


def test_every_kind_of_block_is_shown():
    text = text_of(document(SAMPLE), 80)
    for expected in (
        "Title\n\nHello bold and em code gone link (http://a.b/c) <b>html</b> [bold]\nsecond line\n",
        "\n\n• a\n• b\n  • nested x",
        "• ☑ done",
        "3. three\n4. four",
        "▎ quote\n▎ more",
        "a │         b\n──┼──────────\n1 │ two words",
        ' def f(x):\n     return "s" # c',
        "[foo]: http://x\nend",
    ):
        assert expected in text


@pytest.mark.parametrize("piece", [1, 3, 7, 50])
def test_streamed_looks_like_whole(piece):
    assert text_of(document(SAMPLE, piece)) == text_of(document(SAMPLE))


LONG = {
    "fence": "```python\n"
    + "".join(f"def f{i}(x):\n    return {i}\n\n" for i in range(400))
    + "```\nafter\n",
    "list": "".join(f"{i + 1}. item **{i}** and some more text\n" for i in range(400)),
    "nested list": "".join(f"- item {i}\n  - sub {i}\n" for i in range(300)),
    "table": "| a | b |\n|---|---|\n" + "".join(f"| {i} | row {i} |\n" for i in range(300)),
    "quote": "> line of quote\n" * 500,
    "blocks": SAMPLE * 20,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_block_streamed_looks_like_whole(kind):
    assert text_of(document(LONG[kind], 23)) == text_of(document(LONG[kind]))


def test_a_long_list_counts_on_and_a_long_table_keeps_its_columns():
    lines = text_of(document(LONG["list"], 23)).split("\n")
    assert [line.split(".")[0] for line in lines] == [str(i + 1) for i in range(400)]
    table = text_of(document(LONG["table"], 23)).split("\n")
    assert len(table) == 302
    assert len({line.index("│") for line in table if "│" in line}) == 1


def test_a_code_block_in_pieces_is_copied_whole():
    d = document(LONG["fence"] + SAMPLE, 23)
    assert d.codes[0] == LONG["fence"][len("```python\n") : -len("```\nafter\n")]
    assert d.codes[1:] == ["def f(): pass\n", 'def f(x):\n    return "s" # c\n']
    assert sum(leaf.heading for leaf in d.sealed if isinstance(leaf, Code)) == 3


def test_an_unclosed_fence_is_code_to_its_end():
    d = document("```\nnever closed")
    assert d.codes == ["never closed\n"] or d.codes == ["never closed"]


HOSTILE = {
    "one line": "x" * 1_000_000,
    "words": "word " * 40_000,
    "stars and brackets": "*" * 20_000 + "[" * 20_000,
    "deep": "> " * 2000 + "x\n" + "- " * 2000,
    "backticks": "`" * 50_000,
    "deep list": "".join("  " * i + "- x\n" for i in range(300)),
    "wide table": "|" * 5_000 + "\n" + "|-" * 5_000 + "\n",
    "wide": "漢字" * 20_000,
    "emoji": "👨‍👩‍👧‍👦" * 5_000,
    "right to left": "שלום עולם " * 5_000,
    "escapes": "\x1b[2J\x1b]0;title\x07" * 2_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_laid_out_in_short_steps(kind):
    d = Document()
    d.append(HOSTILE[kind])
    d.end()
    longest = 0.0
    while True:
        began = time.thread_time()
        done = d.advance(0.0)
        longest = max(longest, time.thread_time() - began)
        if done:
            break
    for leaf in d.sealed:
        for line in leaf.lines(80):
            assert width_of(plain(line)) <= 80
    assert longest < 0.25  # of the processor, which others may slow down; the benchmark measures


def test_every_word_survives():
    words = [f"word{i}" for i in range(5000)]
    shown = text_of(document(" ".join(words), 37)).split()
    assert shown == words


def test_control_characters_become_visible_and_harmless():
    assert clean("a\x1b[31mb\x07\x9b\u202e\ufeff\udc80") == "a␛[31mb␇\ufffd\ufffd"
    assert clean("tab\tnewline\n") == "tab\tnewline\n"
    assert clean("a\r\nb") == "a\nb"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.integers(4, 40))
def test_wrapping_loses_nothing_but_spaces(text, width):
    text = clean(text).replace("\n", " ").replace("\t", " ")
    assert "".join("".join(plain(p) for p in wrap([(text, "")], width)).split()) == "".join(text.split())
    assert "".join(plain(p) for p in fold([(text, "")], width)) == text


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab *_`#->|\n[]()~1.!\\", max_size=400), st.integers(1, 60))
def test_any_markdown_streams_without_an_error(source, piece):
    text_of(document(source, piece), 30)


PIECES = [
    "a", "b ", "*", "`", "```", "~~~", "~~~ `x\n", "\n```\n", "\t~~~ y\n", "# ", "- ", "  - ", "1. ", "> ",
    "| a | b |\n", "|-|-|\n", "\n", "\n\n", "    ", "[x](y)", "\\", "\t",
    "word " * 40, "x\n" * 20, "- item\n" * 20, "| a | b |\n" * 25, "> quote\n" * 20,
]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(PIECES),
        max_size=60,
    ),
    st.sampled_from([7, 100, 10**9]),
)
def test_long_markdown_of_any_kind_streams_without_an_error(parts, piece):
    text_of(document("".join(parts), piece), 30)


@pytest.mark.parametrize("opening", ["~~~ `x`", "\t~~~~", "  ```python"])
def test_a_long_fence_may_open_in_any_way(opening):
    d = document(f"{opening}\n" + "x = 1\n" * 40, 23)
    assert [code.split() for code in d.codes] == [["x", "=", "1"] * 40]


def test_code_is_highlighted_and_an_unknown_language_is_plain():
    styles = {style for line in highlight("def f():\n    return 'x'", "python") for _, style in line}
    assert "codeblock tok-keyword" in styles
    assert highlight("a\nb", "no-such-language") == [[("a", "codeblock")], [("b", "codeblock")]]


# Formulas

FORMULAS = [
    r"\(a^2 + b_1 * c_2\)",
    r"\[ x_1 = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a} \]",
    "\\[\na_1 * b\n= c_2 * d\n- e \\\\\n+ f\n\\]",
    "$$\n\\sum_{i=1}^n i_*\n= \\frac{n(n+1)}{2}\n$$",
    "$$e^{i\\pi} + 1 = 0$$",
    r"$x_1 + y_1$",
    "\\begin{align*}\na_1 &= b \\\\\n&= c*d*e\n\\end{align*}",
    r"\[\begin{pmatrix} a & b \\ c & d \end{pmatrix}\]",
]


IN_A_LINE = [f for f in FORMULAS if "\n" not in f]  # one over several lines begins a line


@pytest.mark.parametrize(
    ("formula", "around", "newline"),
    [(f, "The root {} is *real*.", "") for f in IN_A_LINE]
    + [(f, "{}", "\n") for f in FORMULAS]
    + [(f, "See\n{}\nthere", "\n") for f in FORMULAS]
    + [(f, "- item\n- {}\n", "\n  ") for f in FORMULAS]
    + [(f, "> {}", "\n> ") for f in FORMULAS],
)
def test_a_formula_is_shown_as_it_is_written(formula, around, newline):
    shown = text_of(document(around.format(formula.replace("\n", newline))))
    for line in formula.split("\n"):
        assert line in shown
    assert "*real*" not in shown


@pytest.mark.parametrize(
    ("formula", "before"),
    [(f, b) for f in FORMULAS for b in ("", "Text:\n", "Text.\n\n")]
    + [(f, b) for f in IN_A_LINE for b in ("Text: ", "- ")],
)
def test_a_formula_that_comes_never_changes_what_was_shown_of_it(formula, before):
    d, source = Document(), before + formula
    for i, char in enumerate(source):
        d.append(char)
        d.advance()
        shown, so_far = text_of(d), source[: i + 1]
        if i >= len(before) + 1 and "$x" not in so_far:  # a single dollar may be a price until it is whole
            ink = "".join(so_far[len(before) :].split())
            assert ink in "".join(shown.split()), (so_far, shown)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"an unclosed \(a and **bold**", r"an unclosed \(a and bold"),
        (r"an unclosed \[a and **bold**" + "\n\nnext **b**", "an unclosed \\[a and bold\n\nnext b"),
        ("\\[\nnever *closed*\n\nnext", "\\[\nnever closed\n\nnext"),
        ("it costs $5 and $6, *truly*", "it costs $5 and $6, truly"),
        ("$5*2 and $6*3 and 7$", "$5*2 and $6*3 and 7$"),
        ("US$5_000 to CA$6_000 *a*", "US$5_000 to CA$6_000 a"),
        ("set $HOME_DIR to *x* or $PATH_B", "set $HOME_DIR to x or $PATH_B"),
        (r"code `\(a\)` and `$x_1$`", r"code \(a\) and $x_1$"),
        (r"escaped \$5 and \*this\*", "escaped $5 and *this*"),
        (r"a path C:\Users\me and \\server", r"a path C:\Users\me and \server"),
        ("see [a \\(x_1\\) b](http://c)", "see a \\(x_1\\) b (http://c)"),
    ],
)
def test_what_is_no_formula_is_as_before(source, expected):
    assert text_of(document(source)).strip() == expected
    assert text_of(document(source, 1)).strip() == expected


def test_a_fence_has_no_formulas():
    d = document("```latex\n\\[ x_1 \\]\n$$ y $$\n```\n\\(z_1\\)")
    assert d.codes == ["\\[ x_1 \\]\n$$ y $$\n"]
    assert "\\(z_1\\)" in text_of(d)


def test_many_open_formulas_are_laid_out_in_time():
    began = time.process_time()
    document("\\( $$ \\[ \\begin{a} $x_ " * 4000, 200)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("formula", [r"\(P(A|B)\)", r"\( |x| \)", r"\[\{x \mid y | z\}\]", r"$$|a|$$"])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_bar_in_a_formula_does_not_end_the_cell_of_a_table(formula, step):
    source = f"| what | how |\n|---|---|\n| a | {formula} |\n| \\( | \\) |\n| b | c |\n"
    document = Document()
    for at in range(0, len(source), step):
        document.append(source[at : at + step])
        document.advance()
    document.end()
    document.advance()
    (table,) = document.sealed
    cells = [["".join(text for text, _ in cell) for cell in row] for row in table.rows]
    assert cells == [["what", "how"], ["a", formula], ["\\(", ")"], ["b", "c"]]
