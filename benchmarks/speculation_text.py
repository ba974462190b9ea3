"""Speculation by prompt lookup on real text: what `--draft ngram` gains, and what it costs elsewhere.

    python benchmarks/speculation_text.py [--model smollm2-135m] [--pairs 10] [--tokens 128]

Three sets of prompts: repeat a passage, correct a word in a piece of code, and free chat. Every prompt is
answered with and without a draft, interleaved, at temperature 0; the ratio is of decode tokens a second, and
the median over all pairs of a set is what counts. Answers that merely loop (up to 16 tokens three times in
a row) are excluded: lookup would win on those without being useful.
"""

from __future__ import annotations

import argparse
import json
import statistics

import tinychat
from tinychat.base.events import Done

PASSAGES = [
    "The harbour was quiet when Mara tied the boat to the old stone pier. Two gulls watched her from the "
    "roof of the customs house, and somewhere behind the warehouses a bell rang four times.",
    "Bread needs flour, water, salt and yeast. Mix them in a large bowl, knead the dough for ten minutes, "
    "let it rest for an hour under a cloth, and bake it at 230 degrees until the crust is dark.",
    "Our office moved to the third floor of the building at 14 Mill Street on Monday. The telephone numbers "
    "stay the same, but parcels should be left with Ms. Okafor at the reception desk.",
    "Glaciers form where more snow falls than melts. Over many years the snow is pressed into ice, which "
    "begins to flow downhill under its own weight, carving valleys and carrying stones along.",
]
AVERAGE = """def average(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()
"""
BEST = """for (int i = 0; i < n; i++) {
    if (a[i] > best) {
        best = a[i];
        where = i;
    }
}
"""
CODE = [
    (AVERAGE, "Rename the function `average` to `mean`."),
    (STACK, "Rename `items` to `data`."),
    (BEST, "Change the loop so that it starts at 1."),
]
CHAT = [
    "What makes a good friend?",
    "Why is the sky blue?",
    "Give me an idea for a birthday party.",
    "Tell me about the history of tea.",
    "How do I learn to play the guitar?",
    "Describe a walk in the forest.",
    "What should I cook tonight?",
    "Explain what a budget is.",
]


def prompts() -> dict[str, list[str]]:
    """What is asked, by set."""
    return {
        "quote back": [f"Repeat this text word for word:\n\n{p}" for p in PASSAGES],
        "code edit": [f"{task} Write the whole code again.\n\n```\n{code}```" for code, task in CODE],
        "free chat": CHAT,
    }


def loops(ids: list[int], n: int = 16) -> bool:
    """Whether some n tokens come three times in a row."""
    return any(
        ids[i : i + p] == ids[i + p : i + 2 * p] == ids[i + 2 * p : i + 3 * p]
        for p in range(1, n + 1)
        for i in range(0, len(ids) - 3 * p)
    )


def main() -> None:
    """Print a table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=10, help="Pairs of a set, at least.")
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    results = {}
    with tinychat.load(args.model) as model:

        def answer(prompt: str, draft: str):
            *_, done = model.session(draft=draft, temperature=0, max_tokens=args.tokens).send(prompt)
            assert isinstance(done, Done)
            return done

        print("| prompts | pairs | tokens a step | speed with ngram ÷ without (median, range) | looped |")
        print("|---|---|---|---|---|")
        for name, texts in prompts().items():
            ratios, steps, excluded = [], [], 0
            rounds = -(-args.pairs // len(texts))
            for i in range(rounds + 1):  # the first round warms up
                for text in texts:
                    order = ("none", "ngram") if i % 2 else ("ngram", "none")
                    done = {draft: answer(text, draft) for draft in order}
                    assert done["none"].completion.token_ids == done["ngram"].completion.token_ids
                    if i == 0:
                        continue
                    if loops(done["none"].completion.token_ids):
                        excluded += 1
                        continue
                    ratios.append(done["ngram"].stats.decode_tps / done["none"].stats.decode_tps)
                    steps.append(done["ngram"].stats.tokens_per_step)
            if not ratios:
                print(f"| {name} | 0 | | all looped | {excluded} |")
                continue
            results[name] = statistics.median(ratios)
            print(
                f"| {name} | {len(ratios)} | {statistics.mean(steps):.2f} | {results[name]:.2f} "
                f"({min(ratios):.2f} … {max(ratios):.2f}) | {excluded} |"
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
