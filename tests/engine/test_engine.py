"""The engine loop on a tiny random Llama, against the same thing computed the long way round."""

from __future__ import annotations

import gc
import threading
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_model

from tinychat.base.errors import UsageError
from tinychat.base.events import Done, Reading, TextDelta
from tinychat.engine.sampling import SamplingParams, sample
from tinychat.text.stopping import cut_ids

TOKENIZER = byte_tokenizer()
ID_OF = {TOKENIZER.token_bytes(i): i for i in range(256)}
END = 257


def spell(text):
    """The ids of a text or of bytes, one a byte."""
    raw = text.encode() if isinstance(text, str) else text
    return [ID_OF[bytes([b])] for b in raw]


PROMPT = spell("It was a dark and stormy night; the rain fell in torrents.")


@pytest.fixture(scope="module")
def model():
    with tiny_model(grows=False) as m:
        yield m


def naive(model, prompt, n, params=None, seed=0):
    """n tokens (fewer if the turn ends), every one from a full recomputation of everything before it."""
    ids = list(prompt)
    while len(ids) - len(prompt) < n:
        row = model.logits(ids)[-1]
        token = int(row.argmax()) if params is None else sample(row, params, seed, len(ids))
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


def answer(model, prompt, **sampling):
    """(the events' texts joined, Done) of a generation; checks what holds for every one."""
    events = list(model.generate(prompt, **sampling))
    done = events.pop()
    assert isinstance(done, Done)
    while events and isinstance(events[0], Reading):  # a prompt of several chunks says how far it is
        assert 0 < events.pop(0).tokens < len(prompt)
    assert all(isinstance(e, TextDelta) for e in events)
    text = "".join(e.text for e in events)
    c, s = done.completion, done.stats
    assert (c.text, c.finish_reason, c.stats) == (text, done.finish_reason, s)
    assert s.generated_tokens == sum(e.token_id is not None for e in events)
    return text, done


# What is computed


def test_greedy_generation_equals_full_recomputation(model):
    text, done = answer(model, PROMPT, temperature=0, max_tokens=60)
    assert done.completion.token_ids == naive(model, PROMPT, 60)
    assert text == model.tokenizer.decode(done.completion.token_ids)


def test_sampled_generation_equals_full_recomputation(model):
    params = SamplingParams(temperature=1.0, top_k=50)
    for seed in range(4):
        _, done = answer(model, PROMPT, temperature=1.0, top_k=50, seed=seed, max_tokens=40)
        assert done.completion.token_ids == naive(model, PROMPT, 40, params, seed)


def test_repetition_penalty_counts_prompt_and_answer(model):
    _, done = answer(model, PROMPT, temperature=0, repeat_penalty=100.0, max_tokens=50)
    ids = list(PROMPT)
    for token in done.completion.token_ids:
        row = model.logits(ids)[-1]
        seen = sorted(set(ids))
        row[seen] = np.where(row[seen] > 0, row[seen] / 100, row[seen] * 100)
        assert token == row.argmax()
        ids.append(token)


def test_presence_and_frequency_count_the_answer_alone_and_a_bias_is_added(model):
    options = dict(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={ID_OF[b"e"]: 0.3, END: -100})
    _, done = answer(model, PROMPT, temperature=0, max_tokens=50, **options)
    ids, repeated = list(PROMPT), 0
    for token in done.completion.token_ids:
        row = model.logits(ids)[-1]
        row[ID_OF[b"e"]] += np.float32(0.3)
        row[END] -= 100
        for i in set(said := ids[len(PROMPT) :]):
            row[i] -= np.float32(0.5 + 0.25 * said.count(i))
        assert token == row.argmax()
        repeated += token in said
        ids.append(token)
    assert len(done.completion.token_ids) == 50
    assert repeated > 5
    plain = answer(model, PROMPT, temperature=0, max_tokens=50)[1].completion.token_ids
    assert plain != done.completion.token_ids


def test_seed_alone_decides(model):
    texts = [answer(model, PROMPT, seed=7, max_tokens=30)[0] for _ in range(2)]
    # With the prefix in the cache (second run), without it, and with other chunks of prefill.
    with tiny_model() as fresh:
        texts.append(answer(fresh, PROMPT, seed=7, max_tokens=30)[0])
    for rows in (1, 5, 16):
        with tiny_model() as chunked:
            chunked.backend.max_rows = rows
            texts.append(answer(chunked, PROMPT, seed=7, max_tokens=30)[0])
    assert len(set(texts)) == 1
    assert answer(model, PROMPT, seed=8, max_tokens=30)[0] != texts[0]
    unseeded = {answer(model, PROMPT, max_tokens=30)[0] for _ in range(6)}
    assert len(unseeded) > 2  # some may end with their first token


def test_logits_do_not_depend_on_chunks_or_on_what_is_cached(model):
    ids = (PROMPT * 3)[:150]
    before = model.logits(ids)
    list(model.generate(ids, temperature=0, max_tokens=3))
    np.testing.assert_allclose(model.logits(ids), before, rtol=1e-4, atol=1e-4)
    with tiny_model() as chunked:
        chunked.backend.max_rows = 16
        np.testing.assert_allclose(chunked.logits(ids), before, rtol=1e-4, atol=1e-4)


def test_the_same_prompt_again_is_mostly_cached(model):
    _, first = answer(model, spell("x" * 64), temperature=0, max_tokens=2)
    _, second = answer(model, spell("x" * 64), temperature=0, max_tokens=2)
    assert first.stats.prompt_tokens == second.stats.prompt_tokens == 64
    assert second.stats.cached_tokens >= 48  # whole blocks, and the last token always runs
    assert first.completion.token_ids == second.completion.token_ids


# How an answer ends


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_max_tokens(model, n):
    text, done = answer(model, PROMPT, temperature=0, max_tokens=n)
    assert done.finish_reason == "length"
    assert done.completion.token_ids == naive(model, PROMPT, n)
    assert done.stats.generated_tokens == n
    assert text == model.tokenizer.decode(done.completion.token_ids)


class Scripted:
    """Makes a model say given tokens, whatever it computes: its argmax is overwritten."""

    def __init__(self, model, prompt_length, tokens):
        self.backend, self.at, self.tokens = model.backend, prompt_length, list(tokens)
        self.inner = model.backend.step

    def step(self, step):
        out = self.inner(step)
        (span,) = step.spans
        for i in range(len(out)):
            position = span.position + span.logits_from + i + 1 - self.at
            out[i] = -10.0
            out[i, self.tokens[position] if 0 <= position < len(self.tokens) else END] = 10.0
        return out

    def __enter__(self):
        self.backend.step = self.step
        return self

    def __exit__(self, *_):
        del self.backend.step


def say(model, text, prompt=PROMPT, **sampling):
    with Scripted(model, len(prompt), spell(text)):
        return answer(model, prompt, **{"temperature": 0, **sampling})


def test_the_stop_token_ends_the_answer_and_is_not_part_of_it(model):
    text, done = say(model, b"fine.")
    assert (text, done.finish_reason) == ("fine.", "stop")
    assert done.completion.token_ids == spell("fine.")
    assert done.stats.generated_tokens == 5


def test_an_answer_may_be_nothing(model):
    text, done = say(model, [])
    assert (text, done.finish_reason, done.completion.token_ids) == ("", "stop", [])


def test_a_stop_token_comes_before_the_length_limit(model):
    assert say(model, b"abc", max_tokens=4)[1].finish_reason == "stop"
    assert say(model, b"abc", max_tokens=3)[1].finish_reason == "length"


def test_stop_strings_across_tokens(model):
    text, done = say(model, b"one two\n\nUser: three", stop=["\nUser:"])
    assert (text, done.finish_reason) == ("one two\n", "stop")
    # The conversation's ids end with the text, though more tokens were computed.
    assert done.completion.token_ids == spell("one two\n")
    assert done.stats.generated_tokens == len(b"one two\n\nUser:")


def test_what_may_begin_a_stop_string_waits_and_comes_in_the_end(model):
    with Scripted(model, len(PROMPT), spell("a##")):
        events = list(model.generate(PROMPT, temperature=0, stop="###"))
    assert [(e.text, getattr(e, "token_id", "done")) for e in events] == [
        ("a", *spell("a")),
        ("", *spell("#")),
        ("", *spell("#")),
        ("##", None),
        ("", "done"),
    ]
    assert events[-1].completion.token_ids == spell("a##")


def test_a_stop_string_that_the_length_limit_completes(model):
    text, done = say(model, b"ab", stop=["ab", "abc"], max_tokens=2)
    assert (text, done.finish_reason) == ("", "stop")


def test_a_stop_string_inside_a_character(model):
    text, done = say(model, "a😀b", stop="😀")
    assert (text, done.completion.token_ids) == ("a", spell("a"))
    text, done = say(model, "a😀b", stop="\ufffd")  # half a character is not a broken one
    assert text == "a😀b"


@given(st.text(min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_characters_are_never_broken(text):
    # Every character in as many tokens as it has bytes.
    with tiny_model() as model, Scripted(model, len(PROMPT), spell(text)):
        events = list(model.generate(PROMPT, temperature=0))
    pieces = [e.text for e in events]
    assert "".join(pieces) == text
    assert all(len(p) <= 1 for p in pieces)


def test_an_answer_cut_inside_a_character_still_matches_its_ids(model):
    text, done = say(model, "a😀", max_tokens=3)
    assert done.completion.token_ids == spell("a😀")[:3]
    assert text == model.tokenizer.decode(done.completion.token_ids)


@given(st.binary(max_size=24), st.integers(0, 24))
@settings(max_examples=200)
def test_cut_ids_spell_the_text(raw, at):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(raw.decode("utf-8", "replace"))
    text = tokenizer.decode(ids)[:at]
    cut = cut_ids(tokenizer, ids, text)
    assert tokenizer.decode(cut) == text
    assert cut == tokenizer.encode(text)


def test_the_context_is_filled_to_its_end_and_no_further():
    with tiny_model(ctx=64) as m:
        prompt = PROMPT[:50]
        with Scripted(m, 50, spell("y" * 100)):
            _, done = answer(m, prompt, temperature=0)
        assert done.finish_reason == "context_full"
        # 14 tokens fit beside the prompt; the last one is said and needs no room.
        assert done.stats.generated_tokens == 15
        _, done = answer(m, prompt, temperature=0, max_tokens=15)
        assert done.completion.token_ids == naive(m, prompt, 14) + done.completion.token_ids[14:]
        assert len(answer(m, PROMPT + PROMPT[:6], temperature=0)[1].completion.token_ids) == 1


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs():
    with tiny_model(ctx=32) as m:
        m.backend.step = m.backend.step_greedy = None
        for call in (m.generate, m.logits):
            with pytest.raises(UsageError, match=r"33 .* 32"):
                call([1] * 33)


@pytest.mark.parametrize("bad", [[], [258], [-1], [1, 2, 10**9]])
def test_impossible_ids_are_refused(model, bad):
    for call in (model.generate, model.logits):
        with pytest.raises(UsageError):
            call(bad)


def test_impossible_parameters_are_refused_at_the_call(model):
    with pytest.raises(UsageError, match="temperature"):
        model.generate(PROMPT, temperature=-1)
    with pytest.raises(UsageError, match="temprature"):
        model.generate(PROMPT, temprature=1)
    with pytest.raises(UsageError, match="not a message"):
        model.chat(["hi"])
    with pytest.raises(UsageError, match="not a message"):
        model.chat([{"role": "user"}])


# Stats


def test_stats_add_up(model):
    _, done = answer(model, spell("a fresh prompt, not seen before"), temperature=0, max_tokens=12)
    s = done.stats
    assert (s.prompt_tokens, s.cached_tokens, s.generated_tokens) == (31, 0, 12)
    assert s.ttft_s > 0
    assert s.tpot_s > 0
    assert s.prefill_tps >= 31 / s.ttft_s
    assert s.decode_tps == pytest.approx(1 / s.tpot_s)
    assert 0 < s.kv_bytes <= model.backend.pools[0].kv.nbytes
    assert s.kv_bytes % model.backend.kv_bytes_per_block() == 0
    assert s.peak_rss_bytes > 50_000_000
    assert s.as_dict()["generated_tokens"] == 12


# Several at once


def test_two_generations_interleave(model):
    prompts = PROMPT, PROMPT[::-1]
    alone = [answer(model, p, temperature=0, max_tokens=25)[1].completion.token_ids for p in prompts]
    streams = [model.generate(p, temperature=0, max_tokens=25) for p in prompts]
    together = [[], []]
    for pair in zip_longest(*streams):
        for ids, event in zip(together, pair, strict=True):
            ids += event.completion.token_ids if isinstance(event, Done) else []
    assert together == alone


def test_threads_share_a_model(model):
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(8)]
    expected = [naive(model, p, 20) for p in prompts]
    got: dict[int, object] = {}

    def work(i):
        try:
            got[i] = list(model.generate(prompts[i], temperature=0, max_tokens=20))[-1].completion.token_ids
        except BaseException as e:
            got[i] = e

    for _ in range(3):
        # 8 × 78 tokens want 40 blocks; the pool has 18: some wait for others, none gets a wrong answer.
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert got == dict(enumerate(expected))


def test_an_answer_that_nobody_reads_on_gives_way_and_is_read_again(monkeypatch):
    monkeypatch.setattr("tinychat.engine.engine.PATIENCE_SECONDS", 0.0)
    with tiny_model(ctx=64, grows=False) as m:  # 6 blocks
        streams = [m.generate(spell(c * 58), temperature=0, max_tokens=6) for c in "ab"]
        events = [
            [next(s) for _ in range(3)] for s in streams
        ]  # in one thread: neither can wait for the other
        for rest, stream in zip(events, streams, strict=True):
            rest += stream
        expected = [naive_fresh(spell(c * 58), 6) for c in "ab"]
        assert [e[-1].completion.token_ids for e in events] == expected
        assert all(e[-1].stats.prompt_tokens == 58 for e in events)


def naive_fresh(prompt, n):
    with tiny_model(ctx=64) as m:
        return naive(m, prompt, n)


def test_logits_begin_again_when_somebody_else_needed_their_place(monkeypatch):
    monkeypatch.setattr("tinychat.engine.engine.PATIENCE_SECONDS", 0.0)
    with tiny_model(ctx=64, grows=False) as m:
        ids = list(range(60))
        expected = m.logits(ids)
        m.backend.max_rows = 16
        inner, calls, other = m.engine.run, [], []

        def run(branch, part, *args, **kwargs):
            out = inner(branch, part, *args, **kwargs)
            if not other:
                calls.append(len(part))
            if len(calls) == 3 and not other:
                other.append("speaks")
                list(m.generate([5] * 64, temperature=0))
                other.clear()
            return out

        m.engine.run = run
        np.testing.assert_allclose(m.logits(ids), expected, rtol=1e-4, atol=1e-4)
        assert calls == [16, 16, 16, 16, 16, 16, 12]


def test_dropped_generations_give_their_blocks_back():
    with tiny_model(ctx=64, grows=False) as m:
        for i in range(20):
            stream = m.generate([i] * 60, temperature=0)
            next(stream)
            del stream
            gc.collect()
        assert answer(m, [99] * 60, temperature=0, max_tokens=2)[1].stats.generated_tokens == 2


def test_a_failing_step_leaves_the_engine_usable(model):
    with tiny_model() as m:
        inner, count = m.backend.step, [0]

        def fails(step):
            count[0] += 1
            if count[0] == 6:
                raise RuntimeError("device lost")
            return inner(step)

        m.backend.step = fails
        stream = m.generate(PROMPT, temperature=0, max_tokens=20)
        with pytest.raises(RuntimeError, match="device lost"):
            list(stream)
        m.backend.step = inner
        assert answer(m, PROMPT, temperature=0, max_tokens=20)[1].completion.token_ids == naive(m, PROMPT, 20)


def test_a_closed_model_says_so():
    m = tiny_model()
    session = m.session()
    m.close()
    m.close()
    for use in (lambda: m.logits([1]), lambda: list(m.generate([1])), lambda: list(session.send("hi"))):
        with pytest.raises(UsageError, match="closed"):
            use()
    assert session.messages == []


def test_a_base_model_continues_text():
    with tiny_model(template=None) as m:
        reply = m.chat(
            [{"role": "user", "content": "abc"}, {"role": "user", "content": "def"}], temperature=0
        )
        assert reply.token_ids == answer(m, "abcdef", temperature=0)[1].completion.token_ids
