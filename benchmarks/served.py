"""What clients of `tinychat serve` wait for: several at once, beside a long prompt, and held to a schema.

    python benchmarks/served.py --vocabulary FILE.gguf [--shape llama-3.2-1b] [--form int4] [--rounds 5]
        [--clients 4] [--tokens 256] [--prompt 8000] [--threads N] [--json OUT.json]

The server is a process of its own, with a model of that shape with random weights that speaks in the tokens
of FILE.gguf, whose vocabulary must be of the shape's size (llama.cpp's source has some without weights:
models/ggml-vocab-llama-bpe.gguf is Llama 3's). Clients ask over loopback for chat completions as a stream.

Measured, each in turns with what it is compared with:
- tokens a second of one client, and of all --clients together;
- tokens a second of one client whose answer is free, held to a JSON schema (what it forces costs nothing),
  and held to a regular expression that forces nothing;
- the first token of a short prompt while another client's prompt of --prompt tokens is being read, beside the
  times of the steps that read it.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing as mp
import statistics
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 8, "maxLength": 40},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2030},
        "kind": {"enum": ["painter", "poet", "physicist", "philosopher"]},
        "mail": {"type": "string", "pattern": "^[a-z.]{4,20}@[a-z]{4,12}\\.org$"},
        "notes": {"type": "string", "minLength": 60},
    },
    "required": ["name", "born", "kind", "mail", "notes"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 20}


def serve(args: argparse.Namespace, said: Connection) -> None:
    """The server's process: says its port, then for every word that comes, the steps since the last one."""
    from tinychat.base.load_options import LoadOptions
    from tinychat.formats.gguf_file import GGUFFile
    from tinychat.formats.gguf_tokenizer import from_gguf
    from tinychat.loading import make_backend
    from tinychat.model import Model
    from tinychat.serve.limits import Limits
    from tinychat.serve.server import Address, listen, serve
    from tinychat.synthetic import SyntheticCheckpoint

    class Spoken(SyntheticCheckpoint):
        def tokenizer(self):
            found = from_gguf(GGUFFile(args.vocabulary).fields)
            found.chat_template = CHAT
            return found

    options = LoadOptions(threads=args.threads, ctx=args.prompt + 1024)
    checkpoint = Spoken(args.shape, args.form)
    model = Model(checkpoint, make_backend(checkpoint, options), "synthetic", options)
    steps: list[tuple[float, int, int]] = []  # seconds, rows of prompts, rows of answers
    execute = model.engine.scheduler._execute

    def timed(parts) -> None:
        began = time.perf_counter()
        execute(parts)
        read = sum(n for rows, n in parts if rows.prompt)
        steps.append((time.perf_counter() - began, read, sum(n for _, n in parts) - read))

    model.engine.scheduler._execute = timed

    def tell() -> None:
        while said.recv():
            said.send(steps[:])
            steps.clear()

    address = Address(port=0, limits=Limits(parallel=max(4, args.clients)))
    sockets = listen(address)
    said.send(sockets[0][0].getsockname()[1])
    threading.Thread(target=tell, daemon=True).start()
    asyncio.run(serve({"synthetic": lambda: model}, address, sockets))


class Client:
    """`ask` gives seconds to the first token, seconds from it to the end, and tokens."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, prompt: str, tokens: int, **more: Any) -> tuple[float, float, int]:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        body |= {"temperature": 1, "stream": True, "stream_options": {"include_usage": True}, **more}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        first = used = None
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(event["error"])
            if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter()
            used = event.get("usage") or used
        connection.close()
        if response.status != 200 or first is None or used is None:
            raise SystemExit(f"The server answered {response.status} and said nothing.")
        return first - began, time.perf_counter() - first, used["completion_tokens"]


def together(port: int, n: int, tokens: int) -> float:
    """Tokens a second of n clients: all that they got after their first ones, by the time from the first of
    those to the end of the last answer.
    """
    got: list[tuple[float, float, int]] = []

    def one(i: int) -> None:
        _, rest, made = Client(port).ask(f"Question {i}: what is it?", tokens, seed=i)
        end = time.perf_counter()
        got.append((end - rest, end, made - 1))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sum(made for *_, made in got) / (max(g[1] for g in got) - min(g[0] for g in got))


def beside(port: int, said: Connection, prompt: str) -> dict[str, float]:
    """Seconds to the first token of a short prompt beside a long one, and of the steps that read that."""
    said.send(True)
    said.recv()
    long = threading.Thread(target=lambda: Client(port).ask(prompt, 1))
    long.start()
    time.sleep(2.5)
    waited = Client(port).ask("And now something short.", 4)[0]
    long.join()
    said.send(True)
    chunks = [(seconds, read) for seconds, read, _ in said.recv() if read > 16]
    usual = statistics.median(seconds for seconds, _ in chunks[3:-1])
    return {
        "first": waited,
        "chunk": usual,
        "rows": statistics.median(n for _, n in chunks[3:-1]),
        "read": sum(n for _, n in chunks),
    }


def middle(name: str, values: list[float], unit: str) -> float:
    """Print and give the median."""
    m = statistics.median(values)
    spread = (max(values) - min(values)) / m
    print(f"{name:36} {m:8.3f} {unit}   ({min(values):.3f} to {max(values):.3f}, {spread:.0%})")
    return m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--form", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    here, there = mp.Pipe()
    server = mp.get_context("spawn").Process(target=serve, args=(args, there), daemon=True)
    server.start()
    port = here.recv()
    words = "the house by the sea was old and its doors were never shut so that the wind went through it"
    Client(port).ask("Hello.", 8)
    held = {"response_format": {"type": "json_schema", "json_schema": {"name": "people", "schema": SCHEMA}}}
    letters = {"response_format": {"type": "regex", "pattern": "([a-z]{1,12}[ ,.]){400}"}}
    for more in (held, letters):
        Client(port).ask("Hello.", 8, **more)

    out: dict[str, list[float]] = {k: [] for k in ("one", "all", "free", "held", "letters", "first", "chunk")}
    for i in range(args.rounds):
        out["one"].append(together(port, 1, args.tokens))
        out["all"].append(together(port, args.clients, args.tokens))
        for name, more in (("free", {}), ("held", held), ("letters", letters)):
            _, seconds, n = Client(port).ask(f"Question {i}?", args.tokens, seed=i, **more)
            out[name].append((n - 1) / seconds)
    for i in range(max(1, args.rounds // 2)):
        text = f"Round {i}. " + " ".join(words for _ in range(args.prompt // 20))
        found = beside(port, here, text)
        print(f"  prompt of {found['read']:.0f} tokens in chunks of {found['rows']:.0f}")
        for name in ("first", "chunk"):
            out[name].append(found[name])
    one = middle("one client", out["one"], "tok/s")
    every = middle(f"{args.clients} clients together", out["all"], "tok/s")
    ratios = [b / a for a, b in zip(out["one"], out["all"], strict=True)]
    middle("  ratio", ratios, "x")
    middle("free", out["free"], "tok/s")
    for name, held_to in (("held", "a schema"), ("letters", "a pattern that forces nothing")):
        middle(f"held to {held_to}", out[name], "tok/s")
        middle("  time a token, of free", [a / b for a, b in zip(out["free"], out[name], strict=True)], "x")
    middle("first token beside a long prompt", out["first"], "s")
    middle("  a step that reads it", out["chunk"], "s")
    middle("  chunks", [a / b for a, b in zip(out["first"], out["chunk"], strict=True)], "")
    if args.json:
        args.json.write_text(json.dumps({**out, "one_median": one, "all_median": every}))
    server.kill()


if __name__ == "__main__":
    main()
