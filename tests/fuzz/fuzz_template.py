"""Chat templates by somebody who means harm, and sound ones damaged: compiled, rendered, encoded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from fuzz.harness import Case, first_seed, minutes, run
from text.test_template import CONVERSATIONS, REAL, TOOL_CALLS, TOOLS, template


def words(text: str) -> list[str]:
    """Its parts between white space."""
    return text.split()


# Expressions by what they give, so that most of a template runs before something does not fit.
NUMBERS = words("""
    0 1 -1 2 7 99 1000 99999 3000000000 10**9 2**62 9**9**9 (messages|length) (T|length) (T|wordcount)
    (L|length) (N+N) (N*N) (N-N) (N//7) (N%9) (N**N) (N|abs) (T|int) (L|map('int')|sum) (T.count(T))
    (N|round)
""")
TEXTS = words(r"""
    '' 'x' '<|im_end|>' '</think>' '\n' '\t\t' 'é' messages[0].content messages[0].role bos_token (T~T)
    (T+T) (T*N) (T|center(N)) (T|indent(N)) (T|wordwrap(N)) (T|replace(T,T)) (T|truncate(N)) (T|upper)
    (T|title) (T|trim) (T|e) (T|forceescape) (T|striptags) (T|urlize) (T|urlencode) (L|join(T)) (L|tojson)
    (L|tojson(indent=N)) (L|pprint) (N|string) (N|filesizeformat) ('%Nd'|format(N)) ('{:>N}'.format(T))
    T.ljust(N) T.zfill(N) T.expandtabs(N) T.replace(T,T) T.join(L) T.strip(T) T.casefold() (L|string)
    (L|first|string) lipsum(N) lipsum(n=N,max=N) strftime_now(T) (T|reverse) (T|default(T)) T[N:N] T[::-1]
    (T,T)[0] (T)if(N)else(T) (dict(a=T)|xmlattr)
""")
LISTS = words("""
    [] [T] [N,N] [L,L] messages range(N) (L+L) (L*N) (L|list) (T|list) (L|sort) (L|reverse|list)
    (L|unique|list) (L|batch(N)|list) (L|batch(N,T)|list) (L|slice(N)|list) (L|map('string')|list)
    (L|map('length')|list) (messages|map(attribute='content')|list) (messages|groupby('role')|list)
    (dict(a=T)|items|list) T.split(T) T.splitlines() L[N:N] (L|select|list) (L|map('upper')|list)
    (messages|selectattr('role','eq',T)|list)
""")
BLOCKS = [
    "{{ T }}",
    "{{ N }}",
    "{{ L }}",
    "text\n",
    "{{ T|length }}",
    "{{ L|length }}",
    "{% set x = T %}{{ x }}",
    "{% for m in messages %}B{{ m.content }}{% endfor %}",
    "{% for m in L %}B{% endfor %}",
    "{% for m in range(N) %}BB{% endfor %}",
    "{% if N %}B{% else %}B{% endif %}",
    "{% set x %}B{% endset %}{{ x * N }}",
    "{% set ns = namespace(s=T) %}{% for m in range(N) %}{% set ns.s = ns.s + ns.s %}B{% endfor %}",
    "{% set ns = namespace(s=L) %}{% for m in range(N) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% macro f(a, b=T) %}B{{ f(a - 1) ~ f(a - 1) if a > 0 }}{% endmacro %}{{ f(N) }}",
    "{% macro g() %}B{{ caller() }}{% endmacro %}{% call g() %}B{% endcall %}",
    "{% for m in L recursive %}B{{ loop([1, 2]) if loop.depth < N }}{% endfor %}",
    "{% filter upper %}B{% endfilter %}",
    "{% generation %}B{% endgeneration %}",
    "{{ raise_exception(T) if N < 0 }}",
    "{% with x = T %}B{% endwith %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}B{% endfor %}",
]
NESTS = [
    ("(", ")"), ("[", "]"), ("not ", ""), ("-", ""), ("1 + ", ""), ("x.a", ""), ("x|d", ""), ("{'a': ", "}"),
    ("f(", ")"), ("'a' ~ ", ""), ("1 if 1 else ", ""), ("1 ** ", ""), ("x[", "]"),
]  # fmt: skip
NESTED_BLOCKS = [
    ("{% if 1 %}", "{% endif %}"), ("{% for m in messages %}", "{% endfor %}"), ("{% set a = 1 %}", ""),
    ("{% macro f() %}", "{% endmacro %}"), ("{{ x }}", ""), ("{#", "#}"),
    ("{% filter e %}", "{% endfilter %}"), ("{% set a %}", "{% endset %}"), ("text ", ""),
    ("{% raw %}", "{% endraw %}"), ("{%", ""), ("\n", ""),
]  # fmt: skip
JUNK = [*words("{{ }} {% %} {# -%} ' ( ) | . __class__ none"), "", "\\", "\0", "\ud800"]
PLACE = re.compile(r"(?<![\w'])[NTLB](?![\w'])|(?<=%)N(?=d)|(?<=>)N(?=\})|(?<=N)B|B(?=\{|B)|(?<=\})B|(?<=B)B")


class Author:
    """Writes templates from a seed."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def fill(self, text: str, depth: int) -> str:
        """`text` with its places filled: N a number, T a text, L a list, B a block."""
        kinds = {"N": NUMBERS, "T": TEXTS, "L": LISTS, "B": BLOCKS}

        def filled(match: re.Match) -> str:
            options = kinds[match[0]]
            if depth <= 0:
                options = [o for o in options if not PLACE.search(o)]
            return self.fill(self.pick(options), depth - 1)

        return PLACE.sub(filled, text)

    def hostile(self) -> str:
        return "".join(self.fill("B{{ x }}", 3 + int(self.rng.integers(4))) for _ in range(2))

    def damaged(self) -> str:
        """A real template with pieces taken out, doubled or put in, or with other expressions in places."""
        source = self.pick([*REAL.values(), TOOL_CALLS])
        for _ in range(int(self.rng.geometric(0.6))):
            parts = list(re.finditer(r"\d+|'[^'\n]*'|\bm(?:essage)?\.\w+|\w+", source))
            word = self.pick(parts)
            change = self.pick(
                [*NUMBERS[:9], *TEXTS[:9], word[0] * 2, *JUNK, self.fill("T", 2), self.fill("N", 2)]
            )
            source = source[: word.start()] + change + source[word.end() :]
        return source

    def large(self) -> str:
        """Much of one thing, or deeply nested: for the compiler."""
        n = int(10 ** self.rng.uniform(1, 5))
        if self.rng.integers(2):
            opened, closed = self.pick(NESTS)
            return "{{ " + opened * n + "1" + closed * n + " }}"
        opened, closed = self.pick(NESTED_BLOCKS)
        return opened * n + "x" + closed * n


def case(way: str) -> Case:
    def make(rng: np.random.Generator, folder: Path) -> Path:
        author = Author(rng)
        path = folder / "template.json"
        conversation = CONVERSATIONS[author.pick(list(CONVERSATIONS))]
        path.write_text(json.dumps({"source": getattr(author, way)(), "messages": conversation}))
        return path

    def check(path: Path) -> None:
        given = json.loads(path.read_text())
        made = template(given["source"])
        for generating in (True, False):
            made.encode(made.render(given["messages"], generating, tools=TOOLS))

    return Case(make, check)


@pytest.mark.slow
def test_no_template_takes_much_or_fails_in_another_way_than_in_two_lines():
    report = run({way: case(way) for way in ("hostile", "damaged", "large")}, first_seed(), minutes())
    print(report)
    assert not report.faults, report
    # The author has both: what is stopped or broken, and what works.
    assert min(report.counts[f"hostile {what}"] for what in ("read", "refused")) > 0
