"""Eviction against the same thing computed densely: every key is kept, a mask says who may still be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from tinychat.backends.interface import BLOCK
from tinychat.base.errors import UsageError
from tinychat.base.events import Done, Notice
from tinychat.engine.eviction import EvictionPolicy, Ledger
from tinychat.network.config import RopeConfig

RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 256, 600).tolist()


class Dense:
    """The tiny Llama token by token: all keys and values for ever, unrotated, and for each layer and KV head
    the tokens that are still seen, in the order of their positions.
    """

    def __init__(self, model, policy, trained=10**9):
        self.c, self.w, self.policy, self.trained = model.config, model.backend.weights, policy, trained
        c = self.c
        heads = [(layer, g) for layer in range(c.n_layers) for g in range(c.attentions[0].n_kv_heads)]
        self.seen = {h: [] for h in heads}  # tokens
        self.position = {h: {} for h in heads}  # of a token
        self.score = {h: {} for h in heads}
        self.age = {h: {} for h in heads}
        self.k = {h: [] for h in heads}
        self.turned = {h: {} for h in heads}  # key of a token, rotated to its position
        self.v = {h: [] for h in heads}
        self.next_position = self.tokens = 0

    def rotate(self, x, position):
        angle = position * torch.from_numpy(self.c.rope.frequencies())
        a, b = x.double().chunk(2)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]).float()

    def make_room(self):
        p = self.policy
        if len(self.seen[0, 0]) == p.budget:
            for h, tokens in self.seen.items():
                latest = self.next_position - p.recent
                free = [t for t in tokens if p.pinned <= self.position[h][t] < latest]
                if p.name == "h2o":
                    votes = {t: self.score[h][t] / self.age[h][t] for t in tokens}
                    mean = sum(votes[t] * self.v[h][t] for t in tokens) / sum(votes.values())
                    free.sort(key=lambda t: votes[t] * (self.v[h][t] - mean).norm())
                self.seen[h] = [t for t in tokens if t not in free[:BLOCK]]
        if self.next_position + 1 > self.trained:
            for h, tokens in self.seen.items():
                self.position[h] = {t: i for i, t in enumerate(tokens)}
                self.turned[h] = {t: self.rotate(self.k[h][t], i) for t, i in self.position[h].items()}
            self.next_position = len(self.seen[0, 0])

    def step(self, token):
        """Logits after one more token."""
        self.make_room()
        c, t, position = self.c, self.tokens, self.next_position
        x = self.w.embed[0][token]

        def norm(x, weight):
            return x * torch.rsqrt(x.pow(2).mean() + c.norm_eps) * weight

        for layer, b in enumerate(self.w.blocks):
            qkv = b.qkv[0] @ norm(x, b.attn_norm)
            q, k, v = (
                a.view(-1, c.attentions[0].head_dim)
                for a in qkv.split(
                    [c.attentions[0].n_heads * c.attentions[0].head_dim]
                    + 2 * [c.attentions[0].n_kv_heads * c.attentions[0].head_dim]
                )
            )
            out = []
            for g in range(c.attentions[0].n_kv_heads):
                h = layer, g
                self.k[h].append(k[g])
                self.v[h].append(v[g])
                self.seen[h].append(t)
                self.position[h][t], self.score[h][t], self.age[h][t] = position, 0.0, 0
                seen = self.seen[h]
                self.turned[h][t] = self.rotate(k[g], position)
                keys = torch.stack([self.turned[h][i] for i in seen])
                values = torch.stack([self.v[h][i] for i in seen])
                per = c.attentions[0].n_heads // c.attentions[0].n_kv_heads
                for j in range(per):
                    p = (
                        keys @ self.rotate(q[g * per + j], position) / c.attentions[0].head_dim ** 0.5
                    ).softmax(0)
                    out.append(p @ values)
                    for i, weight in zip(seen, p.tolist(), strict=True):
                        self.score[h][i] += weight
                for i in seen:
                    self.age[h][i] += 1
            x = x + b.o[0] @ torch.cat(out)
            gate, up = (b.gate_up[0] @ norm(x, b.mlp_norm)).chunk(2)
            x = x + b.down[0] @ (torch.nn.functional.silu(gate) * up)
        self.tokens += 1
        self.next_position += 1
        return (self.w.head[0] @ norm(x, self.w.norm)).numpy()


@pytest.mark.parametrize("name", ["h2o", "window"])
@pytest.mark.parametrize("trained", [10**9, 150])
def test_logits_are_those_of_attention_over_what_is_kept(name, trained):
    with tiny_model(ctx=256, backend="reference") as m, torch.inference_mode():
        m.engine.trained_context = trained
        policy = EvictionPolicy(name, 96, 4, 40)
        dense, branch = Dense(m, policy, trained), m.engine.branch(policy)
        for i, token in enumerate(TEXT[:210]):
            got = m.engine.run(branch, [token], 0)[0]
            np.testing.assert_allclose(got, dense.step(token), atol=2e-3, err_msg=f"token {i}")
            assert branch.slots <= 96
        assert branch.evicted == 210 - branch.slots > 0
        for h, tokens in dense.seen.items():
            kept = sorted(dense.position[h][t] for t in tokens)
            assert sorted(branch.ledger.positions[h].tolist()) == kept
            assert sorted(branch.ledger.tokens[h].tolist()) == sorted(tokens)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_budget_that_is_never_reached_changes_nothing(backend):
    with tiny_model(ctx=600, backend=backend, context_length=600) as m:
        plain, watched = m.engine.branch(), m.engine.branch(EvictionPolicy.of("h2o", 256))
        for part in (TEXT[:100], TEXT[100:101], TEXT[101:200], TEXT[200:256]):
            np.testing.assert_array_equal(m.engine.run(plain, part, 0), m.engine.run(watched, part, 0))
        assert watched.evicted == 0


def ids_of(model, prompt, budget=128, **sampling):
    """Token ids and Done of an answer under a budget, and what was noticed."""
    branch = model.engine.branch(EvictionPolicy.of("h2o", budget))
    from tinychat.engine.sampling import SamplingParams

    draft = sampling.pop("draft", "none")
    events = list(
        model.engine.generate(branch, prompt, SamplingParams(**sampling), speculator=model.speculator(draft))
    )
    return events[-1].completion.token_ids, events[-1], [e.message for e in events if isinstance(e, Notice)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_given_up_does_not_depend_on_drafts_chunks_or_threads(temperature, monkeypatch):
    """Also where the answer repeats itself, so that n-gram drafts are accepted."""
    settings_ = dict(temperature=temperature, seed=3, max_tokens=150, top_k=2)
    prompt = (TEXT[:24] * 20)[:400]
    results = []
    for chunk, draft in ((None, "none"), (16, "none"), (64, "ngram"), (None, "ngram")):
        with tiny_model(ctx=512, backend="cpu", eos_ids=()) as m:
            m.tokenizer.eos_ids = frozenset()
            m.draft_tokens = 7 if draft == "ngram" else None
            if chunk:
                monkeypatch.setattr(m.engine.scheduler, "chunk_size", lambda _, n=chunk: n)
            ids, done, notices = ids_of(m, prompt, draft=draft, **settings_)
            results.append(ids)
            assert done.stats.evicted_tokens > 300
            assert len(notices) == 1
            if draft == "ngram":
                assert done.stats.drafted_tokens > 50
    assert results.count(results[0]) == 4


def test_a_prompt_longer_than_the_budget_is_read_to_its_end():
    with tiny_model(ctx=256, backend="cpu") as m:
        ids, done, _ = ids_of(m, TEXT, temperature=0, max_tokens=3)
        assert (done.stats.prompt_tokens, done.stats.generated_tokens) == (600, len(ids))
        assert done.stats.evicted_tokens >= 600 - 128


def test_without_a_policy_the_context_is_full_and_says_so():
    with tiny_model(ctx=64, backend="cpu") as m:
        m.tokenizer.eos_ids = frozenset()
        *_, done = m.generate(TEXT[:50], temperature=0)
        assert (done.finish_reason, done.stats.evicted_tokens) == ("context_full", 0)


# A conversation


def said(session, text, **sampling):
    """(text, done, notices) of an answer."""
    events = list(session.send(text, **sampling) if text else session.regenerate(**sampling))
    return events[-1].completion.text, events[-1], [e.message for e in events if isinstance(e, Notice)]


@pytest.fixture
def chatty():
    """A model that never ends its turn by itself."""
    with tiny_model(ctx=256, backend="cpu") as m:
        m.tokenizer.eos_ids = frozenset()
        yield m


def test_a_chat_outgrows_its_context_with_one_notice(chatty):
    s = chatty.session(system="Be brief.", draft="none", temperature=0, max_tokens=60)
    notices, evicted = [], []
    for i in range(8):
        _, done, new = said(s, f"Question {i}")
        notices += new
        evicted.append(done.stats.evicted_tokens)
        assert done.finish_reason == "length"
    assert len(notices) == 1
    assert "given up" in notices[0]
    assert evicted == sorted(evicted)
    assert evicted[-1] > 200


def test_an_answer_tells_what_was_given_up_of_each_message(chatty):
    s = chatty.session(system="Be brief.", draft="none", temperature=0, max_tokens=60)
    for i in range(4):
        _, done, _ = said(s, f"Question {i}")
        if not s._branch.evicted:
            assert done.stats.given_up == []
            assert "given_up" not in done.stats.as_dict()
    nodes, found = s.tree.messages(), done.stats.given_up
    assert len(found) == len(nodes) == 8
    assert [n for _, n in found[1::2]] == [60, 60, 60, 60 - 1]  # the last token is not in memory yet
    assert [n for _, n in found[2::2]] == [len(answer.prompt_ids) for answer in nodes[3::2]]
    ledger, at = s._branch.ledger, ledger_edges(s)
    for (gone, n), a, b in zip(found, at, at[1:], strict=False):
        kept = np.mean([[sum(a <= t < b for t in head) for head in layer] for layer in ledger.tokens])
        assert (gone, n) == (round(b - a - kept), b - a)
    assert found[-1][0] == 0  # the newest stay
    assert sum(gone for gone, _ in found) == pytest.approx(s._branch.evicted, abs=4)


def ledger_edges(session):
    """Where the messages begin in the tokens, and where the last one ends, by the ids that they keep."""
    ends = [session._branch.ledger.policy.pinned]
    at = 0
    for answer in session.tree.messages()[1::2]:
        at += len(answer.prompt_ids)
        ends += [at, at + len(answer.ids)]
        at = ends[-1]
    return [*ends[:-1], len(session._branch)]


def test_the_system_prompt_is_pinned(chatty):
    system = "Speak of nothing but ships and the sea."
    s = chatty.session(system=system, draft="none", temperature=0, max_tokens=60)
    for i in range(8):
        said(s, f"Question {i}")
    text = chatty.template.render([{"role": "system", "content": s.system}], False)
    pinned = len(chatty.template.encode(text))
    positions = np.sort(s._branch.ledger.positions, axis=-1)[..., :pinned]
    assert s._branch.ledger.policy.pinned == pinned > 40
    assert (positions == np.arange(pinned)).all()


def test_regenerate_after_eviction_starts_from_the_same_state(chatty):
    s = chatty.session(draft="none", temperature=0, max_tokens=60, kv_budget=160)
    for i in range(6):
        first, done, _ = said(s, f"Question {i}")
    assert done.stats.evicted_tokens > 200
    again, redone, notices = said(s, None)
    assert again == first
    assert notices == []
    assert redone.stats.evicted_tokens == done.stats.evicted_tokens
    assert redone.stats.cached_tokens == done.stats.cached_tokens


def test_going_further_back_reads_again_and_says_so(chatty):
    s = chatty.session(draft="none", temperature=0, max_tokens=60, kv_budget=160)
    for i in range(6):
        said(s, f"Question {i}")
    events = list(s.edit(2, "Another question"))
    assert any("read again" in e.message for e in events if isinstance(e, Notice))
    assert isinstance(events[-1], Done)


def test_policy_none_ends_a_chat_where_its_context_does(chatty):
    s = chatty.session(draft="none", temperature=0, kv_policy="none")
    _, done, _ = said(s, "Hello")
    assert done.finish_reason == "context_full"


def test_budgets_that_cannot_work_are_refused_with_the_numbers(chatty):
    with pytest.raises(UsageError, match="larger than the context of 256"):
        chatty.session(kv_budget=512)
    with pytest.raises(UsageError, match="4 are pinned"):
        chatty.session(kv_budget=64)
    s = chatty.session(system="word " * 30, kv_budget=160)
    with pytest.raises(UsageError, match=r"budget of 160 tokens is too small: 1\d\d are pinned") as e:
        list(s.send("hi"))
    assert "--kv-budget" in e.value.todo
    with pytest.raises(UsageError, match="kv_policy"):
        chatty.session(kv_policy="lru")


# The ledger alone


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["h2o", "window", "random"]),
    st.lists(st.sampled_from([1, 3, 16, 33]), min_size=3, max_size=14),
)
def test_the_ledger_keeps_what_it_should_whatever_moves(seed, name, appended):
    """The survivors of every eviction, and what is known of them, against lists of tokens."""
    rng = np.random.default_rng(seed)
    policy = EvictionPolicy(name, 128, 4, 32)
    ledger = Ledger(policy, 2, 3)
    truth = {(i, j): {} for i in range(2) for j in range(3)}  # token → [score, born]
    tokens = rows = 0
    for n in appended:
        if ledger.size + n > 128:
            give_up = -(-(ledger.size + n - 128) // BLOCK) * BLOCK
            before = ledger.positions.copy()
            src, dst = ledger.evict(give_up)
            for h, known in truth.items():
                slots = before[h].copy()
                moved = src[h] >= 0
                slots[dst[h][moved]] = slots[src[h][moved]]
                assert (slots[: ledger.size] == ledger.positions[h]).all()
                free = [t for t in known if 4 <= t < tokens - 32]
                kept = set(ledger.positions[h].tolist())
                gone = set(known) - kept
                assert len(gone) == give_up
                assert gone <= set(free)
                if name == "window":
                    assert gone == set(sorted(free)[:give_up])
                if name == "h2o":
                    rate = {t: known[t][0] / max(1, rows - known[t][1]) for t in free}
                    limit = max(rate[t] for t in gone)
                    assert all(rate[t] >= limit - 1e-6 for t in free if t in kept)
                for t in gone:
                    del known[t]
        scores = rng.random((n, 2, 3, ledger.size + n)).astype(np.float32)
        drafted = n > 1 and rng.random() < 0.5
        for h, known in truth.items():
            held = [*ledger.positions[h].tolist(), *range(tokens, tokens + n)]
            for i in range(n):
                known[tokens + i] = [0.0, rows + i]
            for slot, t in enumerate(held):
                known[t][0] += float(scores[:, h[0], h[1], slot].sum())
        if drafted:  # two more are taken back
            more = rng.random((n + 2, 2, 3, ledger.size + n + 2)).astype(np.float32)
            more[:n, ..., : ledger.size + n] = scores
            ledger.append(n, n, more)
        else:
            tally = ledger.tally(n)
            for row in scores:
                tally[0, ..., : ledger.size + n] += row
            ledger.append(n, n)
        if rng.random() < 0.3:  # two tokens that nobody keeps, and which see nothing
            ledger.tally(2)[0, ..., ledger.size : ledger.size + 2] += 1
            ledger.append(2)
            ledger.truncate(ledger.size - 2)
        if rng.random() < 0.3:
            ledger = ledger.copy()
        assert not ledger._scores[..., ledger.size :].any()
        tokens, rows = tokens + n, rows + n
        assert ledger.size <= 128
        for h, known in truth.items():
            assert sorted(ledger.positions[h].tolist()) == sorted(known)
            assert (ledger.tokens[h] == ledger.positions[h]).all()  # nothing was numbered anew


@pytest.mark.parametrize("n", [40, 90, 300, 600])
def test_what_is_given_up_does_not_depend_on_what_the_cache_has(n):
    """The same prompt again, and after others that begin like it: found in the cache, and given up alike."""
    with tiny_model(ctx=700, backend="cpu", context_length=700) as m:
        m.tokenizer.eos_ids = frozenset()
        options = dict(temperature=0, max_tokens=150)
        first, done, _ = ids_of(m, TEXT[:n], **options)
        assert done.stats.cached_tokens == 0
        assert done.stats.evicted_tokens > 0
        again, done, _ = ids_of(m, TEXT[:n], **options)
        assert again == first
        list(m.generate(TEXT[: n - 8] + TEXT[:20], temperature=0, max_tokens=1))
        third, done, _ = ids_of(m, TEXT[:n], **options)
        assert third == first
        assert (done.stats.cached_tokens > 0) == (n > 48)


LAYERS = {
    "a window": {"window": 32, "windowed_layers": (0,)},
    "windows only": {"window": 48, "windowed_layers": (0, 1)},
    "without positions": {"unrotated_layers": (1,)},
    "the others without positions": {
        "window": 40,
        "windowed_layers": (0,),
        "unrotated_layers": (1,),
        "local_rope": RopeConfig(dim=16, theta=500.0),
    },
    "a local rope": {"window": 40, "windowed_layers": (0,), "local_rope": RopeConfig(dim=16, theta=500.0)},
}


@pytest.mark.parametrize("layers", LAYERS)
def test_a_chat_never_ends_whatever_its_layers_see(layers):
    texts = []
    for draft in ("none", "ngram"):
        with tiny_model(ctx=256, backend="cpu", **LAYERS[layers]) as m:
            m.tokenizer.eos_ids = frozenset()
            s = m.session(temperature=0, draft=draft, kv_budget=128, max_tokens=300)
            text, done, notices = said(s, "hello")
            texts.append(text)
            assert done.finish_reason == "length"
            assert s._branch.position <= 256 < len(s._branch)
            assert bool(notices) == (done.stats.evicted_tokens > 0) == (layers != "windows only")
            _, again, _ = said(s, "and then?")
            assert again.finish_reason == "length"
    assert texts[0] == texts[1]


@pytest.mark.parametrize("layers", ["windows only", "the others without positions"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numbering_positions_anew_changes_no_distance_within_a_window(layers, backend):
    ids = np.random.default_rng(3).integers(0, 256, 500).tolist()
    outs = []
    for trained in (256, 4096):
        with tiny_model(ctx=256, backend=backend, **LAYERS[layers]) as m:
            m.engine.trained_context = trained
            branch = m.engine.branch(EvictionPolicy.of("window", 128))
            rows = [m.engine.run(branch, ids[i : i + 16], 0) for i in range(0, len(ids), 16)]
            assert (branch.position == len(ids)) == (trained == 4096)
            outs.append(np.concatenate(rows))
    error = np.abs(outs[0] - outs[1]).max() / np.abs(outs[1]).max()
    assert 0 < error < (1e-4 if backend == "reference" else 2e-2)


def test_keys_that_turn_by_more_than_their_distance_are_all_kept():
    with tiny_model(ctx=256, backend="cpu", rope=RopeConfig(dim=16, kind="dynamic", factor=2.0)) as m:
        for asked in (dict(kv_budget=128), dict(kv_policy="h2o")):
            with pytest.raises(UsageError, match="keeps all tokens"):
                m.session(**asked)
        m.tokenizer.eos_ids = frozenset()
        _, done, _ = said(m.session(temperature=0, draft="none"), "hello")
        assert done.finish_reason == "context_full"


def test_what_was_edited_away_has_no_vote(chatty):
    """A message changed before anything was given up: later evictions are those of a chat that began so."""
    ask = "What is kept of a long conversation, and what is given up first? " * 2
    s = chatty.session(draft="none", temperature=0, max_tokens=30, kv_budget=256)
    said(s, "Something else entirely, long enough to be heard.")
    said(s, "And more of it.")
    _, done = list(s.edit(0, ask))[-2:]
    assert done.stats.evicted_tokens == 0
    with tiny_model(ctx=256, backend="cpu") as other:
        other.tokenizer.eos_ids = frozenset()
        fresh = other.session(draft="none", temperature=0, max_tokens=30, kv_budget=256)
        texts = [said(fresh, ask)[0]]
        assert texts == [done.completion.text]
        for i in range(6):
            (ours, done, _), (theirs, _, _) = (said(x, f"Question {i}") for x in (s, fresh))
            assert ours == theirs
            np.testing.assert_array_equal(s._branch.ledger.positions, fresh._branch.ledger.positions)
        assert done.stats.evicted_tokens > 100


def test_asking_again_does_not_vote_twice(chatty):
    """Regenerating runs one token, and what is given up later is what it would have been."""
    s = chatty.session(draft="none", temperature=0, max_tokens=30, kv_budget=256)
    said(s, "What is kept of a long conversation?")
    first, _, _ = said(s, "And what is given up?")
    for _ in range(2):  # stopped before it has begun: nothing was asked
        stream = s.regenerate()
        s.cancel()
        list(stream)
    for _ in range(3):
        again, done, _ = said(s, None)
        assert again == first
        assert done.stats.cached_tokens == done.stats.prompt_tokens - 1
    with tiny_model(ctx=256, backend="cpu") as other:
        other.tokenizer.eos_ids = frozenset()
        once = other.session(draft="none", temperature=0, max_tokens=30, kv_budget=256)
        said(once, "What is kept of a long conversation?")
        said(once, "And what is given up?")
        for i in range(6):
            (ours, done, _), (theirs, _, _) = (said(x, f"Question {i}") for x in (s, once))
            assert ours == theirs
            np.testing.assert_array_equal(s._branch.ledger.positions, once._branch.ledger.positions)
            np.testing.assert_array_equal(s._branch.ledger.scores, once._branch.ledger.scores)
        assert done.stats.evicted_tokens > 100


@pytest.mark.parametrize("ctx", [96, 99, 100, 104, 111, 112, 113])
def test_a_conversation_begins_in_a_context_of_any_size(ctx):
    with tiny_model(ctx=ctx, backend="cpu") as m:
        *_, done = m.session(temperature=0, max_tokens=200).send("hi")
        assert done.finish_reason in ("context_full", "length", "stop")
