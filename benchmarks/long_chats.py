"""What eviction costs: the tables of docs/long-chats-figures.md.

    python benchmarks/long_chats.py perplexity --work DIR     # 37 documents, budgets 50, 25 and 12.5 %
                                    [--plot FILE.svg]         # (needs matplotlib)
    python benchmarks/long_chats.py recall --work DIR         # facts told early, asked for after evictions
    python benchmarks/long_chats.py soak [--tokens 100000]    # memory and time a token, budget 1,024
    python benchmarks/long_chats.py cost                      # a history, scoring, 8-bit KV, resuming

perplexity: the first 2,048 tokens of each English document in docutils 0.21.2's docs folder, in steps of 16
tokens, the second half scored. Calibration never saw them. Losses are in nats over the full cache; intervals
are paired bootstraps over documents.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from quality import held_out_archive

import tinychat
from tinychat.backends.interface import BLOCK
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.sampling import SamplingParams, log_softmax

LENGTH = 2048
GREEDY = SamplingParams(temperature=0)
BUDGETS = (1024, 512, 256)
POLICIES = ("h2o", "window", "random")


def documents(work: Path, tokenizer) -> dict[str, list[int]]:
    """The first LENGTH tokens of every document that has them."""
    out = {}
    with tarfile.open(held_out_archive(work)) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            parts = member.name.split("/")
            if member.isfile() and parts[1] in ("docs", "FAQ.txt") and member.name.endswith(".txt"):
                ids = tokenizer.encode(tar.extractfile(member).read().decode())
                if len(ids) >= LENGTH:
                    out["/".join(parts[1:])] = ids[:LENGTH]
    return out


def nll(model, ids: list[int], policy: EvictionPolicy | None) -> float:
    """Mean negative log-likelihood of the second half."""
    branch, total = model.engine.branch(policy), 0.0
    for i in range(0, LENGTH - BLOCK, BLOCK):
        rows = log_softmax(model.engine.run(branch, ids[i : i + BLOCK], 0))
        if i >= LENGTH // 2:
            total -= rows[np.arange(BLOCK), ids[i + 1 : i + 1 + BLOCK]].sum()
    return total / (LENGTH // 2 - BLOCK)


def bootstrap(values: np.ndarray, statistic, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of a statistic of rows drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(rounds)]
    return tuple(np.percentile(draws, [2.5, 97.5]))


def perplexity(args: argparse.Namespace) -> None:
    with tinychat.load(args.model, act_bits=16) as model:
        texts = documents(args.work, model.tokenizer)
        print(f"{len(texts)} documents", file=sys.stderr)
        kinds = [None] + [(p, b) for b in args.budgets for p in args.policies]
        table = np.zeros((len(texts), len(kinds)))
        for i, (name, ids) in enumerate(texts.items()):
            for j, kind in enumerate(kinds):
                policy = kind and EvictionPolicy.of(
                    kind[0], kind[1], recent=args.recent and kind[1] * args.recent // 100
                )
                table[i, j] = nll(model, ids, policy)
            print(name, " ".join(f"{x:.3f}" for x in table[i]), file=sys.stderr)
    print(
        "| budget | policy | perplexity | loss, nats | of window's loss | 95 % | less than window's, 95 % |"
    )
    print("|---|---|---|---|---|---|---|")
    full = table[:, 0]
    print(f"| all | | {np.exp(full.mean()):.3f} | | | | |")
    for j, (policy, budget) in enumerate(kinds[1:], 1):
        loss = table[:, j] - full
        line = f"| {budget} | {policy} | {np.exp(table[:, j].mean()):.3f} | {loss.mean():.4f} |"
        if "window" in args.policies:
            window = table[:, kinds.index(("window", budget))] - full
            low, high = bootstrap(np.stack([loss, window], 1), lambda r: r[:, 0].sum() / r[:, 1].sum())
            line += f" {loss.mean() / window.mean():.2f} | {low:.2f} … {high:.2f} |"
            low, high = bootstrap(window - loss, np.mean)
            line += f" {low:.3f} … {high:.3f} |"
        print(line)
    if args.plot:
        plot(args.plot, {k: table[:, j] - full for j, k in enumerate(kinds) if k}, args)


def plot(path: Path, losses: dict[tuple[str, int], np.ndarray], args: argparse.Namespace) -> None:
    """Loss by budget, a line for each policy; bars are 1.96 standard errors over documents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, ax = pyplot.subplots(figsize=(6, 3.4))
    for policy in args.policies:
        by_budget = np.stack([losses[policy, b] for b in args.budgets], 1)
        error = 1.96 * by_budget.std(0, ddof=1) / len(by_budget) ** 0.5
        shares = [100 * b / LENGTH for b in args.budgets]
        ax.errorbar(shares, by_budget.mean(0), yerr=error, label=policy, marker="o", capsize=3)
    ax.set_xscale("log")
    ax.set_xticks(shares, [f"{s:g} %" for s in shares])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.set_xlabel(f"budget, of {LENGTH:,} tokens")
    ax.set_ylabel("loss over the full cache, nats")
    ax.set_title(f"{len(by_budget)} documents")
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path)


NAMES = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Louis Maria Nadia Oscar Paula"
THINGS = {
    "colour": "red blue green yellow black white brown purple",
    "city": "Paris London Rome Berlin Madrid Vienna Oslo Tokyo",
    "animal": "cat dog horse rabbit parrot tiger bear snake",
    "job": "doctor teacher pilot farmer baker lawyer painter sailor",
}


def ask(session, text: str, max_tokens: int) -> str:
    """One turn of a chat; what the model said."""
    events = session.send(text, max_tokens=max_tokens)
    return "".join(e.text for e in events if isinstance(e, tinychat.TextDelta))


def recall(args: argparse.Namespace) -> None:
    """Chats that begin with a fact, go on with texts to read, and end with a question about the fact."""
    rng = np.random.default_rng(args.seed)
    kinds = [None, *((p, b) for b in args.budgets for p in ("h2o", "window"))]
    options = [{"kv_policy": k[0], "kv_budget": k[1]} if k else {} for k in kinds]
    models = [tinychat.load(args.model, act_bits=16, draft="none", **o) for o in options]
    tokenizer = models[0].tokenizer
    texts = list(documents(args.work, tokenizer).values())
    known = {turns: np.zeros((0, len(kinds)), bool) for turns in args.turns}
    tried = 0
    while sum(map(len, known.values())) < args.asked:
        turns = args.turns[tried % len(args.turns)]
        kind, name = str(rng.choice(list(THINGS))), str(rng.choice(NAMES.split()))
        value, text = str(rng.choice(THINGS[kind].split())), texts[tried % len(texts)]
        tried += 1
        script = [(f"Remember this: the favourite {kind} of {name} is {value}. Repeat it.", 24)]
        for _ in range(turns):
            at = int(rng.integers(0, LENGTH - args.turn_tokens))
            script.append((f"Read this text:\n\n{tokenizer.decode(text[at : at + args.turn_tokens])}", 8))
        script.append((f"What is the favourite {kind} of {name}?", 20))
        row = []
        for model in models:
            session = model.session(temperature=0)
            answers = [ask(session, *turn) for turn in script]
            row.append(value.lower() in answers[-1].lower())
            if not row[0]:
                break  # the full cache does not know it
        else:
            known[turns] = np.vstack([known[turns], row])
            print(turns, np.concatenate(list(known.values())).sum(0), file=sys.stderr)
    for model in models:
        model.close()
    together = np.concatenate(list(known.values()))
    print(f"{len(together)} facts that the full cache knows, of {tried}; {args.turn_tokens} tokens a turn\n")
    print(
        "| budget | policy | known |" + "".join(f" of {len(k)} after {n} turns |" for n, k in known.items())
    )
    print("|---|---|---|" + "---|" * len(known))
    for j, (policy, budget) in enumerate(kinds[1:], 1):
        print(f"| {budget} | {policy} | {together[:, j].mean():.0%} |", end="")
        print("".join(f" {k[:, j].sum()} |" for k in known.values()))
    for budget in args.budgets:
        h2o, window = (together[:, kinds.index((p, budget))] for p in ("h2o", "window"))
        print(f"budget {budget}: only H2O knows {(h2o & ~window).sum()}, only window {(window & ~h2o).sum()}")


SUBJECTS = "rivers bread clocks bees paper glass the moon whales salt bridges coffee trains stars rice ships"
QUESTIONS = (
    "What is interesting about {}?",
    "Explain {} to a child.",
    "Write a short story about {}.",
    "How did people learn about {}?",
    "Why do people care about {}?",
    "List some facts about {}.",
    "Describe {} to somebody who has never seen any.",
    "What is the history of {}?",
)


def fluency(model, turns: list[tuple[str, list[int]]]) -> str:
    """Perplexity of answers under the full cache, each behind its question alone, and how they repeat."""
    total, count, distinct = 0.0, 0, []
    for question, answer in turns:
        text = model.template.render([{"role": "user", "content": question}], True)
        ids = [*model.template.encode(text), *answer]
        rows = log_softmax(model.logits(ids)[-len(answer) - 1 : -1])
        total -= rows[np.arange(len(answer)), answer].sum()
        count += len(answer)
        grams = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
        distinct.append(len(set(grams)) / max(1, len(grams)))
    return f"| {len(turns)} | {np.exp(total / count):.2f} | {np.mean(distinct):.2f} |"


def soak(args: argparse.Namespace) -> None:
    """A chat of so many tokens of answers under a budget: memory, what it says, and time a token, also as a
    share of what a chat takes that begins just then: shared machines are not equally fast all the time.
    """
    process, subjects = psutil.Process(), SUBJECTS.replace("the moon", "the_moon").split()
    turns: list[tuple[str, list[int]]] = []
    tokens = window = 0
    kept = tinychat.load(args.model, kv_budget=args.budget, draft="none")
    with kept as model, tinychat.load(args.model, draft="none") as other:

        def pace() -> float:
            """Milliseconds a token of a chat that has just begun: how fast the machine is now."""
            *_, done = other.session(temperature=0).send("Count to a hundred.", max_tokens=100)
            return 1e3 * done.stats.tpot_s

        print("| tokens | turns | ms a token | of a new chat's | resident MB | evicted |")
        print("|---|---|---|---|---|---|")
        before = pace()
        session, started = model.session(temperature=0.8), time.perf_counter()
        while tokens < args.tokens:
            n = len(turns)
            subject = subjects[n % len(subjects)].replace("_", " ")
            question = QUESTIONS[n // len(subjects) % len(QUESTIONS)].format(subject)
            *_, done = session.send(question, max_tokens=400, seed=n)
            turns.append((question, done.completion.token_ids))
            tokens, window = tokens + done.stats.generated_tokens, window + done.stats.generated_tokens
            if window >= args.tokens // 20 or tokens >= args.tokens:
                ms = 1e3 * (time.perf_counter() - started) / window
                after = pace()
                share = ms / (before + after) * 2
                before = after
                row = f"{ms:.2f} | {share:.2f} | {process.memory_info().rss / 1e6:.0f}"
                print(f"| {tokens} | {len(turns)} | {row} | {done.stats.evicted_tokens} |", flush=True)
                started, window = time.perf_counter(), 0
    print("\n| answers | perplexity under the full cache | distinct 4-grams of an answer |\n|---|---|---|")
    with tinychat.load(args.model) as model:
        middle = len(turns) // 2
        for name, part in (("first", turns[:10]), ("middle", turns[middle:][:10]), ("last", turns[-10:])):
            print(f"| {name} {fluency(model, part)[2:]}")


def fused_multiply_adds() -> float:
    """fp32 multiply-adds a second of a matrix product on all cores: attention is held against it."""
    n = 1024
    a = np.random.default_rng(0).random((n, n), np.float32)
    best = min(timed(lambda: a @ a) for _ in range(20))
    return n**3 / best


def read(engine, ids: list[int], policy: EvictionPolicy | None = None):
    """A branch that holds these tokens."""
    branch = engine.branch(policy)
    for i in range(0, len(ids), 256):
        part = ids[i : i + 256]
        engine.run(branch, part, len(part) - 1, params=GREEDY)
    return branch


def timed(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def cost(args: argparse.Namespace) -> None:
    """What a long history costs while it is in the cache, and when it comes back from disk."""
    rng = np.random.default_rng(0)
    with tinychat.load(args.model, draft="none") as model:
        c, engine = model.config, model.engine
        ids = rng.integers(0, c.vocab_size, 4096).tolist()

        def question(history: int) -> float:
            """Seconds that 32 tokens behind so many take, until their logits are there."""
            branch = read(engine, ids[:history])
            times = []
            for _ in range(args.rounds):
                times.append(timed(lambda: engine.run(branch, ids[-32:], 31, params=GREEDY)))
                branch.truncate(history)
            return float(np.median(times))

        near, far = question(100), question(4000)
        whole = timed(lambda: read(engine, ids[::-1][:4032]).free())
        adds = (
            32
            * 3900
            * c.attentions[0].n_heads
            * c.attentions[0].head_dim
            * 2
            * c.n_layers
            / fused_multiply_adds()
        )
        print("32-token question, first token, ms")
        print(f"| after 100 tokens | {1e3 * near:.1f} |\n| after 4,000 tokens | {1e3 * far:.1f} |")
        print(f"| the attention that it adds, at the machine's fp32 rate | {1e3 * adds:.1f} |")
        print(f"| added, of that | {(far - near) / adds:.2f} |")
        print(f"| everything read again | {1e3 * whole:.0f}, {whole / far:.0f} times |\n")

        def decode(branch, n: int = 16) -> float:
            """Seconds a token, appended for good."""
            return min(timed(lambda: engine.run(branch, [ids[0]], 0, GREEDY, len)) for _ in range(n))

        for slots in (100, 960):
            plain = read(engine, ids[:slots])
            h2o = read(engine, ids[:slots], EvictionPolicy.of("h2o", 1024))
            ratios = []
            for _ in range(args.rounds):
                a, b = decode(plain, 2), decode(h2o, 2)
                ratios.append(b / a)
            print(f"scoring: a step with H2O takes {np.median(ratios):.3f} of one without, {slots} slots\n")

        def a_block(branch) -> float:
            """Seconds for the 16 tokens of a block, for which a full cache gives up 16 slots."""
            return timed(lambda: [engine.run(branch, [ids[0]], 0, GREEDY, len) for _ in range(BLOCK)])

        plain = read(engine, ids[:1008])
        h2o = read(engine, ids[:1536], EvictionPolicy.of("h2o", 1024))
        ratios = []
        for _ in range(args.rounds):
            a, b = a_block(plain), a_block(h2o)
            plain.truncate(1008)
            ratios.append(b / a)
        ratio = np.median(ratios)
        print(f"and evicting: 16 steps of a full H2O cache take {ratio:.3f} of 16 without either\n")

        session = model.session(max_tokens=8, temperature=0)
        text = model.tokenizer.decode(ids[:3500])
        list(session.send(text))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "1.safetensors"
            session.save_kv(path)
            held = len(session._branch)
            session.save(Path(folder) / "chat.json")
            size = path.stat().st_size / 1e6
            with tinychat.load(args.model, draft="none") as again:
                other = tinychat.Session.load(Path(folder) / "chat.json", again)
                loading = timed(lambda: other.load_kv(path))
                first = timed(lambda: next(iter(other.send("And then?"))))
                empty = again.session(max_tokens=8, temperature=0)
                alone = timed(lambda: next(iter(empty.send("And then?"))))
        print(
            f"resumed from disk: {held} tokens ({size:.0f} MB) in {1e3 * loading:.0f} ms, first token "
            f"{1e3 * first:.0f} ms later; an empty chat's {1e3 * alone:.0f} ms\n"
        )
    print("| context | 8-bit KV, ms a token | 16-bit | ratio |\n|---|---|---|---|")
    models = {bits: tinychat.load(args.model, draft="none", kv_bits=bits) for bits in (8, 16)}
    for context in (1000, 2000, 4000):
        branches = {}
        for bits, m in models.items():
            branches[bits] = read(m.engine, ids[:context])
        times: dict[int, list[float]] = {8: [], 16: []}
        for _ in range(args.rounds):
            for bits, m in models.items():
                times[bits].append(
                    timed(lambda m=m, b=branches[bits]: m.engine.run(b, [ids[0]], 0, params=GREEDY))
                )
        a, b = (1e3 * np.median(times[bits]) for bits in (8, 16))
        print(f"| {context} | {a:.2f} | {b:.2f} | {a / b:.3f} |")
    per_token = {bits: m.backend.kv_bytes_per_block() / BLOCK for bits, m in models.items()}
    print(f"bytes a token: {per_token[8]:.0f} and {per_token[16]:.0f}, {per_token[8] / per_token[16]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("perplexity")
    p.add_argument("--work", type=Path, required=True, help="Folder for what is downloaded.")
    p.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    p.add_argument("--policies", nargs="+", default=POLICIES)
    p.add_argument("--plot", type=Path, help="Where to draw it, .svg or .png.")
    p.add_argument("--recent", type=int, help="Per cent of the budget that are recent tokens.")
    p.set_defaults(run=perplexity)
    p = commands.add_parser("recall")
    p.add_argument("--work", type=Path, required=True, help="Folder for what is downloaded.")
    p.add_argument("--budgets", type=int, nargs="+", default=(512, 256))
    p.add_argument("--asked", type=int, default=102, help="Facts that the full cache knows.")
    p.add_argument("--turns", type=int, nargs="+", default=(4, 6, 8), help="Between telling and asking.")
    p.add_argument("--turn-tokens", type=int, default=220)
    p.add_argument("--seed", type=int, default=1, help="Of the facts and the texts.")
    p.set_defaults(run=recall)
    p = commands.add_parser("soak")
    p.add_argument("--budget", type=int, default=1024)
    p.add_argument("--tokens", type=int, default=100_000)
    p.set_defaults(run=soak)
    p = commands.add_parser("cost")
    p.add_argument("--rounds", type=int, default=21)
    p.set_defaults(run=cost)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
