"""`Model.chat`: an answer as a whole, and the same one event by event."""

from __future__ import annotations

import threading

import pytest
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.base.events import Done, TextDelta


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=256, backend="cpu") as m:
        yield m


def test_a_stream_says_what_the_whole_says(model):
    whole = model.chat("Hello.", max_tokens=20, temperature=0)
    *said, done = model.chat("Hello.", max_tokens=20, temperature=0, stream=True)
    assert isinstance(done, Done)
    assert done.completion.token_ids == whole.token_ids
    assert "".join(e.text for e in said) == whole.text == done.completion.text
    assert [e.token_id for e in said if isinstance(e, TextDelta)][: len(whole.token_ids)] == whole.token_ids


def test_settings_are_checked_before_the_stream_is_asked_for_its_first_event(model):
    for wrong in ({"temperature": -1}, {"temprature": 1}, {"stream": "yes"}):
        with pytest.raises(UsageError):
            model.chat("Hello.", **{"stream": True, **wrong})


def test_a_request_is_cancelled_by_any_thread(model):
    cancel = threading.Event()
    events = model.request("Hello.", max_tokens=100, temperature=0).events(model, cancel)
    first = next(e for e in events if isinstance(e, TextDelta))
    cancel.set()
    *_, done = events
    assert first
    assert done.finish_reason == "cancelled"
    assert len(done.completion.token_ids) < 100
