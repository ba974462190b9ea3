"""Addresses of servers, names of their models, and where a key comes from and goes to."""

from __future__ import annotations

import os

import pytest

from tinychat.base.errors import TinychatError, UsageError
from tinychat.process.address import Address, KeySource, full_name, split_name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("HTTPS://Host.Example/", "https://host.example/v1"),
        ("https://host:443/api/v1/", "https://host/api/v1"),
        ("http://host:80/v1/chat/completions", "http://host/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("10.0.0.1", "http://10.0.0.1/v1"),
    ],
)
def test_an_address_is_written_in_one_way(typed, meant):
    address = Address.parse(typed)
    assert str(address) == meant
    assert Address.parse(str(address)) == address
    assert split_name(full_name("org/x", address)) == ("org/x", address)


@pytest.mark.parametrize(
    "typed",
    ["", " ", "http://", "ftp://host", "http://user:secret@host", "http://host:0", "http://host:99999",
     "http://ho st", "http://host/?q", "http://host/#x", "http://host/\x1b[31m", "http://höst", "h" * 600,
     "file:///etc/passwd", "http://host:port", "http://[::1", "http://host/a b"],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_showing_a_password(typed):
    with pytest.raises(UsageError) as e:
        Address.parse(typed)
    assert "secret" not in str(e.value)
    assert "\x1b" not in str(e.value)


def test_names_without_an_address_are_models_of_this_machine():
    for name in ("smollm2-135m", "a@b", "x@http", "x@http://", "x@http://a b", "x@https://h:0"):
        assert split_name(name) == (name, None)
    assert split_name("a@http://h@http://x")[0] == "a@http://h"


HTTP, HTTPS = Address.parse("http://there:8000"), Address.parse("https://there")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("TINYCHAT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_the_key_of_openai_goes_over_https_alone_unless_it_is_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-o")
    assert KeySource(HTTP).key(HTTP) == (None, "")
    assert KeySource(HTTPS).key(HTTPS) == ("sk-o", "OPENAI_API_KEY")
    named = KeySource(HTTP, "OPENAI_API_KEY")
    assert named.key(HTTP) == ("sk-o", "OPENAI_API_KEY")
    assert named.key(Address.parse("http://elsewhere")) == (None, "")  # it was named for one server
    monkeypatch.setenv("TINYCHAT_API_KEY", "own\n")
    assert KeySource(HTTP).key(HTTP) == ("own", "TINYCHAT_API_KEY")


def test_a_file_with_a_key_is_read_by_nobody_else(tmp_path):
    file = tmp_path / "key"
    file.write_text("sk-f\n")
    file.chmod(0o644)
    source = KeySource(HTTP, None, file)
    with pytest.raises(UsageError, match="Others may read") as e:
        source.key(HTTP)
    assert e.value.todo == f"chmod 600 {file}"
    file.chmod(0o600)
    assert source.key(HTTP) == ("sk-f", str(file))
    assert source.key(HTTPS) == (None, "")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path in (fifo, tmp_path, tmp_path / "none"):
        with pytest.raises(TinychatError):
            KeySource(HTTP, None, path).key(HTTP)


def test_what_is_no_key_is_refused_and_not_shown(monkeypatch):
    for key in ("two words", "line\r\nX-Evil: 1", "kéy", "k" * 5000):
        monkeypatch.setenv("TINYCHAT_API_KEY", key)
        with pytest.raises(UsageError) as e:
            KeySource(HTTP).key(HTTP)
        assert key not in str(e.value)
