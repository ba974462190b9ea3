"""Who may ask, and how much a client can take: refused or bounded, and others are answered meanwhile."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import post, serving
from tiny import tiny_model

from tinychat.base.errors import TinychatError, UsageError
from tinychat.serve import bodies
from tinychat.serve.guard import host_of, is_loopback
from tinychat.serve.limits import Limits
from tinychat.serve.server import Address, listen

KEY = "correct-horse-battery"
CHAT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=256, backend="cpu", eos_ids=()) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


@pytest.fixture(scope="module")
def locked(model):
    with serving(model, key=KEY, origins=["https://chat.example.org"]) as s:
        yield s


@pytest.fixture(scope="module")
def strict(model):
    """A server with little patience and little room."""
    limits = Limits(
        header_time=0.3,
        body_time=0.3,
        send_time=0.3,
        connections=12,
        body=100_000,
        bodies=250_000,
        quiet_time=0.05,
    )
    with serving(model, limits=limits) as s:
        yield s


def answer(s: socket.socket) -> bytes:
    """Everything that comes until the server closes the connection."""
    out = b""
    try:
        while more := s.recv(65536):
            out += more
    except ConnectionError:
        pass
    s.close()
    return out


def still_answers(server):
    assert server.ask("/v1/chat/completions", CHAT)[0] == 200


# Who may ask


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_nothing_listens_beyond_loopback_without_a_key(host):
    with pytest.raises(UsageError, match="API key"):
        listen(Address(host, 0))
    sockets, local = listen(Address(host, 0, KEY))
    for s in sockets:
        s.close()
    assert not local


def test_an_address_that_cannot_be_had_is_an_error(server):
    for address in (
        Address("no.such.host.invalid", 0),
        Address("127.0.0.1", server.port),
        Address("x" * 300, 0),
    ):
        with pytest.raises(TinychatError, match="Cannot listen"):
            listen(address)


@pytest.mark.parametrize("key", ["short", "with a space in it", "grün" * 4, "line\nbreak-in-it"])
def test_keys_that_no_header_could_carry_are_refused(key):
    with pytest.raises(UsageError):
        Address(key=key)


def test_hosts_are_told_apart():
    local = ["localhost", "127.0.0.1", "127.8.8.8", "[::1]", "LOCALHOST", "localhost.", "app.localhost"]
    others = [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "0.0.0.0",
        "10.0.0.1",
        "",
        "[::]",
    ]
    assert all(is_loopback(h) for h in local)
    assert not any(is_loopback(h) for h in others)
    assert [host_of(h) for h in ("a:1", "[::1]:8", "[::1]", "a", "a:b")] == [
        "a",
        "[::1]",
        "[::1]",
        "a",
        "a:b",
    ]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.nip.io", "192.168.1.7:8080", ""]
)
def test_a_name_that_was_bound_to_this_machine_gets_nothing(server, host):
    for path in ("/v1/models", "/health", "/metrics", "/nothing"):
        status, said, _ = server.ask(path, headers={"Host": host})
        assert (status, said["error"]["code"]) == (403, "invalid_host")


def test_this_machines_own_names_are_answered(server):
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", f"[::1]:{server.port}"):
        assert server.ask("/v1/models", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_web_pages_get_nothing(server, headers):
    for path, body in (("/v1/models", None), ("/v1/chat/completions", CHAT)):
        status, said, found = server.ask(path, body, headers)
        assert (status, said["error"]["code"]) == (403, "origin")
        assert "access-control-allow-origin" not in found
    status, _, found = server.ask("/v1/chat/completions", headers=headers, method="OPTIONS")
    assert status in (403, 405)
    assert "access-control-allow-origin" not in found


def test_a_page_that_was_named_may_ask(locked):
    origin = {"Origin": "https://chat.example.org"}
    status, _, found = locked.ask("/v1/chat/completions", headers=origin, method="OPTIONS")
    assert (status, found["access-control-allow-origin"]) == (204, "https://chat.example.org")
    status, _, found = locked.ask("/v1/models", headers={**origin, "Authorization": f"Bearer {KEY}"})
    assert (status, found["access-control-allow-origin"]) == (200, "https://chat.example.org")
    assert locked.ask("/v1/models", headers=origin)[0] == 401
    assert locked.ask("/v1/models", headers={"Origin": "https://chat.example.org.evil"})[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer correct-horse-battér\xff"},
        {"x-api-key": "wrong"},
        {"x-api-key": "wrong", "Authorization": f"Bearer {KEY}"},
    ],
)
def test_whoever_has_no_key_is_told_so(locked, headers):
    for path, body in (
        ("/v1/models", None),
        ("/v1/chat/completions", CHAT),
        ("/metrics", None),
        ("/none", None),
    ):
        status, said, found = locked.ask(path, body, headers)
        assert (status, said["error"]["code"], found["www-authenticate"]) == (
            401,
            "invalid_api_key",
            "Bearer",
        )
        assert KEY not in str(said)


def test_the_key_is_taken_in_either_header(locked):
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
    ):
        assert locked.ask("/v1/models", headers=headers)[0] == 200
    assert locked.ask("/health")[0] == 200


def test_the_authority_of_a_target_is_a_host_too(server):
    """A target may be a whole URL, as proxies send it."""
    for url in ("http://127.0.0.1/v1/models", f"HTTP://localhost:{server.port}/v1/models?x=1"):
        status, said, _ = server.ask(url)
        assert (status, said["data"][0]["id"]) == (200, "tiny")
    assert server.ask("http://localhost/v1/chat/completions", CHAT)[0] == 200
    assert server.ask("http://localhost/none")[0] == 404
    for host in ("evil.example", "127.0.0.1.evil.example", "user@127.0.0.1", "127.0.0.1:80@evil", ""):
        s = server.raw(
            f"GET http://{host}/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer(s).startswith(b"HTTP/1.1 403"), host
    status, said, _ = server.ask("http://localhost/health", headers={"Host": "evil.example"})
    assert (status, said["error"]["code"]) == (403, "invalid_host")


def test_a_target_with_an_authority_passes_no_key_by(locked):
    assert locked.ask("http://localhost/health")[0] == 200
    assert locked.ask("http://localhost/v1/models")[0] == 401
    assert locked.ask("http://localhost/health/../v1/models")[0] == 401


# What cannot be one request


@pytest.mark.parametrize(
    "head",
    [
        "Host: 127.0.0.1\r\nHost: localhost\r\n",
        "",
        "Host: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Host: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n",
        "Host: 127.0.0.1\r\nTransfer-Encoding: chunked, identity\r\n",
        "Host: 127.0.0.1\r\nContent-Length: -1\r\n",
        "Host: 127.0.0.1\r\nContent-Length: +5\r\n",
        "Host : 127.0.0.1\r\n",
        "Host: 127.0.0.1\r\nX: " + "x" * 100_000 + "\r\n",
    ],
)
def test_smuggled_headers_are_refused(server, head):
    s = server.raw(f"POST /v1/completions HTTP/1.1\r\n{head}Connection: close\r\n\r\n0\r\n\r\n".encode())
    said = answer(s)
    assert said[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 501", b""), said[:300]
    assert b"200 OK" not in said
    still_answers(server)


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 9000, b"PRI * HTTP/2.0\r\n\r\n"],
)
def test_what_is_no_request_ends_the_connection(strict, data):
    assert b" 200 " not in answer(strict.raw(data))
    still_answers(strict)


# How much


def test_a_gigabyte_is_refused_before_it_comes(server):
    s = server.raw(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000\r\n\r\n{")
    said = answer(s)
    assert said.startswith(b"HTTP/1.1 413")
    assert b'"too_large"' in said
    head = b"Host: localhost\r\nContent-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n"
    s = server.raw(b"POST /v1/completions HTTP/1.1\r\n" + head)
    assert answer(s).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("tiny", [b"{}", b"[[]]", b'{"a":1}', b"1", b'""', b"-1.5"])
def test_millions_of_tiny_values_are_refused_before_they_are_parsed(server, tiny):
    s = server.raw(
        post(
            "/v1/completions",
            b'{"x":[' + b",".join([tiny] * 600_000) + b"]}",
            server.port,
            Connection="close",
        )
    )
    said = answer(s)
    assert said.startswith(b"HTTP/1.1 413")
    assert b"100,000 lists, objects and their fields" in said


def test_millions_of_escapes_are_refused(server):
    body = b'{"prompt":"' + b'\\"' * 2_100_000 + b'"}'
    assert answer(server.raw(post("/v1/completions", body, server.port, Connection="close")))[:12].endswith(
        b"413"
    )
    body = b'{"prompt":"' + b"\\u4e00" * 2_100_000 + b'"}'
    assert b"context_length_exceeded" in answer(
        server.raw(post("/v1/completions", body, server.port, Connection="close"))
    )


def test_a_long_text_may_have_any_number_of_commas_and_braces(server):
    """Escaped quotes and backslashes at every place of the pieces in which it is looked through."""
    for text in ('{"a": [1, 2]}, ' * 120_000, '\\",' * 600_000 + "\\", ",\\" * 600_000, '"[' * 600_000):
        status, said, _ = server.ask("/v1/completions", {"prompt": text, "max_tokens": 1})
        assert (status, said["error"]["code"]) == (400, "context_length_exceeded"), text[:10]


def without_texts(value):
    """The same with empty texts."""
    if isinstance(value, list):
        return [without_texts(v) for v in value]
    return "" if isinstance(value, str) else value


@settings(deadline=None, max_examples=60)
@given(st.recursive(st.text('a",\\[:{é') | st.integers(), lambda inner: st.lists(inner), max_leaves=12))
def test_what_stands_outside_of_strings_is_found(value):
    data, plain = json.dumps(value).encode(), json.dumps(without_texts(value)).encode()
    for piece in (1, 2, 3, 7, 1 << 20):
        with mock.patch.object(bodies, "PIECE", piece):
            assert b"".join(bodies._outside_strings(data)) == plain.replace(b'"', b"")


def test_a_body_without_end_is_refused_at_its_bound(strict):
    s = strict.raw(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    try:
        for _ in range(200):
            s.sendall(chunk)
    except OSError:
        pass
    else:
        pytest.fail("13 MB were taken")
    s.close()
    still_answers(strict)


def test_bodies_that_are_being_read_share_a_bound(strict):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99000\r\n\r\n" + b" " * 98_000
    )
    half = [strict.raw(head) for _ in range(4)]
    assert sum(b"HTTP/1.1 503" in said or b"HTTP/1.1 408" in said for said in map(answer, half)) == 4
    still_answers(strict)
    assert strict.service.bodies._bytes == 0


def test_connections_have_a_bound(strict):
    idle = [strict.raw() for _ in range(12)]
    strict.until(lambda: len(strict.server.server_state.connections) == 12)
    said = answer(strict.raw(post("/v1/completions", {}, strict.port)))
    assert said.startswith(b"HTTP/1.1 503")
    assert b"retry-after" in said
    for s in idle:  # the server lets them go by itself, for they say nothing
        assert answer(s) == b""
    still_answers(strict)


@pytest.mark.parametrize(
    "pieces", [[], [b"GET /he"], [b"GET /health HTTP/1.1\r\n", b"Host: local", b"host\r\n", b"X: y\r\n"]]
)
def test_headers_that_do_not_come_end_the_connection(strict, pieces):
    s = strict.raw()
    for piece in pieces:
        s.sendall(piece)
    assert answer(s) == b""
    s = strict.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the second request of a connection
    said = b""
    while not said.endswith(b"}"):
        said += s.recv(65536)
    for piece in pieces[:1]:
        s.sendall(piece)
        assert answer(s) == b""


def test_a_body_that_does_not_come_is_given_up(strict):
    s = strict.raw(post("/v1/completions", b"{", strict.port)[:-1])
    assert answer(s).startswith(b"HTTP/1.1 408")


def test_a_client_that_takes_nothing_is_let_go(strict):
    """The buffers on the way to it fill, and after a while the connection is cut."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect(("127.0.0.1", strict.port))
    long = post("/tokenize", {"content": "x" * 90_000}, strict.port)  # ids: a response of 270 KB
    with suppress(ConnectionError):
        s.sendall(long * 40)
    strict.until(lambda: not strict.server.server_state.connections)
    s.close()
    still_answers(strict)


def test_a_client_that_says_no_more_and_takes_nothing_is_let_go(strict):
    """Part of what it was sent waits in this process, too little to be told from what is on its way."""
    (listening,) = strict.server.servers[0].sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect(("127.0.0.1", strict.port))
    s.sendall(post("/tokenize", {"content": "x" * 12_000}, strict.port))
    assert s.recv(1)
    s.shutdown(socket.SHUT_WR)
    strict.until(lambda: not strict.server.server_state.connections, seconds=5)
    s.close()
    still_answers(strict)


def test_a_model_is_no_path_of_this_machine(server):
    for name in ("/etc/passwd", "../tiny", "smollm2-135m"):
        assert server.chat(model=name)[0] == 404
